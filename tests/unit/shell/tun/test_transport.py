"""The transport on a datagram socket, whose reads and writes are frames as a TUN device's are."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from firezone_tunnel.core.packet import fair_queue
from firezone_tunnel.core.packet.superpacket import UDP, SuperPacket, parse, set_lengths
from firezone_tunnel.shell.tun import transport
from firezone_tunnel.shell.tun.device import Offload, TunDevice
from firezone_tunnel.shell.tun.transport import TunTransport

NO_OFFLOAD = bytes(10)


@pytest.fixture
def end() -> Iterator[End]:
    end = End(Offload.UDP)
    yield end
    end.close()


def test_frames_that_wait_together_go_up_as_one_list(end: End) -> None:
    end.host.send(NO_OFFLOAD + datagram(1000, b"one"))
    end.host.send(NO_OFFLOAD + datagram(2000, b"two"))

    end.transport.doRead()

    assert [[packet.source_port for packet in packets] for packets in end.turns] == [[1000, 2000]]
    assert end.transport.counters.received_frames == 2


def test_malformed_frames_are_counted_and_left_out(end: End) -> None:
    for frame in (b"x", NO_OFFLOAD, NO_OFFLOAD + b"\x45" + bytes(30), NO_OFFLOAD + datagram(1000, b"good")):
        end.host.send(frame)

    end.transport.doRead()

    assert [len(packets) for packets in end.turns] == [1]
    assert end.transport.counters.malformed == 3


def test_a_turn_reads_no_more_than_its_frames(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TunTransport, "MAX_FRAMES", 3)
    for number in range(5):
        end.host.send(NO_OFFLOAD + datagram(1000 + number, b"x"))

    end.transport.doRead()
    assert (end.turns, end.is_writing) == ([], True)
    end.transport.doWrite()
    end.transport.doWrite()

    assert [[packet.source_port for packet in packets] for packets in end.turns] == [[1000, 1001, 1002], [1003, 1004]]
    assert not end.is_writing


def test_what_arrives_later_does_not_overtake_what_waits(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TunTransport, "MAX_FRAMES", 2)
    for number in range(6):
        end.host.send(NO_OFFLOAD + datagram(1000, str(number).encode()))
        if number in {2, 4}:
            end.transport.doRead()

    while end.is_writing:
        end.transport.doWrite()
    end.transport.doRead()

    assert payloads(end) == ["0", "1", "2", "3", "4", "5"]


def test_a_burst_that_fills_the_slab_several_times_arrives_whole(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TunTransport, "MAX_TURN", 60.0)
    monkeypatch.setattr(transport, "_LAST_FRAME", 2000)
    for number in range(20):
        end.host.send(NO_OFFLOAD + datagram(1000, f"{number:0900}".encode()))

    end.transport.doRead()
    while end.is_writing:
        end.transport.doWrite()

    assert [int(payload) for payload in payloads(end)] == list(range(20))
    assert len(end.turns) > 2


def test_while_paused_packets_are_read_but_wait(end: End) -> None:
    end.transport.pauseProducing()
    end.host.send(NO_OFFLOAD + datagram(1000, b"x"))

    end.transport.doRead()
    assert (end.turns, end.reading, end.is_writing) == ([], True, False)
    end.transport.resumeProducing()
    assert end.is_writing
    end.transport.doWrite()

    assert [len(packets) for packets in end.turns] == [1]


def test_a_full_queue_leaves_packets_to_the_kernel(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_PACKETS", 3)
    end.transport.pauseProducing()
    for number in range(4):
        end.host.send(NO_OFFLOAD + datagram(1000 + number, b"x"))

    end.transport.doRead()
    assert not end.reading
    end.transport.resumeProducing()
    assert not end.reading
    end.transport.doWrite()

    assert end.reading


def test_nothing_that_waits_is_delivered_after_the_end(end: End) -> None:
    end.transport.pauseProducing()
    end.host.send(NO_OFFLOAD + datagram(1000, b"x"))
    end.transport.doRead()

    end.transport.close()
    end.transport.doWrite()

    assert (end.turns, end.reading, end.is_writing) == ([], False, False)


def test_only_every_second_turn_after_a_pause_takes_a_single_frame(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end.transport, "CALM", -1.0)  # every turn comes after a pause, such as the reactor's other work
    for number in range(5):
        end.host.send(NO_OFFLOAD + datagram(1000 + number, b"x"))

    end.transport.doRead()
    end.transport.doRead()

    assert [len(packets) for packets in end.turns] == [1, 4]


def test_a_turn_ends_once_its_time_is_used_up(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TunTransport, "MAX_TURN", 0.0)
    for number in range(2):
        end.host.send(NO_OFFLOAD + datagram(1000 + number, b"x"))

    end.transport.doRead()

    assert [len(packets) for packets in end.turns] == [1]


def test_frames_of_any_size_never_overrun_the_slab(end: End) -> None:
    for _ in range(6):
        end.host.send(bytes(65_545))
        end.transport.doRead()
    end.host.send(NO_OFFLOAD + datagram(1000, b"x" * 1000))

    end.transport.doRead()

    assert [len(packets) for packets in end.turns] == [1]


def test_a_lone_packet_is_written_behind_an_empty_header(end: End) -> None:
    end.transport.write(packet(datagram(1000, b"hello")))

    assert end.host.recv(2048) == NO_OFFLOAD + datagram(1000, b"hello")


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.CHECKSUM, Offload.TCP])
def test_a_run_the_kernel_would_not_take_is_written_segment_by_segment(offload: Offload) -> None:
    end = End(offload)

    end.transport.write(run_of_datagrams(3))

    assert [len(end.host.recv(65_536)) for _ in range(3)] == [10 + 28 + 100] * 3
    assert end.transport.counters.written_frames == 3
    end.close()


def test_one_refused_run_does_not_split_later_runs(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accepted run proves that the kernel takes runs: a later refusal concerns only that packet."""
    end.transport.write(run_of_datagrams(3))
    with monkeypatch.context() as patch:
        refuse(patch, errno.EINVAL)
        end.transport.write(run_of_datagrams(3))
    end.transport.write(run_of_datagrams(3))

    assert [len(end.host.recv(65_536)) for _ in range(2)] == [10 + 28 + 300] * 2
    assert end.transport.counters.segmentation_refused == 1


@pytest.mark.parametrize(
    ("number", "counter"),
    [
        (errno.EIO, "link_down"),
        (errno.ENOBUFS, "no_buffers"),
        (errno.EAGAIN, "no_buffers"),
        (errno.EINVAL, "write_errors"),
    ],
)
def test_a_failed_write_is_only_counted(end: End, monkeypatch: pytest.MonkeyPatch, number: int, counter: str) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, number)
        end.transport.write(packet(datagram(1000, b"x")))

    assert getattr(end.transport.counters, counter) == 1
    assert end.lost is None


def test_the_end_of_the_file_is_the_end_of_the_device(end: End) -> None:
    end.host.send(NO_OFFLOAD + datagram(1000, b"last"))
    end.host.close()

    end.transport.doRead()

    assert [len(packets) for packets in end.turns] == [1]
    assert end.lost is not None
    assert end.lost.check(ConnectionLost)


def test_a_closed_connection_is_reported_as_lost(end: End) -> None:
    """The reactor takes the error that a removed device shows for an orderly end."""
    end.transport.connectionLost(Failure(ConnectionDone()))

    assert end.lost is not None
    assert end.lost.check(ConnectionLost)


def test_an_error_in_the_protocol_is_handed_on(end: End) -> None:
    end.transport.connectionLost(Failure(ZeroDivisionError()))

    assert end.lost is not None
    assert end.lost.check(ZeroDivisionError)


def test_closing_is_done_once_and_cleanly(end: End) -> None:
    end.transport.close()
    end.transport.close()
    end.transport.resumeProducing()
    end.transport.doRead()

    assert end.lost is not None
    assert end.lost.check(ConnectionDone)
    assert end.transport.counters.read_errors == 0
    assert (end.reading, end.transport.fileno()) == (False, -1)


def test_a_read_error_is_counted(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, buffers: object) -> int:
        raise OSError(errno.ENOMEM, "out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", failing)
        end.transport.doRead()

    assert (end.transport.counters.read_errors, end.lost) == (1, None)


class End:
    """A packet protocol, the reactor under its transport, and the host's end of the device."""

    def __init__(self, offload: Offload) -> None:
        self.host, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        for side in (self.host, ours):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.reading = self.is_writing = False
        self.turns: list[list[SuperPacket]] = []
        self.lost: Failure | None = None
        self.transport = TunTransport(self, self, TunDevice(ours.detach(), "tun-firezone", offload))
        self.transport.CALM = float("inf")  # on any machine, as in the middle of traffic

    def close(self) -> None:
        self.transport.close()
        self.host.close()

    def makeConnection(self, transport: TunTransport) -> None:
        pass

    def packetsReceived(self, packets: list[SuperPacket]) -> None:
        self.turns.append([packet.copy() for packet in packets])

    def connectionLost(self, reason: Failure) -> None:
        self.lost = reason

    def addReader(self, reader: TunTransport) -> None:
        self.reading = True

    def removeReader(self, reader: TunTransport) -> None:
        self.reading = False

    def addWriter(self, writer: TunTransport) -> None:
        self.is_writing = True

    def removeWriter(self, writer: TunTransport) -> None:
        self.is_writing = False


def payloads(end: End) -> list[str]:
    """The payloads of all datagrams that were delivered, in order."""
    packets = [packet.segment(index) for turn in end.turns for packet in turn for index in range(packet.segments)]
    return [bytes(packet.data[28:]).decode() for packet in packets]


def refuse(patch: pytest.MonkeyPatch, number: int) -> None:
    def refusing(fd: int, buffers: object) -> int:
        raise OSError(number, os.strerror(number))

    patch.setattr(os, "writev", refusing)


def packet(data: bytes) -> SuperPacket:
    parsed = parse(bytearray(data))
    assert parsed is not None
    return parsed


def datagram(source_port: int, payload: bytes) -> bytes:
    """An IPv4 UDP packet without a UDP checksum."""
    data = bytearray(28) + payload
    data[0] = 0x45
    data[8:10] = bytes([64, UDP])
    data[12:20] = bytes([100, 64, 0, 1, 10, 0, 0, 1])
    data[20:24] = source_port.to_bytes(2, "big") + (53).to_bytes(2, "big")
    data[2:4] = len(data).to_bytes(2, "big")
    data[24:26] = (len(data) - 20).to_bytes(2, "big")
    whole = packet(bytes(data))
    set_lengths(whole)
    return bytes(whole.data)


def run_of_datagrams(count: int) -> SuperPacket:
    whole = parse(bytearray(datagram(1000, bytes(100 * count))), segment_size=100)
    assert whole is not None
    whole.checksum_start = whole.transport_offset
    return whole

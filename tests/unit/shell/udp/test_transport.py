"""How the transport answers each way in which a send can fail, on a socket that fails on demand."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.shell.udp import transport as udp_transport
from firezone_tunnel.shell.udp.segmented import RETRY_SEGMENTATION_AFTER
from firezone_tunnel.shell.udp.sockets import UdpFeatures
from firezone_tunnel.shell.udp.transport import UdpTransport

PEER = SocketAddress("192.0.2.1", 4000)
OTHER_PEER = SocketAddress("192.0.2.2", 4000)
SIZE = 100


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> End:
    return End(monkeypatch)


@pytest.mark.parametrize("refusal", [errno.EMSGSIZE, errno.EINVAL, errno.EIO])
def test_a_batch_whose_segmentation_is_refused_leaves_at_once_as_single_datagrams(end: End, refusal: int) -> None:
    end.socket.refuse_segments = refusal

    end.send(PEER, datagrams=3, last=40)

    assert end.socket.sent == [(SIZE, 0), (SIZE, 0), (40, 0)]
    assert end.released == 1
    assert (end.transport.counters.segmentation_refused, end.transport.counters.sent_datagrams) == (1, 3)


def test_only_that_destination_keeps_to_single_datagrams(end: End) -> None:
    end.socket.refuse_segments = errno.EINVAL
    end.send(PEER, datagrams=2)
    end.socket.refuse_segments = None
    end.socket.sent.clear()

    end.send(PEER, datagrams=2)
    end.send(OTHER_PEER, datagrams=2)

    assert end.socket.sent == [(SIZE, 0), (SIZE, 0), (2 * SIZE, SIZE)]
    assert end.transport.counters.segmentation_refused == 1


@pytest.mark.parametrize("what_changed", ["the network", "ten minutes have passed"])
def test_segmentation_is_tried_again_after_a_while_or_a_network_change(end: End, what_changed: str) -> None:
    end.socket.refuse_segments = errno.EINVAL
    end.send(PEER, datagrams=2)
    end.socket.refuse_segments = None
    end.socket.sent.clear()

    if what_changed == "the network":
        end.transport.forget_paths()
    else:
        end.now += RETRY_SEGMENTATION_AFTER
    end.send(PEER, datagrams=2)

    assert end.socket.sent == [(2 * SIZE, SIZE)]


def test_segmentation_stays_on_if_single_datagrams_fail_as_well(end: End) -> None:
    end.socket.failures.extend([errno.EINVAL, errno.EINVAL])
    end.send(PEER, datagrams=2)

    end.send(PEER, datagrams=2)

    assert end.socket.sent == [(2 * SIZE, SIZE)]
    assert end.transport.counters.unreachable == 1
    assert end.released == 2


def test_a_kernel_without_segmentation_sends_single_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    end = End(monkeypatch, gso=False)

    end.send(PEER, datagrams=3)

    assert end.socket.sent == [(SIZE, 0)] * 3
    assert end.transport.counters.segmentation_refused == 0


@pytest.mark.parametrize(
    ("number", "counter"),
    [
        (errno.ENETUNREACH, "unreachable"),
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.EADDRNOTAVAIL, "unreachable"),
        (errno.EINVAL, "unreachable"),
        (errno.EPERM, "forbidden"),
        (errno.EACCES, "forbidden"),
        (errno.ENOBUFS, "no_buffers"),
        (errno.ENODEV, "send_errors"),
    ],
)
def test_a_failed_send_is_counted_and_the_transmit_released(end: End, number: int, counter: str) -> None:
    end.socket.failures.append(number)

    end.send(PEER)

    assert getattr(end.transport.counters, counter) == 1
    assert end.released == 1
    assert end.writers == []


def test_an_address_of_the_other_family_is_unreachable(end: End) -> None:
    end.send(SocketAddress("2001:db8::1", 4000))

    assert (end.socket.sent, end.transport.counters.unreachable, end.released) == ([], 1, 1)


def test_a_local_firewall_is_mentioned_once(end: End, logged: list[dict[str, Any]]) -> None:
    end.socket.failures.extend([errno.EPERM, errno.EPERM])

    end.send(PEER)
    end.send(PEER)

    assert [message["message_type"] for message in logged] == ["udp:sending_forbidden"]


def test_a_full_socket_pauses_the_protocol_and_keeps_the_order(end: End) -> None:
    end.socket.full = True
    end.send(PEER, datagrams=1)
    end.send(PEER, datagrams=2)

    assert (end.protocol, end.released) == (["paused"], 0)
    assert end.writers == [end.transport]

    end.socket.full = False
    end.transport.doWrite()

    assert end.socket.sent == [(SIZE, 0), (2 * SIZE, SIZE)]
    assert (end.protocol, end.released) == (["paused", "resumed"], 2)
    assert end.writers == []


def test_a_batch_that_is_interrupted_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    end = End(monkeypatch, gso=False)
    end.socket.room = 2
    end.send(PEER, datagrams=4, last=10)
    assert end.socket.sent == [(SIZE, 0), (SIZE, 0)]

    end.socket.room = 1
    end.transport.doWrite()
    assert end.protocol == ["paused"]

    end.socket.room = 5
    end.transport.doWrite()

    assert end.socket.sent == [(SIZE, 0), (SIZE, 0), (SIZE, 0), (10, 0)]
    assert (end.protocol, end.released) == (["paused", "resumed"], 1)


def test_a_refused_batch_that_is_interrupted_goes_on_where_it_stopped(end: End) -> None:
    end.socket.refuse_segments = errno.EIO
    end.socket.room = 1
    end.send(PEER, datagrams=3)

    end.socket.room = None
    end.transport.doWrite()

    assert end.socket.sent == [(SIZE, 0)] * 3
    assert (end.released, end.transport.counters.segmentation_refused) == (1, 1)


def test_the_queue_is_bounded(end: End) -> None:
    end.socket.full = True

    for _ in range(UdpTransport.MAX_QUEUE + 3):
        end.send(PEER)

    assert end.transport.counters.queue_full == 3
    assert end.released == 3


def test_closing_releases_queued_and_later_transmits(end: End) -> None:
    end.socket.full = True
    end.send(PEER)
    end.send(PEER)

    end.transport.close()
    end.transport.close()
    end.send(PEER)

    assert end.released == 3
    assert end.protocol == ["paused", "lost"]
    assert end.transport.fileno() == -1


class End:
    """A transport on a socket that fails on demand, its reactor and its protocol."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, gso: bool = True) -> None:
        self.socket = FailingSocket()
        self.now = 1000.0
        self.released = 0
        self.protocol: list[str] = []
        self.writers: list[UdpTransport] = []
        features = UdpFeatures(gso=gso, gro=True, receive_buffer=0)
        monkeypatch.setattr(udp_transport, "bind", lambda *_, **__: self.socket)
        monkeypatch.setattr(udp_transport, "configure", lambda *_, **__: features)
        self.transport = UdpTransport(self, self, host="0.0.0.0", clock=lambda: self.now)

    def send(self, destination: SocketAddress, *, datagrams: int = 1, last: int = SIZE) -> None:
        payload = os.urandom((datagrams - 1) * SIZE + last)
        segment_size = SIZE if datagrams > 1 else 0
        self.transport.send(Transmit(destination, payload, segment_size=segment_size, pooled=self))

    def release(self) -> None:
        self.released += 1

    def makeConnection(self, transport: UdpTransport) -> None:
        assert transport.getHost() == SocketAddress("0.0.0.0", 52625)

    def batchReceived(self, batch: DatagramBatch) -> None:
        raise AssertionError(batch)

    def sendingPaused(self) -> None:
        self.protocol.append("paused")

    def sendingResumed(self) -> None:
        self.protocol.append("resumed")

    def connectionLost(self, reason: Failure) -> None:
        assert reason.check(ConnectionDone)
        self.protocol.append("lost")

    def addReader(self, reader: UdpTransport) -> None:
        pass

    def removeReader(self, reader: UdpTransport) -> None:
        pass

    def addWriter(self, writer: UdpTransport) -> None:
        self.writers.append(writer)

    def removeWriter(self, writer: UdpTransport) -> None:
        if writer in self.writers:
            self.writers.remove(writer)


class FailingSocket:
    """Records the length and the segment size of each send."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.failures: deque[int] = deque()  # one after another
        self.refuse_segments: int | None = None
        self.room: int | None = None  # sends that succeed; None: all
        self.close: Callable[[], None] = lambda: None

    @property
    def full(self) -> bool:
        return self.room == 0

    @full.setter
    def full(self, full: bool) -> None:
        self.room = 0 if full else None

    def sendmsg(self, buffers: tuple[bytes], ancillary: list[tuple[int, int, bytes]], flags: int, address: Any) -> None:
        sizes = [int.from_bytes(data, "little") for _, kind, data in ancillary if kind == 103]  # UDP_SEGMENT
        if self.failures:
            number = self.failures.popleft()
            raise OSError(number, os.strerror(number))
        if sizes and self.refuse_segments:
            raise OSError(self.refuse_segments, os.strerror(self.refuse_segments))
        if self.room == 0:
            raise BlockingIOError(errno.EAGAIN, "full")
        if self.room is not None:
            self.room -= 1
        self.sent.append((len(buffers[0]), sizes[0] if sizes else 0))

    def getsockname(self) -> tuple[str, int]:
        return ("0.0.0.0", 52625)

    def fileno(self) -> int:
        return 7

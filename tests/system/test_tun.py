"""TUN devices of the running kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from firezone_tunnel.core.packet.superpacket import UDP, SuperPacket
from firezone_tunnel.errors import InUseError, PlatformError
from firezone_tunnel.shell.tun import device as tun_device
from firezone_tunnel.shell.tun.device import Offload, TunDevice, open_tun, tun_from_fd
from firezone_tunnel.shell.tun.transport import TunTransport
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

NAME = "tun-firezone"
HERE = "100.64.0.1"  # the tunnel's range: docs/protocol/data-plane.md, 0.1
THERE = "100.64.0.2"


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    host = lab.host("host")
    with inside(host):
        yield host


def test_a_device_offers_all_that_the_kernel_knows(host: Host) -> None:
    device = open_tun()

    assert device.name == NAME
    assert device.offload is Offload.UDP
    assert "tcp-segmentation-offload: on" in host.run("ethtool", "-k", NAME).stdout
    device.close()


@pytest.mark.parametrize("most", list(Offload))
def test_each_lesser_set_of_offloads_works(host: Host, most: Offload) -> None:
    device = open_tun(offload=most)

    assert device.offload is most
    assert ("tcp-segmentation-offload: on" in host.run("ethtool", "-k", NAME).stdout) == (most >= Offload.TCP)
    device.close()


def test_a_kernel_without_udp_runs_still_gives_tcp_runs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tun_device.fcntl.ioctl

    def before_6_2(fd: int, request: int, argument: int | bytes) -> int | bytes:
        if isinstance(argument, int) and argument & 0x60:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, request, argument)

    monkeypatch.setattr(tun_device.fcntl, "ioctl", before_6_2)

    device = open_tun()

    assert device.offload is Offload.TCP
    device.close()


def test_a_second_instance_is_told_that_the_device_is_in_use(host: Host) -> None:
    device = open_tun()

    with pytest.raises(InUseError, match=NAME):
        open_tun()
    device.close()


def test_a_multi_queue_device_of_someone_else_is_in_use_as_well(host: Host) -> None:
    host.ip("tuntap", "add", NAME, "mode", "tun", "multi_queue")

    with pytest.raises(InUseError):
        open_tun()


def test_a_device_that_another_process_opened_is_taken_over_by_its_descriptor(host: Host) -> None:
    original = open_tun("fz-other")

    device = tun_from_fd(os.dup(original.fd), offload=Offload.TCP)

    assert (device.name, device.offload) == ("fz-other", Offload.TCP)
    device.close()
    original.close()


def test_a_descriptor_that_is_no_device_is_refused() -> None:
    reading, writing = os.pipe()
    with pytest.raises(PlatformError):
        tun_from_fd(reading)
    os.close(reading)
    os.close(writing)


@pytest.fixture
def tun(host: Host) -> Iterator[Tunnel]:
    with tunnel_on(host, Offload.UDP) as tunnel:
        yield tunnel


@contextlib.contextmanager
def tunnel_on(host: Host, offload: Offload) -> Iterator[Tunnel]:
    tunnel = Tunnel(open_tun(offload=offload))
    host.ip("link", "set", NAME, "addrgenmode", "none", "mtu", "1280", "up")
    host.ip("address", "add", f"{HERE}/24", "dev", NAME)
    yield tunnel
    tunnel.transport.close()


def test_a_run_of_tcp_segments_arrives_as_one_packet_and_may_be_written_back(tun: Tunnel) -> None:
    """The packets of one socket are returned through the tunnel, with addresses swapped, to another local socket."""
    payload = os.urandom(60_000)
    server = socket.create_server((HERE, 0))
    server.settimeout(5)
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex((THERE, server.getsockname()[1]))

    received = bytearray()
    connection: socket.socket | None = None
    sent = 0
    for _ in range(500):
        tun.turn()
        if connection is None:
            if select.select([server], [], [], 0)[0]:
                connection, _ = server.accept()
                connection.setblocking(False)
            continue
        if sent < len(payload) and select.select([], [client], [], 0)[1]:
            sent += client.send(payload[sent:])
        if select.select([connection], [], [], 0)[0]:
            received += connection.recv(65_536)
        if len(received) == len(payload):
            break

    assert received == payload
    assert max(packet.segments for packet in tun.received) > 10
    assert tun.transport.counters.segmentation_refused == 0
    for item in (server, client, connection):
        assert item is not None
        item.close()


def test_datagrams_of_one_flow_that_wait_together_are_merged(tun: Tunnel) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind((HERE, 0))
    for number in range(5):
        client.sendto(bytes([number]) * 200, (THERE, 9))

    tun.turn()

    [packet] = [packet for packet in tun.received if packet.protocol == UDP]
    assert (packet.segments, packet.segment_size) == (5, 200)
    client.close()


def test_a_device_without_udp_runs_is_written_segment_by_segment(host: Host) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.settimeout(5)
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with tunnel_on(host, Offload.TCP) as tun:
        server.bind((HERE, 0))
        client.bind((HERE, 0))
        for number in range(3):
            client.sendto(bytes([number]) * (200 - number // 2), (THERE, server.getsockname()[1]))

        tun.turn()

        assert [server.recv(2048) for _ in range(3)] == [b"\0" * 200, b"\1" * 200, b"\2" * 199]
        assert tun.transport.counters.segmentation_refused == 0
    server.close()
    client.close()


def test_a_kernel_that_refuses_a_run_gets_its_segments_instead(tun: Tunnel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def refusing(fd: int, buffers: tuple[bytes, memoryview]) -> int:
        if buffers[0][1]:  # gso_type
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", refusing)
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((HERE, 0))
    server.settimeout(5)
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind((HERE, 0))
    for _ in range(2):
        for number in range(3):
            client.sendto(bytes([number]) * 200, (THERE, server.getsockname()[1]))
        tun.turn()

    assert [server.recv(2048)[0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    assert tun.transport.counters.segmentation_refused == 1  # it is not tried again
    server.close()
    client.close()


def test_one_turn_delivers_a_bounded_number_of_packets(tun: Tunnel) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind((HERE, 0))
    for number in range(100):
        client.sendto(bytes(100 + number), (THERE, 1 + number))

    tun.turn()
    first = len(tun.received)
    tun.turn()
    tun.turn()

    assert 0 < first <= TunTransport.MAX_FRAMES
    assert len(tun.received) > first
    client.close()


def test_writing_while_the_link_is_down_is_counted_and_goes_on(host: Host, tun: Tunnel) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind((HERE, 0))
    client.sendto(b"x", (THERE, 9))
    tun.turn()
    packet = tun.received[0]

    host.ip("link", "set", NAME, "down")
    tun.transport.write(packet)
    host.ip("link", "set", NAME, "up")
    tun.transport.write(packet)

    assert (tun.transport.counters.link_down, tun.lost) == (1, None)
    client.close()


def test_a_device_that_someone_removes_is_lost(host: Host, tun: Tunnel) -> None:
    host.ip("link", "delete", NAME)

    tun.turn()

    assert tun.lost is not None
    assert tun.lost.check(ConnectionLost) is not None
    assert NAME in tun.lost.getErrorMessage()
    assert tun.transport.fileno() == -1


@pytest_twisted.ensureDeferred
async def test_the_reactor_notices_that_the_device_was_removed(host: Host) -> None:
    from twisted.internet import reactor

    tunnel = Tunnel(open_tun(), reactor)
    host.ip("link", "delete", NAME)

    reason = await tunnel.gone.addTimeout(5, reactor)

    assert isinstance(reason, ConnectionLost)


def test_closing_removes_the_device(host: Host, tun: Tunnel) -> None:
    tun.transport.close()
    tun.transport.close()

    assert tun.lost is not None
    assert tun.lost.check(ConnectionDone) is not None
    assert NAME not in host.ip("link")


def test_devices_come_and_go_fifty_times(host: Host) -> None:
    for _ in range(50):
        open_tun().close()

    assert NAME not in host.ip("link")


class Tunnel:
    """A packet protocol that returns each packet to its sender, and the reactor for its transport."""

    def __init__(self, device: TunDevice, reactor: Any = None) -> None:
        self.received: list[SuperPacket] = []
        self.lost: Failure | None = None
        self.gone: Deferred[BaseException] = Deferred()
        self.is_writing = False
        self.transport = TunTransport(reactor or self, self, device)
        self.transport.CALM = float("inf")  # as in the middle of traffic: after a pause a turn takes a lone packet

    def turn(self) -> None:
        """Run one reactor turn, if the device is readable within a second or packets wait in the transport."""
        poll = select.poll()
        poll.register(self.transport, select.POLLIN)
        if poll.poll(0 if self.is_writing else 1000):
            self.transport.doRead()
        if self.is_writing:
            self.transport.doWrite()

    def makeConnection(self, transport: TunTransport) -> None:
        assert transport.device.name == NAME

    def packetsReceived(self, packets: list[SuperPacket]) -> None:
        for packet in packets:
            self.received.append(packet.copy())
            size = len(packet.source)
            start = 12 if packet.version == 4 else 8
            addresses = bytes(packet.data[start : start + 2 * size])
            packet.data[start : start + 2 * size] = addresses[size:] + addresses[:size]
            self.transport.write(packet)

    def connectionLost(self, reason: Failure) -> None:
        self.lost = reason
        self.gone.callback(reason.value)

    def addReader(self, reader: TunTransport) -> None:
        pass

    def removeReader(self, reader: TunTransport) -> None:
        pass

    def addWriter(self, writer: TunTransport) -> None:
        self.is_writing = True

    def removeWriter(self, writer: TunTransport) -> None:
        self.is_writing = False

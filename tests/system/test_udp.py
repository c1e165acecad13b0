"""Sending over links that don't support segmentation, or whose queue is full."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Iterator

import pytest
from twisted.python.failure import Failure

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.shell.udp.transport import UdpTransport
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

ALICE = {"ipv4": "192.0.2.1", "ipv6": "2001:db8::1"}
BOB = {"ipv4": "192.0.2.2", "ipv6": "2001:db8::2"}
SIZE = 1312  # an encrypted packet of full size
FAMILIES = list(ALICE)
_FIFTY_MBIT = ("rate", "50mbit", "burst", "100k", "limit", "100000000")


@pytest.fixture
def alice(lab: Lab) -> Iterator[Host]:
    alice, bob = lab.host("alice"), lab.host("bob")
    lab.cable(alice, "eth0", bob, "eth0")
    alice.add_address("eth0", f"{ALICE['ipv4']}/24", f"{ALICE['ipv6']}/64")
    bob.add_address("eth0", f"{BOB['ipv4']}/24", f"{BOB['ipv6']}/64")
    with inside(alice):
        yield alice


@pytest.mark.parametrize("family", FAMILIES)
def test_a_link_too_small_for_a_segment_gets_single_datagrams_in_fragments(lab: Lab, alice: Host, family: str) -> None:
    for host in lab.hosts.values():
        host.ip("link", "set", "eth0", "mtu", "1300")
    with inside(lab.hosts["bob"]):
        receiver = Receiver(BOB[family])
    sender = End(ALICE[family])
    payload = os.urandom(20 * SIZE + 5)

    for _ in range(2):
        sender.transport.send(Transmit(receiver.address, payload, segment_size=SIZE, pooled=sender))

    assert receiver.take(42) == 2 * [payload[start : start + SIZE] for start in range(0, len(payload), SIZE)]
    assert (sender.transport.counters.segmentation_refused, sender.released) == (1, 2)
    receiver.close()
    sender.transport.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_link_gets_segments(lab: Lab, alice: Host, family: str) -> None:
    with inside(lab.hosts["bob"]):
        receiver = Receiver(BOB[family])
    sender = End(ALICE[family])
    payload = os.urandom(20 * SIZE + 5)

    sender.transport.send(Transmit(receiver.address, payload, segment_size=SIZE))

    assert len(receiver.take(21)) == 21
    assert (sender.transport.counters.segmentation_refused, sender.transport.counters.sent_batches) == (0, 1)
    receiver.close()
    sender.transport.close()


def test_a_slow_link_pauses_the_protocol_until_there_is_room(lab: Lab, alice: Host) -> None:
    alice.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *_FIFTY_MBIT)
    with inside(lab.hosts["bob"]):
        receiver = Receiver(BOB["ipv4"])
    sender = End(ALICE["ipv4"])
    payload = os.urandom(40 * SIZE)
    sent = 0
    while not sender.paused and sent < 500:
        sender.transport.send(Transmit(receiver.address, payload, segment_size=SIZE, pooled=sender))
        sent += 1
    assert sender.paused
    assert sender.released == sent - 1

    poll = select.poll()
    poll.register(sender.transport, select.POLLOUT)
    while sender.paused:
        assert poll.poll(5000)
        sender.transport.doWrite()

    assert sender.released == sent
    receiver.close()
    sender.transport.close()


def test_a_network_that_is_gone_is_unreachable(alice: Host) -> None:
    sender = End("0.0.0.0")

    sender.transport.send(Transmit(SocketAddress("198.51.100.1", 9), bytes(3 * SIZE), segment_size=SIZE))
    sender.transport.send(Transmit(SocketAddress(BOB["ipv4"], 9), b"x", source=SocketAddress("203.0.113.9", 9)))

    assert sender.transport.counters.unreachable == 2
    sender.transport.close()


def test_a_local_firewall_is_not_an_error(alice: Host) -> None:
    alice.run("nft", "add table inet t; add chain inet t o { type filter hook output priority 0; policy drop; }")
    sender = End("0.0.0.0")

    sender.transport.send(Transmit(SocketAddress(BOB["ipv4"], 9), bytes(3 * SIZE), segment_size=SIZE))

    assert (sender.transport.counters.forbidden, sender.transport.counters.send_errors) == (1, 0)
    sender.transport.close()


def test_the_mark_keeps_datagrams_out_of_the_tunnel(alice: Host) -> None:
    alice.ip("rule", "add", "not", "fwmark", "0xfd002021", "blackhole")
    marked, unmarked = End("0.0.0.0", mark=0xFD002021), End("0.0.0.0")

    for end in (marked, unmarked):
        end.transport.send(Transmit(SocketAddress(BOB["ipv4"], 9), b"x"))

    assert marked.transport.counters.sent_datagrams == 1
    assert (unmarked.transport.counters.sent_datagrams, unmarked.transport.counters.unreachable) == (0, 1)
    marked.transport.close()
    unmarked.transport.close()


def test_without_the_capability_to_mark_there_is_no_socket(alice: Host) -> None:
    command = (
        "from firezone_tunnel.shell.udp.sockets import bind\n"
        "from firezone_tunnel.errors import PlatformError\n"
        "try: bind('0.0.0.0', [0], mark=1)\n"
        "except PlatformError as error: print(error)"
    )
    shown = alice.run(
        "setpriv", "--bounding-set=-net_admin,-net_raw", "--inh-caps=-net_admin,-net_raw", sys.executable, "-c", command
    )

    assert "CAP_NET_ADMIN" in shown.stdout


class Receiver:
    """A plain socket without GRO."""

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._socket.settimeout(5)
        self.address = SocketAddress(*self._socket.getsockname()[:2])

    def take(self, count: int) -> list[bytes]:
        return [self._socket.recv(65_536) for _ in range(count)]

    def close(self) -> None:
        self._socket.close()


class End:
    """A batch protocol, and the reactor for its transport."""

    def __init__(self, host: str, *, mark: int | None = None) -> None:
        self.released = 0
        self.paused = False
        self.transport = UdpTransport(self, self, host=host, port=0, mark=mark)

    def release(self) -> None:
        self.released += 1

    def makeConnection(self, transport: UdpTransport) -> None:
        pass

    def batchReceived(self, batch: DatagramBatch) -> None:
        raise AssertionError(batch)

    def sendingPaused(self) -> None:
        self.paused = True

    def sendingResumed(self) -> None:
        self.paused = False

    def connectionLost(self, reason: Failure) -> None:
        pass

    def addReader(self, reader: UdpTransport) -> None:
        pass

    def removeReader(self, reader: UdpTransport) -> None:
        pass

    def addWriter(self, writer: UdpTransport) -> None:
        pass

    def removeWriter(self, writer: UdpTransport) -> None:
        pass

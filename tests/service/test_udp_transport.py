"""Batches between two transports over loopback, under the real reactor."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.udp.sockets import bind
from firezone_tunnel.shell.udp.transport import UdpTransport

LOOPBACK = ["127.0.0.1", "::1"]
SIZE = 1312


@pytest.mark.parametrize("host", LOOPBACK)
@pytest_twisted.ensureDeferred
async def test_one_send_of_many_datagrams_arrives_as_one_batch(ends: Ends, host: str) -> None:
    alice, bob = ends.new(host), ends.new(host)
    payload = b"".join(bytes([number]) * SIZE for number in range(40)) + b"end"

    alice.transport.send(Transmit(bob.address, payload, segment_size=SIZE))
    await bob.datagrams(41)

    assert [batch.rows[1:] for batch in bob.batches] == [(0, SIZE, SIZE, 41, 3)]
    assert bob.received == [payload[start : start + SIZE] for start in range(0, len(payload), SIZE)]
    assert (bob.batches[0].source, bob.batches[0].local) == (alice.address, bob.address)
    assert (alice.transport.counters.sent_batches, alice.transport.counters.sent_datagrams) == (1, 41)


@pytest_twisted.ensureDeferred
async def test_only_every_second_turn_after_a_pause_takes_a_single_batch(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UdpTransport, "CALM", -1.0)  # every turn comes after a pause, such as the reactor's other work
    alice, bob = ends.new("127.0.0.1"), ends.new("127.0.0.1", gro=False)
    for _ in range(5):
        alice.transport.send(Transmit(bob.address, b"x"))

    bob.transport.doRead()
    bob.transport.doRead()

    assert len(bob.batches) == 5


@pytest.mark.parametrize("host", LOOPBACK)
@pytest.mark.parametrize(("gso", "gro"), [(False, True), (True, False), (False, False)])
@pytest_twisted.ensureDeferred
async def test_without_one_of_the_offloads_the_same_datagrams_arrive(
    ends: Ends, host: str, gso: bool, gro: bool
) -> None:
    alice, bob = ends.new(host, gso=gso), ends.new(host, gro=gro)
    payload = b"".join(bytes([number]) * SIZE for number in range(20)) + b"end"

    alice.transport.send(Transmit(bob.address, payload, segment_size=SIZE))
    await bob.datagrams(21)

    assert bob.received == [payload[start : start + SIZE] for start in range(0, len(payload), SIZE)]
    assert (alice.transport.features.gso, bob.transport.features.gro) == (gso, gro)


@pytest.mark.parametrize("host", LOOPBACK)
@pytest.mark.parametrize("ecn", range(4))
@pytest_twisted.ensureDeferred
async def test_ecn_travels_with_the_datagrams(ends: Ends, host: str, ecn: int) -> None:
    alice, bob = ends.new(host), ends.new(host)

    alice.transport.send(Transmit(bob.address, b"x", ecn=ecn))
    await bob.datagrams(1)

    assert bob.batches[0].ecn == ecn


@pytest_twisted.ensureDeferred
async def test_the_source_address_may_be_chosen_and_the_local_one_is_known(ends: Ends) -> None:
    alice, bob = ends.new("0.0.0.0"), ends.new("0.0.0.0")
    source = SocketAddress("127.0.0.7", alice.address.port)
    destination = SocketAddress("127.0.0.9", bob.address.port)

    alice.transport.send(Transmit(destination, b"x", source=source))
    await bob.datagrams(1)

    assert (bob.batches[0].source, bob.batches[0].local) == (source, destination)


@pytest_twisted.ensureDeferred
async def test_both_families_have_the_same_port(ends: Ends) -> None:
    ipv4 = ends.new("0.0.0.0")
    ipv6 = ends.new("::", port=ipv4.address.port)

    assert ipv4.address.port == ipv6.address.port


@pytest_twisted.ensureDeferred
async def test_a_taken_port_is_replaced_by_another_or_refused(ends: Ends) -> None:
    taken = ends.new("127.0.0.1").address.port

    assert ends.new("127.0.0.1", port=taken).address.port != taken
    with pytest.raises(PlatformError):
        ends.new("127.0.0.1", port=taken, fallback_port=None)


@pytest.mark.parametrize("host", LOOPBACK)
@pytest_twisted.ensureDeferred
async def test_a_socket_that_is_bound_already_is_taken_with_what_waits_in_it(ends: Ends, host: str) -> None:
    alice, bound = ends.new(host), bind(host, [0], mark=None)
    address = SocketAddress(*bound.getsockname()[:2])
    alice.transport.send(Transmit(address, b"x"))

    bob = ends.new("192.0.2.1", bound=bound)
    await bob.datagrams(1)

    assert (bob.address, bob.received) == (address, [b"x"])
    assert bob.batches[0].local == address
    bob.transport.close()
    assert bound.fileno() == -1


def test_a_port_is_shared_only_if_every_socket_agrees() -> None:
    with bind("127.0.0.1", [0], mark=None, reuse_port=True) as first:
        port = first.getsockname()[1]
        bind("127.0.0.1", [port], mark=None, reuse_port=True).close()

        with pytest.raises(PlatformError):
            bind("127.0.0.1", [port], mark=None)


@pytest_twisted.ensureDeferred
async def test_empty_datagrams_are_ignored(ends: Ends) -> None:
    bob = ends.new("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"", bob.address)
        stranger.sendto(b"x", bob.address)
        await bob.datagrams(1)

    assert bob.received == [b"x"]


@pytest_twisted.ensureDeferred
async def test_the_largest_datagram_arrives_whole(ends: Ends) -> None:
    alice, bob = ends.new("127.0.0.1"), ends.new("127.0.0.1")
    payload = bytes(65_507)

    alice.transport.send(Transmit(bob.address, payload))
    await bob.datagrams(1)

    assert bob.received == [payload]


@pytest_twisted.ensureDeferred
async def test_a_turn_hands_up_a_bounded_number_of_batches(ends: Ends) -> None:
    bob = ends.new("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for number in range(100):
            stranger.sendto(bytes(1 + number), bob.address)

    bob.transport.doRead()

    assert 1 <= len(bob.batches) <= UdpTransport.MAX_BATCHES


@pytest_twisted.ensureDeferred
async def test_a_turn_ends_once_its_time_is_used_up(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UdpTransport, "MAX_TURN", 0.0)
    bob = ends.new("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"1", bob.address)
        stranger.sendto(b"22", bob.address)

    bob.transport.doRead()

    assert bob.received == [b"1"]


@pytest_twisted.ensureDeferred
async def test_datagrams_lost_to_a_full_receive_buffer_are_known_from_the_next_batch(ends: Ends) -> None:
    bob = ends.new("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for _ in range(2 * bob.transport.features.receive_buffer // 65_000):
            stranger.sendto(bytes(60_000), bob.address)
        await bob.datagrams(10)
        stranger.sendto(b"after", bob.address)
        while b"after" not in bob.received:
            await bob.datagrams(len(bob.received) + 1)

    assert bob.transport.counters.receive_overflows > 0


@pytest_twisted.ensureDeferred
async def test_an_error_in_the_protocol_closes_the_socket_and_is_reported(ends: Ends) -> None:
    alice, bob = ends.new("127.0.0.1"), ends.new("127.0.0.1")
    bob.error = ZeroDivisionError()

    alice.transport.send(Transmit(bob.address, b"x"))
    reason = await bob.lost

    assert reason is bob.error
    assert bob.transport.fileno() == -1


class End:
    """A batch protocol that keeps what it receives."""

    transport: UdpTransport

    def __init__(self) -> None:
        self.batches: list[DatagramBatch] = []
        self.received: list[bytes] = []
        self.lost: Deferred[BaseException] = Deferred()
        self.error: Exception | None = None
        self._waiting: tuple[int, Deferred[None]] | None = None

    @property
    def address(self) -> SocketAddress:
        return self.transport.getHost()

    def datagrams(self, count: int) -> Deferred[None]:
        """Fires once this many datagrams have been received."""
        arrived: Deferred[None] = Deferred()
        self._waiting = (count, arrived)
        self._check()
        return arrived

    def makeConnection(self, transport: UdpTransport) -> None:
        self.transport = transport

    def batchReceived(self, batch: DatagramBatch) -> None:
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        self.received += map(bytes, batch.rows.each())
        self._check()

    def sendingPaused(self) -> None:
        pass

    def sendingResumed(self) -> None:
        pass

    def connectionLost(self, reason: Failure) -> None:
        self.lost.callback(reason.value)

    def _check(self) -> None:
        if self._waiting is not None and len(self.received) >= self._waiting[0]:
            _, arrived = self._waiting
            self._waiting = None
            arrived.callback(None)


class Ends:
    def __init__(self) -> None:
        self._ends: list[End] = []

    def new(self, host: str, *, port: int = 0, **options: Any) -> End:
        from twisted.internet import reactor

        end = End()
        UdpTransport(reactor, end, host=host, port=port, **options)
        self._ends.append(end)
        return end

    def close(self) -> None:
        for end in self._ends:
            end.transport.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()

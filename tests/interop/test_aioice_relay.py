"""aioice's TURN client and its ICE agent against our relay, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aioice import Connection, TransportPolicy, turn

from tests.polling import until
from tests.service.relay_process import PASSWORD, USER, RelayProcess, address_of, udp

_PEER_HOST = "127.0.0.3"
_PATIENCE = 20.0
_SIZES = [1, 3, 4, 101, 1200]


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    relay = RelayProcess(tmp_path, "--drain-time", "0s", "--lowest-port", "56000", "--highest-port", "56999")
    with contextlib.closing(relay):
        relay.wait_ready()
        yield relay


def test_its_channels_carry_data_to_a_peer_and_back(relay: RelayProcess) -> None:
    asyncio.run(asyncio.wait_for(_talk_to_a_peer(relay.port), _PATIENCE))

    until(lambda: "relay:allocation_closed" in relay.log.read_text())  # it took its leave


def test_two_of_its_clients_meet_at_their_relayed_addresses(relay: RelayProcess) -> None:
    asyncio.run(asyncio.wait_for(_talk_to_each_other(relay.port), _PATIENCE))


def test_its_agents_connect_by_relayed_candidates_alone(relay: RelayProcess) -> None:
    asyncio.run(asyncio.wait_for(_connect(relay.port), _PATIENCE))


async def _talk_to_a_peer(port: int) -> None:
    with udp(_PEER_HOST) as peer:
        async with _client(port) as client:
            for size in _SIZES:
                client.transport.sendto(b"x" * size, address_of(peer))
                data, source = await asyncio.to_thread(peer.recvfrom, 2000)
                assert (len(data), source) == (size, client.address)

                peer.sendto(b"y" * size, source)
                assert await client.received.get() == (b"y" * size, tuple(address_of(peer)))


async def _talk_to_each_other(port: int) -> None:
    async with _client(port) as one, _client(port) as two:
        while one.received.empty() or two.received.empty():  # what comes before both have bound a channel is dropped
            one.transport.sendto(b"one's", two.address)
            two.transport.sendto(b"two's", one.address)
            await asyncio.sleep(0.05)

        assert await two.received.get() == (b"one's", one.address)
        assert await one.received.get() == (b"two's", two.address)


async def _connect(port: int) -> None:
    agents = [
        Connection(
            ice_controlling=is_controlling,
            turn_server=("127.0.0.1", port),
            turn_username=USER,
            turn_password=PASSWORD,
            transport_policy=TransportPolicy.RELAY,
            use_ipv6=False,
        )
        for is_controlling in (True, False)
    ]
    one, two = agents
    await asyncio.gather(*(agent.gather_candidates() for agent in agents))
    for agent, other in ((one, two), (two, one)):
        assert [candidate.type for candidate in other.local_candidates] == ["relay"]
        agent.remote_username, agent.remote_password = other.local_username, other.local_password
        for candidate in [*other.local_candidates, None]:
            await agent.add_remote_candidate(candidate)
    await asyncio.gather(*(agent.connect() for agent in agents))

    for size in _SIZES:
        await one.send(b"x" * size)
        assert await two.recv() == b"x" * size
        await two.send(b"y" * size)
        assert await one.recv() == b"y" * size
    await asyncio.gather(*(agent.close() for agent in agents))


class _Client(asyncio.DatagramProtocol):
    """What stands on aioice's TURN transport, which looks like a socket at the relayed address."""

    transport: asyncio.DatagramTransport
    address: tuple[str, int]

    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue()
        self.closed = asyncio.Event()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.received.put_nowait((data, addr))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


@contextlib.asynccontextmanager
async def _client(port: int) -> AsyncIterator[_Client]:
    transport, protocol = await turn.create_turn_endpoint(
        _Client, server_addr=("127.0.0.1", port), username=USER, password=PASSWORD
    )
    assert isinstance(protocol, _Client)
    protocol.transport, protocol.address = transport, transport.get_extra_info("sockname")
    yield protocol
    transport.close()
    await protocol.closed.wait()

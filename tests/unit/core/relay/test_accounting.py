"""For any behaviour of clients, sockets match the allocations, and nothing is left at the end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.relay.port_range import QUARANTINE, PortRange
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import FAMILY_IPV4, FAMILY_IPV6
from tests.hypothesis_profiles import examples
from tests.unit.core.relay.world import Client, World, code_of

_PEERS = [SocketAddress("8.8.8.8", 1), SocketAddress("8.8.8.8", 2), SocketAddress("2a02:2::2", 1)]
_FAMILIES = [
    (),
    ((stun.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV4),),
    ((stun.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6),),
    ((stun.ADDITIONAL_ADDRESS_FAMILY, FAMILY_IPV6),),
    ((stun.EVEN_PORT, True),),
    ((stun.EVEN_PORT, False),),
]
_STEPS = st.one_of(
    st.tuples(st.just("allocate"), st.sampled_from(_FAMILIES)),
    st.tuples(st.just("refresh"), st.sampled_from([0, 600, 1000, 3600]), st.sampled_from(_FAMILIES[:3])),
    st.tuples(st.just("bind"), st.integers(0x4000, 0x4003), st.sampled_from(_PEERS)),
    st.tuples(st.just("permit"), st.lists(st.sampled_from(_PEERS), min_size=1, max_size=3)),
    st.tuples(st.just("advance"), st.sampled_from([1, 29, 31, 300, 599, 601])),
    st.tuples(st.just("occupy"), st.booleans()),
)


@given(st.lists(st.tuples(st.integers(0, 3), _STEPS), max_size=40))
@settings(max_examples=examples(150))
def test_allocations_channels_permissions_ports_and_sockets_come_and_go_together(
    steps: list[tuple[int, tuple[object, ...]]],
) -> None:
    world = World(lowest_port=50_000, highest_port=50_007)
    clients = [Client(world, SocketAddress("5.5.5.5", 1000 + number)) for number in range(4)]

    for number, step in steps:
        _do(world, clients[number], *step)

        registry = world.server._registry
        allocations = [
            allocation for client in clients if (allocation := registry.by_client(client.address)) is not None
        ]
        assert world.open == {(allocation.port, family) for allocation in allocations for family in allocation.relayed}
        assert len({allocation.port for allocation in allocations}) == world.server.allocations == len(allocations)
        quota = world.server._allocator.quota
        assert quota.channels == sum(len(allocation.channels) for allocation in allocations)
        assert quota.permissions == sum(len(allocation.permissions) for allocation in allocations)
        assert all(
            set(allocation.channels_by_peer.values()) == set(allocation.channels.values()) for allocation in allocations
        )

    world.advance(3600 + QUARANTINE)
    assert (world.server.allocations, world.open) == (0, set())
    assert (quota.channels, quota.permissions) == (0, 0) if steps else True
    assert world.server.next_timeout() is None
    world.occupied = lambda port: False
    again = [Client(world, SocketAddress("5.5.5.6", 1000 + number)) for number in range(8)]
    assert [code_of(client.allocate()) for client in again] == [0] * 8


@given(
    st.integers(1, 65_535), st.integers(0, 40), st.lists(st.sampled_from(["any", "even", "pair", "free"]), max_size=60)
)
def test_no_port_is_given_twice(lowest: int, more: int, wishes: list[str]) -> None:
    world = World()
    ports = PortRange(range(lowest, min(65_536, lowest + more + 1)), world.entropy)
    taken: list[int] = []

    for now, wish in enumerate(wishes):
        if wish == "free":
            if taken:
                ports.release(taken.pop(0), float(now))
            continue
        port = ports.take(float(now), even=wish != "any", with_next=wish == "pair")
        if port is None:
            assert wish != "any" or len(taken) == len(ports.ours)
            continue
        new = [port, port + 1] if wish == "pair" else [port]
        assert not set(new) & set(taken)
        assert all(lowest <= port <= lowest + more for port in new)
        assert wish == "any" or port % 2 == 0
        taken += new


def _do(world: World, client: Client, name: str, *arguments: object) -> None:
    match name, arguments:
        case "allocate", (attributes,):
            client.allocate(*attributes)
        case "refresh", (lifetime, attributes):
            client.refresh(lifetime, *attributes)
        case "bind", (number, peer):
            client.bind(number, peer)
        case "permit", (peers,):
            client.permit(*peers)
        case "advance", (seconds,):
            client.nonce = None
            world.advance(seconds)
        case "occupy", (occupied,):
            world.occupied = lambda port: bool(occupied) and port % 3 == 0

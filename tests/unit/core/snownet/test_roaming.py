"""Addresses change: paths follow, and every connection recovers after a moment."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.ice.candidate import parse_sdp
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import (
    ConnectionEstablished,
    ConnectionFailed,
    InvalidatedCandidates,
    NewCandidates,
    PathChanged,
)
from tests.unit.core.snownet.world import (
    INITIATION,
    LATENCY,
    Host,
    World,
    assert_traffic_flows,
    connected,
    datagram,
)

_ELSEWHERE = SocketAddress("10.0.7.1", 52625)


@pytest.mark.parametrize("roaming", ["client", "gateway"])
def test_a_peer_that_moves_is_reached_at_its_new_address_within_2_seconds(roaming: str) -> None:
    world, client, gateway = connected(seconds=10.0)
    client.send(gateway, datagram("busy"))

    world.hosts[roaming].move("10.0.7.1")
    took = _run_until_packets_pass(world)

    assert took < 2.0
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert client.path(gateway) == gateway.path(client)[::-1]
    assert _ELSEWHERE in client.path(gateway)
    assert_traffic_flows(world, client, gateway)


def test_a_move_while_idle_is_noticed_within_2_seconds() -> None:
    world, _client, gateway = connected(seconds=120.0)

    gateway.move("10.0.7.1")

    assert _run_until_packets_pass(world) < 2.0


def test_the_old_address_is_withdrawn_and_the_new_address_signalled() -> None:
    _world, _client, gateway = connected(seconds=10.0)
    gateway.events.clear()

    gateway.move("10.0.7.1")

    (gone,), (new,) = gateway.of(InvalidatedCandidates), gateway.of(NewCandidates)
    assert [_host(text) for text in gone.candidates] == ["10.0.2.1"]
    assert [_host(text) for text in new.candidates] == ["10.0.7.1"]


def test_an_address_that_was_never_signalled_is_withdrawn_too() -> None:
    world, client, gateway = connected(seconds=10.0)
    gateway.events.clear()
    addresses = (*gateway.addresses, _ELSEWHERE)
    gateway.node.set_local_addresses(addresses, world.now)
    gateway.node.set_local_addresses(gateway.addresses, world.now)
    gateway.drain()

    assert gateway.of(NewCandidates) == []
    assert [_host(text) for event in gateway.of(InvalidatedCandidates) for text in event.candidates] == ["10.0.7.1"]
    assert_traffic_flows(world, client, gateway)


def test_repeated_addresses_change_nothing() -> None:
    world, _client, gateway = connected(seconds=10.0)
    gateway.events.clear()

    gateway.move("10.0.2.1")
    world.run(5.0)

    assert gateway.events == []


def test_an_additional_address_that_is_better_is_used() -> None:
    world = World()
    client, gateway = world.client("client", "10.0.1.1", "2001:db8:1::1"), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))
    world.run(3.0)
    gateway.events.clear()

    gateway.move("10.0.2.1", "2001:db8:2::1")
    world.run(2.0)

    ipv6 = (SocketAddress("2001:db8:1::1", 52625), SocketAddress("2001:db8:2::1", 52625))
    assert client.path(gateway) == ipv6
    assert gateway.path(client) == ipv6[::-1]
    assert len(client.of(PathChanged)) == 1
    assert_traffic_flows(world, client, gateway)


def test_a_change_of_path_loses_no_packets_and_keeps_the_connection() -> None:
    world = World()
    client = world.client("client", "10.0.1.1", "2001:db8:1::1")
    gateway = world.gateway("gateway", "10.0.2.1", "2001:db8:2::1")
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))
    world.run(30.0)
    gateway.packets.clear()
    for number in range(60):
        if number == 20:
            client.move("10.0.1.1")  # IPv6 is gone, the other path works already
            world.run(0.0)
        client.send(gateway, datagram(str(number)))
        world.run(0.1)

    assert client.path(gateway)[0].host == "10.0.1.1"
    assert gateway.texts() == [str(number) for number in range(60)]
    assert len(client.of(ConnectionEstablished)) == len(gateway.of(ConnectionEstablished)) == 1


def test_a_new_path_makes_the_client_shake_hands_but_not_more_than_once_in_20_seconds() -> None:
    world, client, gateway = connected(seconds=30.0)
    client.send(gateway, datagram("busy"))

    for last in range(2, 6):
        client.move(f"10.0.7.{last}")
        world.run(2.0)

    assert len(client.messages(INITIATION)) <= 3  # the first, then a single one for all four paths, perhaps repeated
    assert gateway.messages(INITIATION) == []


def test_a_connection_recovers_from_a_while_without_any_address() -> None:
    world, client, gateway = connected(seconds=10.0)
    client.send(gateway, datagram("busy"))
    client.move()
    world.run(8.0)

    client.move("10.0.7.1")

    assert _run_until_packets_pass(world) < 2.0


def test_candidates_that_the_portal_lost_are_signalled_again_on_demand() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.portal_is_up = False
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))
    world.run(5.0)
    assert gateway.texts() == []

    world.portal_is_up = True
    for host in (client, gateway):
        host.node.announce()
        host.drain()
    world.run(1.0)

    assert gateway.texts() == ["hello"]


def test_an_address_withdrawn_while_the_portal_was_away_is_withdrawn_again_on_demand() -> None:
    world, _client, gateway = connected(seconds=10.0)
    world.portal_is_up = False
    gateway.move("10.0.7.1")
    world.portal_is_up = True

    assert _taken_back_on_demand(gateway) == ["10.0.2.1"]
    gateway.move("10.0.2.1")
    assert _taken_back_on_demand(gateway) == ["10.0.7.1"]


def test_a_new_connection_gets_the_current_addresses() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    client.move("10.0.7.1")
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))
    world.run(1.0)

    assert client.path(gateway)[0] == _ELSEWHERE


def _taken_back_on_demand(host: Host) -> list[str]:
    host.events.clear()
    host.node.announce()
    host.drain()
    return [_host(text) for event in host.of(InvalidatedCandidates) for text in event.candidates]


def _run_until_packets_pass(world: World) -> float:
    """Send both ways continuously, as applications do. Returns the longest interruption."""
    client, gateway = world.hosts["client"], world.hosts["gateway"]
    client.packets.clear()
    gateway.packets.clear()
    start = world.now
    while not (client.packets and gateway.packets):
        assert world.now < start + 20.0, "no packets pass any longer"
        client.send(gateway, datagram("ping"))
        gateway.send(client, datagram("pong"))
        world.run(LATENCY)
    return world.now - start


def _host(sdp: str) -> str:
    candidate = parse_sdp(sdp)
    assert candidate is not None
    return candidate.address.host

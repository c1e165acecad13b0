"""A host's addresses come, rotate and go, and the shell doesn't know all of them: connections go on.

A host of the simulation sends from the first of its addresses where the node names no source, as a kernel does.
"""

from __future__ import annotations

import pytest

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionFailed, InvalidatedCandidates, NewCandidates, Role
from firezone_tunnel.core.snownet.relays import RelayAllocated
from tests.simulation.internet import Internet, longest_gap, ping, way
from tests.unit.core.snownet.world import Host, datagram

FIRST, SECOND, THIRD = (SocketAddress(f"2001:db8:1::{number}", 52625) for number in (1, 2, 3))


def dual(nat: str, *, relays: int = 1) -> tuple[Internet, Host, Host]:
    """A client with one IPv6 address and a gateway, over IPv6, with traffic."""
    internet = Internet()
    for _ in range(relays):
        internet.relay(families="6")
    client = internet.host_at(FIRST.host, nat=nat, role=Role.CLIENT)
    gateway = internet.host_at("2001:db8:2::1", nat=nat, role=Role.GATEWAY)
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))
    internet.run_until(lambda: gateway.texts() == ["first"], within=1.0)
    ping(internet, client, gateway, seconds=3.0)
    client.events.clear()
    return internet, client, gateway


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("nat", ["none", "udp-blocked"])
def test_an_added_address_that_the_kernel_prefers_costs_nothing(nat: str, role: Role) -> None:
    internet, client, gateway = dual(nat)
    host = internet.hosts[role.value]
    before = way_of(client, gateway)
    start = internet.now

    internet.offer(host, SocketAddress(THIRD.host, 52625), *host.addresses)
    answers = ping(internet, client, gateway, seconds=20.0)

    assert longest_gap(answers, start, internet.now) < 0.2
    assert way_of(client, gateway) == before
    assert client.of(RelayAllocated) == []


@pytest.mark.parametrize("nat", ["none", "udp-blocked"])
def test_a_privacy_address_that_rotates_keeps_the_connection(nat: str) -> None:
    """The new one comes, the old one is deprecated, and later it is gone."""
    internet, client, gateway = dual(nat)
    before = way_of(client, gateway)
    start = internet.now
    answers = []

    internet.offer(client, SECOND, FIRST)
    answers += ping(internet, client, gateway, seconds=10.0)
    internet.offer(client, SECOND, deprecated=(FIRST,))
    answers += ping(internet, client, gateway, seconds=10.0)
    internet.offer(client, SECOND)
    answers += ping(internet, client, gateway, seconds=10.0)

    assert longest_gap(answers, start, internet.now) < (0.2 if nat == "none" else 1.0)
    assert way_of(client, gateway) == before
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []


@pytest.mark.parametrize("relays", [1, 2])
def test_a_direct_path_leads_from_an_address_that_only_relays_have_shown(relays: int) -> None:
    """A reflexive candidate is of no use without its base, whatever the shell has found on the host."""
    internet = Internet()
    for _ in range(relays):
        internet.relay()
    client, gateway = (internet.host_behind("cone", role) for role in (Role.CLIENT, Role.GATEWAY))
    for host in (client, gateway):
        host.node.set_local_addresses((), internet.now)
        host.drain()
    internet.run(1.0)
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))

    internet.run_until(lambda: gateway.texts() == ["first"], within=1.0)
    ping(internet, client, gateway, seconds=3.0)

    assert way(client, gateway) == way(gateway, client) == "direct"


def test_a_relay_that_goes_takes_nothing_that_another_still_shows() -> None:
    internet = Internet()
    relays = [internet.relay(families="4"), internet.relay(families="4")]
    client, gateway = (internet.host_behind("cone", role) for role in (Role.CLIENT, Role.GATEWAY))
    client.node.set_local_addresses((), internet.now)
    internet.run(1.0)
    internet.introduce(client, gateway)
    internet.run(3.0)

    offered = [text.split()[7] for event in client.of(NewCandidates) for text in event.candidates]
    assert sorted(offered) == ["host", "relay", "relay", "srflx"]
    allocation = client.node._relays.at_socket(relays[0].listening[0])
    assert allocation is not None
    allocation.restart(internet.now)
    client.node._relays.touch(allocation)
    client.handle_timeout()

    withdrawn = [text.split()[7] for event in client.of(InvalidatedCandidates) for text in event.candidates]
    assert withdrawn == ["relay"]


def way_of(host: Host, peer: Host) -> str:
    connection = host.node._connections[peer.name]
    assert connection.path is not None
    return connection.path.name

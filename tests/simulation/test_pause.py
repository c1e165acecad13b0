"""A host is suspended or stopped for a while: what still works is found out at once, and what doesn't begins anew."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.snownet.events import ConnectionFailed, Role
from tests.simulation.internet import Internet, Punctual, exchange, longest_gap, ping, way
from tests.unit.core.snownet.world import assert_no_slot_is_lost


def world(nat: str) -> tuple[Internet, Punctual, Punctual]:
    internet = Internet()
    internet.relay()
    client, gateway = (internet.host_behind(nat, role) for role in (Role.CLIENT, Role.GATEWAY))
    assert isinstance(client, Punctual) and isinstance(gateway, Punctual)
    internet.introduce(client, gateway)
    exchange(internet, client, gateway, within=2.0)
    ping(internet, client, gateway, seconds=3.0)
    return internet, client, gateway


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("nat", ["none", "cone", "udp-blocked"])
@pytest.mark.parametrize("seconds", [4.0, 12.0])
def test_after_a_short_pause_the_connection_goes_on(nat: str, role: Role, seconds: float) -> None:
    internet, client, gateway = world(nat)
    before = way(client, gateway)
    host = client if role is Role.CLIENT else gateway

    host.pause()
    internet.run(seconds)
    start = internet.now
    host.resume()
    answers = ping(internet, client, gateway, seconds=10.0)

    assert longest_gap(answers, start, internet.now) < 0.5
    assert way(client, gateway) == before
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []


@pytest.mark.parametrize("nat", ["none", "cone", "udp-blocked"])
@pytest.mark.parametrize("seconds", [30.0, 600.0, 8 * 3600.0])
def test_a_gateway_serves_its_clients_again_after_any_pause(nat: str, seconds: float) -> None:
    """The client has given up meanwhile, and asks the portal again."""
    internet, client, gateway = world(nat)

    gateway.pause()
    internet.run(seconds)
    assert len(client.of(ConnectionFailed)) == 1
    gateway.resume()
    internet.introduce(client, gateway)

    exchange(internet, client, gateway, within=2.0)
    ping(internet, client, gateway, seconds=30.0)
    assert_no_slot_is_lost([client, gateway])


@pytest.mark.parametrize("nat", ["none", "cone", "udp-blocked"])
@pytest.mark.parametrize("seconds", [30.0, 600.0, 8 * 3600.0])
def test_a_client_that_begins_anew_after_a_long_pause_is_served_again(nat: str, seconds: float) -> None:
    internet, client, gateway = world(nat)

    client.pause()
    internet.run(seconds)
    assert len(gateway.of(ConnectionFailed)) == 1
    client.node.reset(internet.now)
    client.resume()
    client.node.set_local_addresses(client.addresses, internet.now)
    internet.announce_relays(client, internet.relays)
    internet.introduce(client, gateway)

    exchange(internet, client, gateway, within=2.0)
    ping(internet, client, gateway, seconds=30.0)
    assert_no_slot_is_lost([client, gateway])


def test_a_relay_that_restarted_during_a_pause_is_used_again_within_a_second() -> None:
    internet, client, gateway = world("udp-blocked")

    for host in (client, gateway):
        host.pause()
    internet.run(60.0)
    internet.relays[0].restart()
    start = internet.now
    for host in (client, gateway):
        host.resume()
    answers = ping(internet, client, gateway, seconds=5.0)

    assert longest_gap(answers, start, internet.now) < 1.0
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []

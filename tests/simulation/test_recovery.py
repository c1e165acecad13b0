"""Relays disappear, fall silent or restart with another identity: connections go on (docs/decisions.md, 3)."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.snownet.events import ConnectionFailed, NewCandidates, Role
from firezone_tunnel.core.snownet.relays import RelayAllocated, RelayFailed
from tests.simulation.internet import Internet, Relay, exchange, longest_gap, ping, way
from tests.unit.core.snownet.world import Host, assert_no_slot_is_lost, datagram


def relayed(*, relays: int = 2, standard: bool = False, families: str = "46") -> tuple[Internet, Host, Host]:
    """Two hosts that need relays, after some seconds of traffic."""
    internet = Internet()
    for _ in range(relays):
        internet.relay(standard=standard, families=families)
    client, gateway = (internet.host_behind("udp-blocked", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    exchange(internet, client, gateway, within=2.0)
    ping(internet, client, gateway, seconds=5.0)
    assert way(client, gateway) == way(gateway, client) == "relayed"
    return internet, client, gateway


def in_use(internet: Internet, host: Host, peer: Host) -> Relay:
    local, _ = host.path(peer)
    return next(relay for relay in internet.relays if local.host in relay.hosts)


@pytest.mark.parametrize("whose", ["client", "gateway"])
def test_a_relay_that_is_killed_and_announced_as_gone_costs_two_seconds_at_most(whose: str) -> None:
    internet, client, gateway = relayed()
    host, peer = (client, gateway) if whose == "client" else (gateway, client)
    relay = in_use(internet, host, peer)
    relay.alive = False
    start = internet.now

    answers = ping(internet, client, gateway, seconds=1.0)
    for side in (client, gateway):
        internet.announce_relays(side, [], gone=[relay])
    answers += ping(internet, client, gateway, seconds=5.0)

    assert longest_gap(answers, start, internet.now) < 2.0
    _assert_healthy(internet, client, gateway)


def test_a_relay_that_is_taken_away_but_still_works_costs_next_to_nothing() -> None:
    internet, client, gateway = relayed()
    start = internet.now

    for host, peer in ((client, gateway), (gateway, client)):
        internet.announce_relays(host, [], gone=[in_use(internet, host, peer)])
        answers = ping(internet, client, gateway, seconds=3.0)
        assert longest_gap(answers, start, internet.now) < 1.0
        start = internet.now
    _assert_healthy(internet, client, gateway)


@pytest.mark.parametrize("whose", ["client", "gateway"])
def test_when_only_one_side_hears_that_a_relay_is_gone_the_other_follows(whose: str) -> None:
    internet, client, gateway = relayed()
    host, peer = (client, gateway) if whose == "client" else (gateway, client)
    relay = in_use(internet, host, peer)
    relay.alive = False
    start = internet.now

    internet.announce_relays(host, [], gone=[relay])
    answers = ping(internet, client, gateway, seconds=8.0)

    assert longest_gap(answers, start, internet.now) < 5.0
    _assert_healthy(internet, client, gateway)


@pytest.mark.parametrize("after", [0.0, 0.4, 0.8, 1.2])
@pytest.mark.parametrize("whose", ["client", "gateway"])
def test_a_relay_that_falls_silent_is_left_within_five_seconds(whose: str, after: float) -> None:
    internet, client, gateway = relayed()
    internet.run(after)
    host, peer = (client, gateway) if whose == "client" else (gateway, client)
    relay = in_use(internet, host, peer)
    relay.alive = False
    start = internet.now

    answers = ping(internet, client, gateway, seconds=8.0)

    assert longest_gap(answers, start, internet.now) < 5.0
    assert in_use(internet, host, peer) is not relay
    internet.run(40.0)
    _assert_healthy(internet, client, gateway)
    assert [event.rid for event in host.of(RelayFailed)] == [relay.rid]


@pytest.mark.parametrize("outage", [0.5, 3.0])
def test_a_relay_that_is_silent_for_a_moment_is_not_given_up(outage: float) -> None:
    internet, client, gateway = relayed(relays=1)
    internet.relays[0].alive = False
    internet.run(outage)
    internet.relays[0].alive = True
    start = internet.now

    answers = ping(internet, client, gateway, seconds=8.0)

    assert longest_gap(answers, start, internet.now) < 2.0
    internet.run(30.0)
    assert client.of(RelayFailed) == gateway.of(RelayFailed) == []
    _assert_healthy(internet, client, gateway)


@pytest.mark.parametrize("same_id", [True, False])
def test_a_relay_that_restarts_with_other_credentials_is_used_again_once_it_is_announced(same_id: bool) -> None:
    internet, client, gateway = relayed(relays=1)
    relay = internet.relays[0]
    gone = [] if same_id else [Relay(internet, 1)]
    relay.restart("another secret")
    relay.rid = relay.rid if same_id else "relay 1 of tomorrow"
    start = internet.now

    for side in (client, gateway):
        internet.announce_relays(side, [relay], gone=gone)
    answers = ping(internet, client, gateway, seconds=5.0)

    assert longest_gap(answers, start, internet.now) < 1.0
    _assert_healthy(internet, client, gateway)


def test_a_relay_that_restarts_with_the_same_secret_is_used_again_once_it_is_announced() -> None:
    internet, client, gateway = relayed(relays=1)
    internet.relays[0].restart()
    start = internet.now

    for side in (client, gateway):
        internet.announce_relays(side, internet.relays)
    answers = ping(internet, client, gateway, seconds=5.0)

    assert longest_gap(answers, start, internet.now) < 1.0
    _assert_healthy(internet, client, gateway)


def test_an_unnoticed_restart_of_a_relay_is_detected_before_the_connection_fails() -> None:
    internet, client, gateway = relayed(relays=1)
    for _ in range(2):  # the second time no check asks for a channel, which would detect it by chance
        internet.relays[0].restart()
        for _ in range(40):
            client.send(gateway, datagram("ping"))
            internet.run(0.5)

    _assert_healthy(internet, client, gateway)


def test_repeated_updates_of_relays_do_not_harm_traffic() -> None:
    internet, client, gateway = relayed()
    start = internet.now
    answers = []
    for _ in range(5):
        for host in (client, gateway):
            internet.announce_relays(host, internet.relays)
        answers += ping(internet, client, gateway, seconds=4.0)

    assert longest_gap(answers, start, internet.now) < 0.2
    assert len(client.of(RelayAllocated)) == 2 * 2  # of each relay an address of each family
    _assert_healthy(internet, client, gateway)


def test_the_newest_of_many_relays_are_kept_and_allocations_at_the_oldest_are_deleted() -> None:
    internet, client, gateway = relayed()
    start = internet.now
    answers = []
    for _ in range(2):
        newest = [internet.relay(), internet.relay()]
        for host in (client, gateway):
            internet.announce_relays(host, newest)
        answers += ping(internet, client, gateway, seconds=5.0)

    assert longest_gap(answers, start, internet.now) < 1.0
    assert [relay.server.allocations for relay in internet.relays] == [0, 0, 2, 2, 2, 2]
    _assert_healthy(internet, client, gateway)


def test_standard_turn_servers_carry_connections_too() -> None:
    internet, client, gateway = relayed(standard=True)
    relay = in_use(internet, client, gateway)
    start = internet.now
    relay.alive = False

    answers = ping(internet, client, gateway, seconds=10.0)

    assert longest_gap(answers, start, internet.now) < 5.0
    _assert_healthy(internet, client, gateway)


def test_relays_that_never_answer_are_reported_and_do_not_hinder_a_direct_connection() -> None:
    internet = Internet()
    for _ in range(2):
        internet.relay().alive = False
    client, gateway = (internet.host_behind("none", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))
    internet.run(0.2)
    assert gateway.texts() == ["first"]

    ping(internet, client, gateway, seconds=20.0)

    assert way(client, gateway) == way(gateway, client) == "direct"
    for host in (client, gateway):
        assert [event.is_last for event in host.of(RelayFailed)] == [False, True]
        assert "did not answer" in host.of(RelayFailed)[0].reason


def test_without_any_relay_connections_between_nats_fail_and_report_it() -> None:
    internet = Internet()
    client, gateway = (internet.host_behind("cone", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))

    internet.run(30.0)

    assert len(client.of(ConnectionFailed)) == len(gateway.of(ConnectionFailed)) == 1
    assert client.of(RelayFailed) == gateway.of(RelayFailed) == []


def test_a_relay_that_comes_later_rescues_a_connection_that_found_no_path() -> None:
    internet = Internet()
    client, gateway = (internet.host_behind("udp-blocked", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))
    internet.run(8.0)

    internet.relay()
    for side in (client, gateway):
        internet.announce_relays(side, internet.relays)

    assert internet.run_until(lambda: gateway.texts() == ["first"], within=1.0) < 0.4
    _assert_healthy(internet, client, gateway)


@pytest.mark.parametrize("families", ["4", "6"])
def test_relays_of_one_family_carry_hosts_of_that_family(families: str) -> None:
    internet = Internet()
    internet.relay(families=families), internet.relay(families=families)
    if families == "4":
        client, gateway = (internet.host_behind("udp-blocked", role) for role in (Role.CLIENT, Role.GATEWAY))
    else:
        client = internet.host_at("2001:db8:1::1", nat="udp-blocked", role=Role.CLIENT)
        gateway = internet.host_at("2001:db8:2::1", nat="udp-blocked", role=Role.GATEWAY)
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))

    assert internet.run_until(lambda: bool(gateway.texts()), within=1.0) < 0.4
    ping(internet, client, gateway, seconds=20.0)
    _assert_healthy(internet, client, gateway)


@pytest.mark.parametrize("nat", ["none", "cone", "udp-blocked"])
@pytest.mark.parametrize("ipv6_side", [Role.CLIENT, Role.GATEWAY])
def test_an_ipv6_host_and_an_ipv4_host_meet_at_a_dual_stack_relay(ipv6_side: Role, nat: str) -> None:
    internet = Internet()
    internet.relay(), internet.relay()
    other = Role.GATEWAY if ipv6_side is Role.CLIENT else Role.CLIENT
    hosts = {
        ipv6_side: internet.host_at("2001:db8:1::1", nat="none", role=ipv6_side),
        other: internet.host_behind(nat, other),
    }
    client, gateway = hosts[Role.CLIENT], hosts[Role.GATEWAY]
    internet.introduce(client, gateway)
    client.send(gateway, datagram("first"))

    internet.run_until(lambda: bool(gateway.texts()), within=1.0)
    start = internet.now
    answers = ping(internet, client, gateway, seconds=20.0)

    assert longest_gap(answers, start, internet.now) < 0.2
    assert way(client, gateway) == way(gateway, client) == "relayed"
    _assert_healthy(internet, client, gateway)


def test_a_second_connection_made_later_gets_the_candidates_of_all_relays() -> None:
    internet, _client, gateway = relayed()
    late = internet.host_behind("udp-blocked", Role.CLIENT, name="late")
    internet.run(1.0)
    gateway.events.clear()
    internet.introduce(late, gateway)
    late.send(gateway, datagram("first"))

    assert internet.run_until(lambda: bool(gateway.texts(late)), within=1.0) < 0.25

    candidates = [text for event in gateway.of(NewCandidates) if event.peer_id == "late" for text in event.candidates]
    assert {text.split()[4] for text in candidates if " relay " in text} == {
        host for relay in internet.relays for host in relay.hosts
    }


def _assert_healthy(internet: Internet, client: Host, gateway: Host) -> None:
    exchange(internet, client, gateway, within=1.0)
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert_no_slot_is_lost([client, gateway])

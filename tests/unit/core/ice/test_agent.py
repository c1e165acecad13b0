"""Two agents find a path, keep it, and replace it when it fails or a better path appears."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.ice.agent import AgentState
from firezone_tunnel.core.ice.candidate import Candidate
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, short_term_key
from tests.hypothesis_profiles import examples
from tests.unit.core.ice.world import (
    CLIENT,
    CLIENT_HOST,
    CLIENT_RELAYED,
    CLIENT_V6,
    GATEWAY,
    GATEWAY_HOST,
    GATEWAY_RELAYED,
    GATEWAY_V6,
    LATENCY,
    Route,
    Side,
    World,
    nothing,
    offer_hosts,
    offer_relayed,
    straight,
)


def test_two_hosts_connect_within_a_few_round_trips() -> None:
    world = World()
    offer_hosts(world)

    took = world.run_until(world.are_connected, within=1.0)

    assert took <= 6 * LATENCY
    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)
    assert world.gateway.path == (GATEWAY_HOST, CLIENT_HOST)
    assert [change.state for change in world.client.states] == [AgentState.CHECKING, AgentState.COMPLETED]


def test_checks_carry_what_upstream_expects_in_its_order() -> None:
    world = World()
    offer_hosts(world)
    world.run(1.0)

    first = world.client.checks()[0].message
    assert [attribute.name for attribute, _ in first.attributes] == ["USERNAME", "ICE-CONTROLLING", "PRIORITY"]
    assert first.get(stun.USERNAME) == f"{GATEWAY.ufrag}:{CLIENT.ufrag}"
    assert first.get(stun.PRIORITY) == 1862270719
    assert first.is_authentic(short_term_key(GATEWAY.password))
    nominating = world.client.checks(nominating=True)[0].message
    assert [attribute.name for attribute, _ in nominating.attributes][-1] == "USE-CANDIDATE"
    assert world.gateway.checks()[0].message.get(stun.ICE_CONTROLLED) is not None
    assert world.gateway.checks(nominating=True) == []


def test_an_answer_names_the_source_of_the_check_and_is_signed_with_our_own_password() -> None:
    world = World()
    offer_hosts(world)
    world.run(1.0)

    answers = [
        answer for answer in world.sent if answer.sender is world.gateway and answer.message.kind is Kind.SUCCESS
    ]
    assert answers != []
    for answer in answers:
        assert answer.message.get(stun.XOR_MAPPED_ADDRESS) == CLIENT_HOST
        assert answer.message.is_authentic(short_term_key(GATEWAY.password))
        assert answer.source == GATEWAY_HOST


def test_every_check_has_its_own_id_with_the_agents_prefix() -> None:
    world = World()
    offer_hosts(world)
    world.run(30.0)

    ids = [check.message.transaction_id for check in world.client.checks()]
    assert len(set(ids)) == len(ids) > 15
    assert {transaction_id[:4] for transaction_id in ids} == {world.client.agent.transaction_prefix}


def test_a_probe_checks_every_pair_at_once() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(10.0)
    world.client.agent.set_idle(True, world.now)
    world.run(1.0)
    world.sent.clear()
    start = world.now

    world.client.agent.probe(world.now)
    world.run(0.01)

    checked = {(check.source, check.destination) for check in world.client.checks() if check.at == start}
    assert {(CLIENT_HOST, GATEWAY_HOST), (CLIENT_RELAYED, GATEWAY_RELAYED)} <= checked


def test_all_working_pairs_are_checked_for_as_long_as_the_agents_live() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(120.0)

    for source, destination in ((CLIENT_HOST, GATEWAY_HOST), (CLIENT_RELAYED, GATEWAY_RELAYED)):
        times = [
            check.at for check in world.client.checks() if (check.source, check.destination) == (source, destination)
        ]
        assert times[-1] > world.now - 2.0
        assert max(after - before for before, after in pairwise(times)) <= 1.6


def test_the_controlling_side_sends_use_candidate_only_on_checks_of_its_pair() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(5.0)
    world.sent.clear()
    world.run(20.0)

    for check in world.client.checks():
        is_used = (check.source, check.destination) == (CLIENT_HOST, GATEWAY_HOST)
        assert (check.message.get(stun.USE_CANDIDATE) is not None) == is_used


def test_ipv6_is_preferred_among_host_candidates() -> None:
    world = World()
    offer_hosts(world)
    world.client.offer(Candidate.host(CLIENT_V6))
    world.gateway.offer(Candidate.host(GATEWAY_V6))
    world.run(2.0)

    assert world.client.path == (CLIENT_V6, GATEWAY_V6)
    assert world.gateway.path == (GATEWAY_V6, CLIENT_V6)


def test_a_better_pair_that_works_later_is_nominated_instead() -> None:
    world = World()
    offer_relayed(world)
    world.run(5.0)
    assert world.client.path == (CLIENT_RELAYED, GATEWAY_RELAYED)
    assert world.gateway.path == (GATEWAY_RELAYED, CLIENT_RELAYED)

    offer_hosts(world)
    world.run(2.0)

    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)
    assert world.gateway.path == (GATEWAY_HOST, CLIENT_HOST)
    assert [nomination[1:] for nomination in world.client.nominated][-1] == (CLIENT_HOST, GATEWAY_HOST)


def test_a_nomination_is_reported_once() -> None:
    world = World()
    offer_hosts(world)
    world.run(60.0)

    assert len(world.client.nominated) == len(world.gateway.nominated) == 1


def test_states_show_whether_other_pairs_are_left() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(5.0)
    assert world.client.agent.state is AgentState.CONNECTED

    world.route = lambda sender, source, destination: (
        (source, destination) if {source, destination} == {CLIENT_HOST, GATEWAY_HOST} else None
    )
    world.run(30.0)

    assert world.client.agent.state is AgentState.COMPLETED
    assert world.gateway.agent.state is AgentState.COMPLETED


def test_a_dead_path_is_replaced_by_a_working_path_within_5_seconds_on_both_sides() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(30.0)

    world.route = _without_hosts
    world.run_until(lambda: world.client.path == (CLIENT_RELAYED, GATEWAY_RELAYED), within=5.0)
    world.run_until(lambda: world.gateway.path == (GATEWAY_RELAYED, CLIENT_RELAYED), within=5.0)

    assert AgentState.DISCONNECTED not in [change.state for change in world.client.states]


def test_a_dead_path_is_not_replaced_by_a_path_that_died_of_the_same_cause() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    fallback = world.client.offer(Candidate.relayed(SocketAddress("198.51.100.2", 50001)))
    world.run(30.3)
    count = len(world.client.nominated)

    # All but what leaves from the second relay is gone.
    world.route = lambda sender, source, destination: (
        (source, destination) if fallback.address in {source, destination} else None
    )
    world.run(8.0)

    assert {source for _, source, _ in world.client.nominated[count:]} == {fallback.address}
    assert world.client.path is not None
    assert world.gateway.path == world.client.path[::-1]


def test_a_path_that_comes_back_is_used_again() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(30.0)
    healthy = world.route
    world.route = _without_hosts
    world.run(6.0)
    world.route = healthy
    world.run(5.0)

    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)
    assert world.gateway.path == (GATEWAY_HOST, CLIENT_HOST)


def test_heavy_loss_alone_costs_no_path() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(10.0)
    chance = random.Random(1)
    world.route = lambda sender, source, destination: None if chance.random() < 0.4 else (source, destination)
    world.run(60.0)

    assert world.are_connected()
    assert AgentState.DISCONNECTED not in [change.state for side in world.sides for change in side.states]


@pytest.mark.parametrize("dead", ["client", "gateway"])
def test_an_agent_notices_a_dead_peer_within_the_checks_of_a_pair(dead: str) -> None:
    world = World()
    offer_hosts(world)
    world.run(40.0)
    survivor = world.gateway if dead == "client" else world.client
    survivor.other.is_mute = True

    took = world.run_until(lambda: survivor.agent.state is AgentState.DISCONNECTED, within=20.0)

    assert 13.0 < took <= 15.25 + 1.5 + 0.02
    assert survivor.path is None


def test_agents_that_never_hear_each_other_are_disconnected_after_15_and_a_quarter_seconds() -> None:
    world = World()
    world.route = nothing
    offer_hosts(world)
    start = world.now
    world.run(30.0)

    for side in world.sides:
        assert [change.state for change in side.states] == [AgentState.CHECKING, AgentState.DISCONNECTED]
        assert side.states[-1].at - start == pytest.approx(15.25)
        assert side.agent.next_timeout() is None


def test_one_direction_alone_makes_no_path() -> None:
    world = World()
    world.route = lambda sender, source, destination: (source, destination) if sender.name == "client" else None
    offer_hosts(world)
    world.run(30.0)

    assert world.client.path is None
    assert world.client.agent.state is AgentState.DISCONNECTED
    assert world.gateway.path is None  # it was never nominated


@pytest.mark.parametrize("idle", ["client", "gateway", "both"])
def test_an_idle_agent_checks_every_25_seconds_and_stays_connected(idle: str) -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(10.0)
    sides = [side for side in world.sides if idle in {side.name, "both"}]
    for side in sides:
        side.agent.set_idle(True, world.now)
    world.run(30.0)
    world.sent.clear()
    world.run(300.0)

    for side in sides:
        pairs = {(check.source, check.destination) for check in side.checks()}
        assert len(side.checks()) == 12 * len(pairs)
    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)
    assert world.gateway.path == (GATEWAY_HOST, CLIENT_HOST)


def test_an_idle_agent_notices_a_dead_peer_within_its_checks_and_quickly_once_it_has_traffic() -> None:
    world = World()
    offer_hosts(world)
    world.run(10.0)
    world.client.agent.set_idle(True, world.now)
    world.gateway.is_mute = True

    world.run(50.0)
    assert world.client.path is not None
    world.client.agent.set_idle(False, world.now)

    world.run_until(lambda: world.client.agent.state is AgentState.DISCONNECTED, within=17.0)


def test_after_being_idle_an_agent_returns_to_its_former_pace() -> None:
    world = World()
    offer_hosts(world)
    world.run(10.0)
    world.client.agent.set_idle(True, world.now)
    world.run(100.0)
    world.client.agent.set_idle(False, world.now)
    world.sent.clear()
    world.run(15.0)

    assert 9 <= len(world.client.checks()) <= 13


def test_a_new_candidate_leads_out_of_disconnected() -> None:
    world = World()
    world.route = lambda sender, source, destination: (
        (source, destination) if CLIENT_V6 in {source, destination} else None
    )
    offer_hosts(world)
    world.gateway.offer(Candidate.host(GATEWAY_V6))
    world.run(20.0)
    assert world.client.agent.state is AgentState.DISCONNECTED

    world.client.offer(Candidate.host(CLIENT_V6))
    world.run(2.0)

    assert world.client.path == (CLIENT_V6, GATEWAY_V6)
    assert world.client.agent.state is AgentState.COMPLETED


def test_neither_side_disconnects_while_one_side_has_no_candidates() -> None:
    world = World()
    world.client.offer(Candidate.host(CLIENT_HOST))
    world.run(60.0)

    assert [change.state for side in world.sides for change in side.states] == []


def test_as_soon_as_the_peer_is_heard_it_is_checked_again() -> None:
    world = World()
    world.route = lambda sender, source, destination: (
        (source, destination) if sender.name == "gateway" and world.now > 103.0 else None
    )
    offer_hosts(world)
    world.run_until(lambda: world.client.seen != [], within=6.0)
    heard_at = world.client.seen[0].at

    assert heard_at in [check.at for check in world.client.checks()]


@settings(max_examples=examples(40))
@given(st.integers(0, 2**32), st.floats(0.0, 0.3))
def test_with_loss_they_connect_and_after_an_outage_they_agree_on_a_path_again(seed: int, loss: float) -> None:
    world = World()
    chance = random.Random(seed)
    world.route = lambda sender, source, destination: None if chance.random() < loss else (source, destination)
    offer_hosts(world)
    offer_relayed(world)
    world.run_until(world.are_connected, within=15.0)
    world.run(chance.uniform(0.0, 30.0))
    world.route = nothing
    world.run(chance.uniform(0.0, 4.0))
    world.route = straight
    world.run(10.0)

    assert world.client.path is not None
    assert world.gateway.path == world.client.path[::-1]


def _without_hosts(sender: Side, source: SocketAddress, destination: SocketAddress) -> Route:
    return None if {source, destination} & {CLIENT_HOST, GATEWAY_HOST} else (source, destination)


def test_a_nomination_is_reported_at_once_although_the_answer_to_another_check_follows() -> None:
    world = World()
    world.route = lambda sender, source, destination: None
    world.client.offer(Candidate.host(CLIENT_HOST))
    world.gateway.offer(Candidate.host(GATEWAY_HOST))
    world.run(0.3)
    first, second = world.client.checks()
    answers = []
    for check in (first, second):
        world.gateway.agent.handle_message(check.message, CLIENT_HOST, GATEWAY_HOST, world.now)
        answers += [stun.parse(transmit.payload) for transmit in world.gateway.agent.transmits()]

    for answer in answers:
        assert answer is not None
        world.client.agent.handle_message(answer, GATEWAY_HOST, CLIENT_HOST, world.now)

    sent = [stun.parse(transmit.payload) for transmit in world.client.agent.transmits()]
    assert any(message is not None and message.get(stun.USE_CANDIDATE) for message in sent)

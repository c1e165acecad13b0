"""Adding and removing candidates: signalled, optimistic and peer-reflexive."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.ice.agent import MAX_REMOTE_ADDRESSES, AgentState
from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind
from firezone_tunnel.core.sansio import SocketAddress
from tests.unit.core.ice.world import (
    CLIENT,
    CLIENT_HOST,
    CLIENT_V6,
    GATEWAY,
    GATEWAY_HOST,
    GATEWAY_RELAYED,
    LATENCY,
    STRANGER,
    Nat,
    World,
    forget,
    offer_hosts,
    offer_relayed,
    remote_addresses,
)


def test_a_local_candidate_is_added_once() -> None:
    world = World()
    added = world.client.offer(Candidate.host(CLIENT_HOST))

    assert added.ufrag == CLIENT.ufrag
    assert world.client.agent.add_local_candidate(Candidate.host(CLIENT_HOST), world.now) is None


def test_more_local_candidates_of_one_kind_have_lower_and_lower_priorities() -> None:
    world = World()
    hosts = [world.client.offer(Candidate.host(SocketAddress(f"10.0.0.{last}", 1))) for last in (1, 2, 3)]
    first_ipv6 = world.client.offer(Candidate.host(CLIENT_V6))

    assert [host.priority for host in hosts] == [2130706175, 2130705663, 2130705151]
    assert first_ipv6.priority == 2130706431
    assert len({candidate.foundation for candidate in hosts}) == 3


def test_a_reflexive_candidate_is_signalled_but_not_sent_from() -> None:
    world = World()
    world.client.offer(Candidate.host(CLIENT_HOST))
    reflexive = world.client.offer(Candidate.server_reflexive(SocketAddress("203.0.113.1", 40000), CLIENT_HOST))
    world.gateway.offer(Candidate.host(GATEWAY_HOST))
    world.run(2.0)

    assert reflexive.priority == 1686109951
    assert {check.source for check in world.client.checks()} == {CLIENT_HOST}


@pytest.mark.parametrize("host", ["0.0.0.0", "169.254.1.1", "224.0.0.1", "255.255.255.255", "::", "ff02::1"])
def test_an_unreachable_address_is_not_a_candidate(host: str) -> None:
    agent = World().client.agent
    address = SocketAddress(host, 1000)

    assert agent.add_local_candidate(Candidate.host(address), 100.0) is None
    assert not agent.add_remote_candidate(Candidate.host(address), 100.0)


def test_a_candidate_of_another_session_is_refused_and_a_candidate_without_ufrag_accepted() -> None:
    side = World().client

    assert not side.learn("candidate:1 1 udp 2130706175 10.0.2.1 52625 typ host ufrag othr")
    assert side.learn("candidate:1 1 udp 2130706175 10.0.2.1 52625 typ host")
    assert side.learn(f"candidate:1 1 udp 2130706175 10.0.2.2 52625 typ host ufrag {GATEWAY.ufrag}")


def test_a_repeated_candidate_changes_nothing() -> None:
    world = World()
    offer_hosts(world)
    world.run(5.0)
    pairs = len(world.client.agent.remote_candidates)

    assert not world.client.learn(world.gateway.agent.local_candidates[0].to_sdp())
    assert len(world.client.agent.remote_candidates) == pairs


def test_the_forwarded_port_of_a_reflexive_address_is_tried_although_not_signalled() -> None:
    world = World()
    world.client.offer(Candidate.host(CLIENT_HOST))
    world.client.learn("candidate:1 1 udp 2130706175 10.0.2.1 52625 typ host")
    world.client.learn("candidate:2 1 udp 1686109951 203.0.113.9 40000 typ srflx raddr 0.0.0.0 rport 0")
    world.run(1.0)

    assert SocketAddress("203.0.113.9", 52625) in {check.destination for check in world.client.checks()}


def test_at_most_two_ipv4_addresses_are_guessed() -> None:
    world = World()
    for number in range(1, 6):
        world.client.learn(f"candidate:{number} 1 udp 2130706175 10.0.2.{number} 5000{number} typ host")
        world.client.learn(f"candidate:x{number} 1 udp 2130706175 2001:db8::{number} 5000{number} typ host")
        world.client.learn(
            f"candidate:y{number} 1 udp 1686109951 203.0.113.{number} 40000 typ srflx raddr 0.0.0.0 rport 0"
        )
    world.client.learn("candidate:z 1 udp 1686109951 2001:db8:9::1 40000 typ srflx raddr :: rport 0")

    assert len(world.client.agent.remote_candidates) == 5 + 5 + 5 + 1 + 2


def test_a_guess_is_removed_with_its_candidates_unless_it_is_signalled_itself() -> None:
    world = World()
    host = "candidate:1 1 udp 2130706175 10.0.2.1 52625 typ host"
    reflexive = "candidate:2 1 udp 1686109951 203.0.113.9 {} typ srflx raddr 0.0.0.0 rport 0"
    guessed = SocketAddress("203.0.113.9", 52625)
    world.client.learn(host)
    world.client.learn(reflexive.format(40000))
    assert guessed in remote_addresses(world.client)
    forget(world.client, host)
    assert guessed not in remote_addresses(world.client)

    world.client.learn(host)
    assert guessed in remote_addresses(world.client)
    assert world.client.learn(reflexive.format(52625))
    forget(world.client, host)

    assert guessed in remote_addresses(world.client)


def test_an_address_learned_from_a_check_becomes_a_candidate_and_a_path() -> None:
    world = World()
    world.client.offer(Candidate.host(CLIENT_HOST), signal=False)
    world.gateway.offer(Candidate.host(GATEWAY_HOST))
    world.run(2.0)

    (learned,) = world.gateway.agent.remote_candidates
    assert (learned.kind, learned.address) == (CandidateKind.PEER_REFLEXIVE, CLIENT_HOST)
    assert learned.priority == 1862270719
    assert world.gateway.path == (GATEWAY_HOST, CLIENT_HOST)


def test_an_address_learned_from_a_check_is_paired_only_with_the_address_where_it_arrived() -> None:
    world = World()
    world.client.offer(Candidate.host(CLIENT_HOST), signal=False)
    world.gateway.offer(Candidate.host(GATEWAY_HOST))
    world.run(2.0)

    world.gateway.offer(Candidate.host(SocketAddress("10.0.2.2", 52625)), signal=False)
    world.run(5.0)

    assert {check.source for check in world.gateway.checks()} == {GATEWAY_HOST}


def test_the_memory_of_withdrawn_addresses_is_bounded() -> None:
    side = World().client
    for number in range(3 * MAX_REMOTE_ADDRESSES):
        signalled = f"candidate:1 1 udp 1 10.0.{number // 250}.{number % 250 + 1} 1000 typ host"
        assert side.learn(signalled)
        assert forget(side, signalled)

    assert len(side.agent._discarded) == MAX_REMOTE_ADDRESSES


def test_a_signalled_candidate_replaces_the_address_learned_from_a_check() -> None:
    world = World()
    client = world.client.offer(Candidate.host(CLIENT_HOST), signal=False)
    world.gateway.offer(Candidate.host(GATEWAY_HOST))
    world.run(2.0)
    world.gateway.learn(client.to_sdp())
    world.run(2.0)

    (learned,) = world.gateway.agent.remote_candidates
    assert learned.kind is CandidateKind.HOST
    assert len(world.gateway.nominated) == 1  # the path is the same


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_client_behind_a_nat_reaches_a_gateway_without_nat(symmetric: bool) -> None:
    world = World()
    nat = Nat("203.0.113.1", symmetric=symmetric)
    world.route = nat
    offer_hosts(world)
    took = world.run_until(world.are_connected, within=3.0)

    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)
    assert world.gateway.path == (GATEWAY_HOST, nat.address(CLIENT_HOST, GATEWAY_HOST))
    assert took < 1.0
    world.run(60.0)
    assert world.are_connected()


def test_an_answer_from_another_address_proves_nothing() -> None:
    world = World()
    world.route = lambda sender, source, destination: (
        (STRANGER, destination) if sender.name == "gateway" else (source, destination)
    )
    offer_hosts(world)
    world.run(10.0)

    assert world.client.agent.counters.answers_received == 0
    assert world.client.agent.counters.unexpected > 0
    assert (CLIENT_HOST, GATEWAY_HOST) not in [nomination[1:] for nomination in world.client.nominated]


def test_a_withdrawn_candidate_is_no_longer_used() -> None:
    world = World()
    offer_hosts(world)
    offer_relayed(world)
    world.run(5.0)
    host = world.gateway.agent.local_candidates[0]

    world.gateway.withdraw(host)
    world.run(LATENCY * 4)

    assert world.client.path == (CLIENT_HOST, GATEWAY_RELAYED)
    assert GATEWAY_HOST not in remote_addresses(world.client)
    assert world.run_until(lambda: world.gateway.path == (GATEWAY_RELAYED, CLIENT_HOST), within=3.0) < 3.0


def test_withdrawing_the_last_candidate_leaves_no_path_but_does_not_disconnect() -> None:
    world = World()
    offer_hosts(world)
    world.run(5.0)

    world.gateway.withdraw(world.gateway.agent.local_candidates[0])
    world.run(1.0)

    assert world.client.path is world.gateway.path is None
    assert world.client.agent.state is AgentState.CHECKING  # it waits for others


def test_a_candidate_is_withdrawn_only_as_it_was_signalled() -> None:
    world = World()
    signalled = f"candidate:2 1 udp 1 203.0.113.9 40000 typ srflx raddr 0.0.0.0 rport 0 ufrag {GATEWAY.ufrag}"
    world.client.learn(signalled)

    for wrong in (
        signalled.replace("40000", "40001"),
        signalled.replace("srflx", "relay"),
        signalled.replace("rport 0", "rport 1"),
    ):
        assert not forget(world.client, wrong)
    assert forget(world.client, signalled.replace("candidate:2 1 udp 1", "candidate:3 1 udp 2"))


def test_checks_from_a_withdrawn_address_are_ignored_until_it_is_signalled_again() -> None:
    world = World()
    offer_hosts(world)
    world.run(5.0)
    signalled = world.gateway.agent.local_candidates[0].to_sdp()
    assert forget(world.client, signalled)  # and the gateway goes on checking
    answered = world.client.agent.counters.checks_answered
    world.run(10.0)

    assert world.client.agent.counters.checks_answered == answered
    assert world.client.agent.remote_candidates == ()
    assert world.client.learn(signalled)
    world.run(3.0)
    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)
    assert world.client.agent.counters.checks_answered > answered


def test_a_local_candidate_that_is_gone_is_not_sent_from_and_not_answered_at() -> None:
    world = World()
    offer_hosts(world)
    world.run(5.0)
    assert world.client.agent.remove_local_candidate(world.client.agent.local_candidates[0], world.now)
    world.sent.clear()
    unexpected = world.client.agent.counters.unexpected
    world.run(5.0)

    assert [datagram for datagram in world.sent if datagram.sender is world.client] == []
    assert world.client.agent.counters.unexpected > unexpected
    assert not world.client.agent.remove_local_candidate(Candidate.host(CLIENT_HOST), world.now)

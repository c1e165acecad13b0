"""Keeping, probing, ending and using an allocation: docs/protocol/data-plane.md, 3.6, 3.7 and 9.5."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.ice.candidate import CandidateKind
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Method
from firezone_tunnel.core.turn.events import FailureReason
from firezone_tunnel.core.turn.state import State
from tests.unit.core.turn.client import (
    KEY,
    LOCAL4,
    MAPPED4,
    OTHER4,
    PEER4,
    PEER6,
    RELAY4,
    RELAY6,
    RELAYED4,
    RELAYED6,
    Client,
    allocated,
    bound,
    reach_allocate,
)

HOST, REFLEXIVE, RELAYED = CandidateKind.HOST, CandidateKind.SERVER_REFLEXIVE, CandidateKind.RELAYED
LOST = [("lost", RELAYED, RELAYED4), ("lost", RELAYED, RELAYED6)]
FAILED_SILENTLY = ("failed", FailureReason.NO_RESPONSE, None)


class TestRefresh:
    def test_it_is_refreshed_once_at_half_of_its_lifetime(self) -> None:
        client = allocated(lifetime=120)
        client.run_until(59.9)
        assert client.take(Method.REFRESH) == []
        client.run_until(60.0)
        (refresh,) = client.take(Method.REFRESH)
        client.answer(refresh.message, (stun.LIFETIME, 120))
        client.run_until(119.9)
        assert client.take(Method.REFRESH) == []
        client.run_until(120.0)

        assert len(client.take(Method.REFRESH)) == 1

    def test_the_relay_may_change_the_lifetime(self) -> None:
        client = allocated()
        client.run_until(300.0)
        client.answer(client.take(Method.REFRESH)[0].message, (stun.LIFETIME, 60))
        client.run_until(330.0)

        assert [sent.at for sent in client.take(Method.REFRESH)] == [330.0]

    def test_a_relay_that_says_lifetime_0_has_deleted_it(self) -> None:
        client = bound(PEER4)
        client.run_until(300.0)
        client.answer(client.take(Method.REFRESH)[0].message, (stun.LIFETIME, 0))

        assert client.changes() == LOST
        assert client.take_one(Method.ALLOCATE).is_authentic(KEY)

    def test_a_refresh_without_an_answer_ends_it(self) -> None:
        client = bound(PEER4)
        client.run_until(308.1)
        assert [sent.at for sent in client.take(Method.REFRESH)] == [300.0, 301.0, 302.5, 304.75]
        assert client.changes() == []
        client.run_until(308.125)

        assert client.changes() == [*LOST, FAILED_SILENTLY]
        assert client.allocation.channel_to(PEER4, client.now) is None

    def test_it_expires_when_its_lifetime_is_over(self) -> None:
        client = bound(PEER4)
        client.sleep_until(600.0)

        assert client.changes() == LOST
        assert client.allocation.relayed(False) is None
        assert client.allocation.channel_to(PEER4, client.now) is None
        assert client.allocation.state is State.SUSPENDED
        assert client.allocation.next_timeout() is None

    def test_after_a_shorter_sleep_it_is_refreshed(self) -> None:
        client = allocated()
        client.sleep_until(599.0)

        assert [sent.at for sent in client.take(Method.REFRESH)] == [599.0]
        assert client.changes() == []


class TestKeepalive:
    def test_a_binding_goes_to_the_active_socket_every_25_seconds(self) -> None:
        client, request = reach_allocate()
        client.answers_keepalives = False
        client.run_until(0.5)
        client.grant(request)
        client.run_until(24.9)
        client.take()
        for at in (25.0, 50.0, 75.0):
            client.run_until(at)
            (sent,) = client.take()
            assert (sent.at, sent.destination, sent.names) == (at, RELAY4, ["SOFTWARE"])
            client.answer(sent.message, (stun.XOR_MAPPED_ADDRESS, MAPPED4))

    def test_without_an_allocation_no_binding_is_sent(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.answer(request, error=486)
        client.run_until(100.0)

        assert client.take() == []

    def test_channel_data_postpones_it(self) -> None:
        client = allocated()
        client.answers_keepalives = False
        client.run_until(20.0)
        client.allocation.sent_channel_data(client.now)
        client.run_until(44.9)
        assert client.take() == []
        client.run_until(45.0)

        client.take_one(Method.BINDING)

    def test_an_unchanged_answer_is_not_an_event(self) -> None:
        client = allocated()
        client.answers_keepalives = False
        client.run_until(25.0)
        client.answer(client.take_one(Method.BINDING), (stun.XOR_MAPPED_ADDRESS, MAPPED4))

        assert client.changes() == []

    def test_a_new_mapping_replaces_the_old_one(self) -> None:
        client = allocated()
        client.answers_keepalives = False
        client.run_until(25.0)
        another = SocketAddress(MAPPED4.host, 40001)
        client.answer(client.take_one(Method.BINDING), (stun.XOR_MAPPED_ADDRESS, another))

        assert client.changes() == [("found", REFLEXIVE, another), ("lost", REFLEXIVE, MAPPED4)]

    def test_another_local_address_replaces_the_old_one(self) -> None:
        client = allocated()
        client.answers_keepalives = False
        client.run_until(25.0)
        local = SocketAddress("192.0.2.21", LOCAL4.port)
        client.answer(client.take_one(Method.BINDING), (stun.XOR_MAPPED_ADDRESS, MAPPED4), local=local)

        assert client.changes() == [
            ("found", HOST, local),
            ("lost", HOST, LOCAL4),
            ("found", REFLEXIVE, MAPPED4),
            ("lost", REFLEXIVE, MAPPED4),
        ]
        assert client.allocation.active_source == LOCAL4

    def test_without_an_answer_the_relay_counts_as_gone(self) -> None:
        client = bound(PEER4)
        client.answers_keepalives = False
        client.run_until(33.1)
        assert client.changes() == []
        client.run_until(33.125)

        assert client.changes() == [*LOST, FAILED_SILENTLY]


class TestProbe:
    """`refresh`, which follows when the portal announces relays."""

    def test_it_is_sent_once_and_has_a_second_for_the_answer(self) -> None:
        client = bound(PEER4)
        client.run_until(10.0)
        client.refresh()
        client.run_until(10.9)
        assert client.changes() == []
        client.run_until(11.0)

        assert [sent.at for sent in client.take()] == [10.0]
        assert client.changes() == [*LOST, FAILED_SILENTLY]

    def test_an_answer_extends_the_lifetime(self) -> None:
        client = allocated()
        client.run_until(100.0)
        client.take()
        client.refresh()
        client.answer(client.take_one(Method.REFRESH), (stun.LIFETIME, 600))
        client.run_until(399.9)
        assert client.take(Method.REFRESH) == []
        client.run_until(400.0)

        assert len(client.take(Method.REFRESH)) == 1

    def test_a_relay_that_restarted_is_allocated_at_anew_within_three_round_trips(self) -> None:
        client = allocated()
        client.refresh()
        client.challenge(client.take_one(Method.REFRESH), error=438, nonce="newer")
        client.answer(client.take_one(Method.REFRESH), error=437)
        client.grant(client.take_one(Method.ALLOCATE))

        assert client.allocation.state is State.ALLOCATED

    def test_a_second_probe_is_not_sent_while_the_first_waits(self) -> None:
        client = allocated()
        client.refresh()
        client.refresh()

        client.take_one(Method.REFRESH)

    def test_nothing_is_probed_during_allocation(self) -> None:
        client = Client()
        client.take()
        client.refresh()
        assert client.take() == []
        client, _ = reach_allocate()
        client.refresh()

        assert client.take() == []

    def test_a_suspended_allocation_begins_anew_at_all_addresses(self) -> None:
        client, request = reach_allocate()
        client.answer(request, error=486)
        client.run_until(60.0)
        client.take()
        client.refresh()

        assert client.allocation.active_socket is None
        assert [(sent.at, sent.destination) for sent in client.sent] == [(60.0, RELAY4), (60.0, RELAY6)]
        client.answer_binding()
        client.grant(client.take_one(Method.ALLOCATE))
        assert client.allocation.state is State.ALLOCATED

    def test_an_allocation_that_expired_during_a_pause_begins_anew_before_any_timer(self) -> None:
        client = allocated()
        client.now += 700.0
        client.probe()

        assert client.take_one(Method.BINDING)

    def test_after_a_pause_it_has_more_patience(self) -> None:
        client = bound(PEER4)
        client.run_until(10.0)
        client.probe()
        client.run_until(13.0)

        assert len(client.take(Method.REFRESH)) > 1
        assert client.changes() == []

    def test_an_expired_allocation_begins_anew_with_its_nonce(self) -> None:
        client = allocated()
        client.sleep_until(700.0)
        client.refresh()
        client.answer_binding()

        assert client.take_one(Method.ALLOCATE).get(stun.NONCE) == "nonce"


class TestRestart:
    def test_all_candidates_are_taken_back_and_all_addresses_asked_again(self) -> None:
        client, request = reach_allocate()
        client.grant(request)
        client.take_events()
        client.restart()

        assert client.changes() == [("lost", HOST, LOCAL4), ("lost", REFLEXIVE, MAPPED4), *LOST]
        assert [sent.destination for sent in client.sent] == [RELAY4, RELAY6]
        assert client.allocation.active_socket is None
        assert client.allocation.candidates == ()

    def test_it_leads_to_an_allocation_with_the_credentials_kept(self) -> None:
        client = bound(PEER4)
        client.run_until(50.0)
        client.restart()
        assert client.allocation.channel_to(PEER4, client.now) is None
        client.answer_binding()
        allocate = client.take_one(Method.ALLOCATE)
        client.grant(allocate)

        assert allocate.get(stun.NONCE) == "nonce"
        assert [line[0] for line in client.changes()[-2:]] == ["found", "found"]
        client.bind(PEER4)
        assert client.take_one(Method.CHANNEL_BIND).get(stun.CHANNEL_NUMBER) == 0x4000

    def test_answers_from_before_are_not_ours_any_more(self) -> None:
        client = allocated()
        client.refresh()
        refresh = client.take_one(Method.REFRESH)
        client.restart()

        assert not client.answer(refresh, (stun.LIFETIME, 600))

    def test_a_suspended_allocation_begins_anew(self) -> None:
        client, request = reach_allocate()
        client.answer(request, error=486)
        client.restart()

        assert len(client.take(Method.BINDING)) == 2


class TestClose:
    def test_it_deletes_the_allocation_at_the_relay(self) -> None:
        client = bound(PEER4)
        farewell = client.allocation.close()

        assert farewell is not None
        assert (farewell.destination, farewell.source) == (RELAY4, LOCAL4)
        message = stun.parse(farewell.payload)
        assert message is not None
        assert (message.method, message.get(stun.LIFETIME), message.get(stun.NONCE)) == (Method.REFRESH, 0, "nonce")
        assert message.is_authentic(KEY)

    def test_the_relayed_candidates_are_lost_and_nothing_else_happens_any_more(self) -> None:
        client = bound(PEER4)
        client.bind(OTHER4)
        client.allocation.close()

        assert list(client.allocation.transmits()) == []
        assert [type(event).__name__ for event in client.allocation.events()] == ["CandidateLost"] * 2
        assert client.allocation.next_timeout() is None
        client.bind(PEER4)
        client.refresh()
        client.restart()
        client.sleep_until(1000.0)
        assert client.take(Method.BINDING) == client.changes() == []
        assert client.allocation.close() is None

    def test_without_an_allocation_there_is_nothing_to_delete(self) -> None:
        client, _ = reach_allocate()

        assert client.allocation.close() is None


class TestChannels:
    def test_a_peer_waits_until_there_is_an_allocation(self) -> None:
        client, request = reach_allocate()
        client.bind(PEER4, PEER6, PEER4)
        assert client.take() == []
        assert client.allocation.channel_to(PEER4, client.now) is None
        client.grant(request)

        assert [sent.message.get(stun.XOR_PEER_ADDRESS) for sent in client.take()] == [PEER4, PEER6]

    def test_a_peer_may_be_named_before_the_relay_has_answered_at_all(self) -> None:
        client = Client(ipv6=None)
        client.bind(PEER4)
        client.answer_binding()
        client.grant(client.take_one(Method.ALLOCATE))

        assert client.take_one(Method.CHANNEL_BIND).get(stun.XOR_PEER_ADDRESS) == PEER4

    def test_at_most_100_wait_and_the_oldest_make_room(self) -> None:
        client, request = reach_allocate()
        peers = [SocketAddress("203.0.113.99", 10000 + number) for number in range(120)]
        client.bind(*peers)
        client.grant(request)

        assert [sent.message.get(stun.XOR_PEER_ADDRESS) for sent in client.take()] == peers[20:]

    def test_data_can_be_sent_before_the_relay_confirms_and_received_after(self) -> None:
        client = allocated()
        client.bind(PEER4)
        assert client.allocation.channel_to(PEER4, client.now) == 0x4000
        assert client.allocation.peer_of(0x4000, client.now) is None
        client.answer(client.take_one(Method.CHANNEL_BIND))

        assert client.allocation.channel_to(PEER4, client.now) == 0x4000
        assert client.allocation.peer_of(0x4000, client.now) == PEER4

    def test_data_can_neither_be_sent_nor_received_without_a_channel(self) -> None:
        client = bound(PEER4)

        assert client.allocation.channel_to(OTHER4, client.now) is None
        assert client.allocation.peer_of(0x4001, client.now) is None

    def test_one_request_is_in_flight_for_a_peer(self) -> None:
        client = allocated()
        client.bind(PEER4, PEER4)

        client.take_one(Method.CHANNEL_BIND)

    def test_a_bound_peer_is_not_bound_again(self) -> None:
        client = bound(PEER4)
        client.bind(PEER4)

        assert client.take() == []

    def test_peers_do_not_depend_on_each_other(self) -> None:
        client = allocated()
        client.bind(PEER4, OTHER4)
        first, second = client.take(Method.CHANNEL_BIND)
        client.answer(first.message, error=403)
        client.answer(second.message)

        assert client.allocation.channel_to(PEER4, client.now) is None
        assert client.allocation.channel_to(OTHER4, client.now) == 0x4001

    @pytest.mark.parametrize(
        ("relayed", "reachable", "unreachable"), [(RELAYED4, PEER4, PEER6), (RELAYED6, PEER6, PEER4)]
    )
    def test_a_peer_of_a_family_that_the_relay_did_not_grant_is_refused(
        self, relayed: SocketAddress, reachable: SocketAddress, unreachable: SocketAddress
    ) -> None:
        client = allocated(relayed)
        client.bind(unreachable)
        assert client.take() == []
        assert client.allocation.channel_to(unreachable, client.now) is None
        client.bind(reachable)

        assert client.take_one(Method.CHANNEL_BIND).get(stun.XOR_PEER_ADDRESS) == reachable

    def test_a_channel_with_received_data_is_bound_again_after_300_seconds(self) -> None:
        client = bound(PEER4, OTHER4)
        client.run_until(200.0)
        assert client.allocation.peer_of(0x4000, client.now) == PEER4
        client.run_until(299.9)
        assert client.take(Method.CHANNEL_BIND) == []
        client.run_until(300.0)
        (again,) = client.take(Method.CHANNEL_BIND)
        client.answer(again.message)

        assert (again.message.get(stun.CHANNEL_NUMBER), again.message.get(stun.XOR_PEER_ADDRESS)) == (0x4000, PEER4)
        assert client.allocation.channel_to(PEER4, client.now + 599.0) == 0x4000
        assert client.allocation.channel_to(OTHER4, client.now + 300.0) is None

    def test_data_on_an_old_channel_binds_it_again_soon(self) -> None:
        client = bound(PEER4)
        self._refreshed_until(client, 400.0)
        client.take()
        assert client.allocation.peer_of(0x4000, client.now) == PEER4
        client.run_for(0.0)

        assert client.take_one(Method.CHANNEL_BIND).get(stun.CHANNEL_NUMBER) == 0x4000

    def _refreshed_until(self, client: Client, now: float) -> None:
        client.run_until(min(now, 300.0))
        for sent in client.take(Method.REFRESH):
            client.answer(sent.message, (stun.LIFETIME, 600))
        client.run_until(now)


def test_a_relay_may_have_an_ipv6_address_only() -> None:
    client = Client(ipv4=None)
    client.answer_binding(ipv6=True)
    (allocate,) = client.take()
    addresses = [(stun.XOR_RELAYED_ADDRESS, address) for address in (RELAYED4, RELAYED6)]
    client.answer(allocate.message, *addresses, (stun.LIFETIME, 600), source=RELAY6)

    relayed = [candidate for candidate in client.allocation.candidates if candidate.kind is RELAYED]
    best_first = sorted(relayed, key=lambda candidate: -candidate.priority)
    assert [candidate.address for candidate in best_first] == [RELAYED6, RELAYED4]

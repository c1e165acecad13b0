from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.wireguard.peer import Expired
from firezone_tunnel.core.wireguard.session import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES
from tests.hypothesis_profiles import examples
from tests.unit.core.wireguard.world import DATA, INITIATION, Host, World, everything, nothing


class TestRenewal:
    def test_the_initiator_renews_its_session_when_it_sends_after_120_seconds(self) -> None:
        world = World()
        world.connect()
        world.exchange_every_second(until=119.0)
        assert world.initiations() == 1

        world.exchange_every_second(until=125.0)

        assert (world.client.peer.counters.initiations_sent, world.gateway.peer.counters.initiations_sent) == (2, 0)
        second = world.times(INITIATION)[1]
        assert 120.0 <= second <= 121.333
        world.assert_traffic_flows()

    def test_sending_on_does_not_shorten_the_jitter_of_a_renewal(self) -> None:
        world = World()
        world.connect()
        world.run_until(120.0)
        world.client.send(b"one")
        renewal_at = world.client.due_at()
        for _ in range(100):
            world.client.send(b"many")

        assert 120.0 < renewal_at <= 120.333
        assert world.client.due_at() == renewal_at

    def test_renewal_goes_on_for_an_hour_without_losing_a_packet(self) -> None:
        world = World()
        world.connect()
        world.exchange_every_second(until=3600.0)

        assert len(world.client.received) == len(world.gateway.received) == 3600
        assert 28 <= world.initiations() <= 31
        assert not any(isinstance(event, Expired) for event in world.client.events + world.gateway.events)

    def test_the_responder_never_renews_for_age(self) -> None:
        world = World()
        world.connect()
        world.run_until(130.0)
        world.lose = lambda sender, kind: kind == INITIATION and sender is world.client
        world.gateway.send(b"late")
        world.run_until(166.0)
        world.client.send(b"later still")
        world.run_until(175.0)

        assert world.gateway.received == [b"later still"]
        assert world.gateway.peer.counters.initiations_sent == 0

    def test_the_initiator_renews_when_it_receives_after_165_seconds(self) -> None:
        world = World()
        world.connect()
        world.run_until(164.0)
        world.gateway.send(b"too early")
        world.run_until(164.9)
        assert world.initiations() == 1

        world.run_until(165.0)
        world.gateway.send(b"late")
        world.run_until(165.4)

        assert world.client.peer.counters.initiations_sent == 2

    def test_an_idle_initiator_renews_when_its_session_dies_of_age(self) -> None:
        world = World()
        world.connect()
        world.run_until(179.9)
        assert world.initiations() == 1

        world.run_until(181.0)

        assert world.initiations() == 2
        assert 180.0 <= world.times(INITIATION)[1] <= 180.333
        world.assert_traffic_flows()

    def test_an_idle_connection_stays_alive_for_a_day(self) -> None:
        world = World()
        world.connect()
        world.run_until(86_400.0)

        assert 478 <= world.initiations() <= 480
        assert not any(isinstance(event, Expired) for event in world.client.events + world.gateway.events)

    def test_the_initiator_stops_using_its_session_after_170_seconds_but_receives_until_180(self) -> None:
        world = World()
        world.connect()
        world.run_until(170.0)
        session = world.client.only_session()

        assert world.client.peer.sending_session(170.0) is None
        assert world.client.peer.receiving_session(session.receiver_index, 179.9) is session
        assert world.client.peer.receiving_session(session.receiver_index, 180.0) is None

    def test_older_sessions_go_on_receiving_and_are_never_sent_with_again(self) -> None:
        world = World()
        world.connect()
        first = world.gateway.peer.sending_session(0.0)
        assert first is not None
        delayed = world.client.seal(b"delayed")
        world.advance(30.0)
        world.client.initiate()
        world.settle()
        second = world.gateway.peer.sending_session(30.0)
        assert second is not None
        assert second is not first

        world.gateway.handle(delayed)

        assert world.gateway.received == [b"delayed"]
        assert world.gateway.peer.sending_session(30.0) is second

    def test_a_session_confirmed_late_does_not_replace_a_newer_session(self) -> None:
        world = World()
        world.lose = lambda sender, kind: sender is world.client and kind == DATA
        world.connect()
        late = world.client.seal(b"on the first")
        world.advance(1.0)
        world.lose = nothing
        world.client.initiate()
        world.settle()
        newer = world.gateway.peer.sending_session(1.0)

        world.gateway.handle(late)

        assert world.gateway.received == [b"on the first"]
        assert world.gateway.peer.sending_session(1.0) is newer
        assert len(world.gateway.events) == 1

    def test_a_late_report_about_a_replaced_session_renews_nothing(self) -> None:
        world = World()
        world.connect()
        replaced = world.client.peer.sending_session(0.0)
        assert replaced is not None
        world.run_until(100.0)
        world.client.initiate()
        world.settle()

        world.client.peer.sent_data(replaced, 1, 130.0)
        world.gateway.send(b"reply")
        world.run_until(140.0)

        assert world.initiations() == 2

    def test_too_many_messages_renew_a_session_on_either_side(self) -> None:
        for side in ("client", "gateway"):
            world = World()
            world.connect()
            host: Host = getattr(world, side)
            session = host.peer.sending_session(0.0)
            assert session is not None
            session.send_counter = REKEY_AFTER_MESSAGES
            host.send(b"one too many")
            world.run_until(6.0)

            assert host.peer.counters.initiations_sent == (2 if side == "client" else 1)
            # Neither side initiates twice within five seconds.
            assert world.times(INITIATION)[1] >= (5.0 if side == "client" else 0.0)

    def test_a_session_whose_counter_ends_is_not_sent_with(self) -> None:
        world = World()
        world.connect()
        session = world.client.peer.sending_session(0.0)
        assert session is not None
        session.send_counter = REJECT_AFTER_MESSAGES

        assert world.client.peer.sending_session(0.0) is None

    def test_a_wall_clock_that_is_set_back_does_not_stop_handshakes(self) -> None:
        world = World()
        world.connect()
        world.utc_offset -= 86_400.0
        world.exchange_every_second(until=130.0)

        assert world.gateway.peer.counters.sessions_established == 2
        assert world.gateway.peer.counters.initiations_replayed == 0

    def test_both_initiating_at_once_converge(self) -> None:
        world = World()
        world.client.initiate()
        world.gateway.initiate()
        world.settle()
        world.assert_traffic_flows()
        assert world.initiations() == 2

        world.exchange_every_second(until=600.0)

        assert len(world.client.received) == len(world.gateway.received) == 601
        assert world.initiations() <= 2 + 2 * 4
        assert not any(isinstance(event, Expired) for event in world.client.events + world.gateway.events)

    def test_a_session_that_the_other_side_began_settles_our_own_attempt(self) -> None:
        world = World()
        world.lose = lambda sender, kind: sender is world.client and kind == INITIATION
        world.client.initiate()
        world.run_until(1.0)
        world.gateway.initiate()
        world.settle()

        assert not world.client.peer.is_handshaking
        world.run_until(60.0)
        assert world.client.peer.counters.initiations_sent == 1


class TestKeepalives:
    def test_received_data_that_stays_unanswered_is_acknowledged_after_ten_seconds(self) -> None:
        world = World()
        world.connect()
        world.client.send(b"no answer")
        world.run_until(9.9)
        assert world.gateway.peer.counters.keepalives_sent == 0

        world.run_until(10.0)

        assert world.gateway.peer.counters.keepalives_sent == 1

    def test_more_data_does_not_put_the_keepalive_off(self) -> None:
        world = World()
        world.connect()
        for second in range(4):
            world.run_until(3.0 * second)
            world.client.send(b"no answer")
        world.run_until(10.0)

        assert world.gateway.peer.counters.keepalives_sent == 1

    def test_an_initiation_counts_as_a_reply(self) -> None:
        world = World()
        world.connect()
        world.lose = lambda sender, kind: kind == DATA
        world.gateway.send(b"question")
        world.run_until(10.0)
        world.client.initiate()
        world.run_until(20.0)

        assert world.gateway.peer.counters.initiations_sent == 0

    def test_keepalives_are_not_answered(self) -> None:
        world = World()
        world.connect()
        world.client.send(b"no answer")
        world.run_until(100.0)

        assert (world.client.peer.counters.keepalives_sent, world.gateway.peer.counters.keepalives_sent) == (1, 1)

    def test_a_packet_in_time_makes_a_keepalive_needless(self) -> None:
        world = World()
        world.connect()
        world.client.send(b"question")
        world.run_until(9.0)
        world.gateway.send(b"answer")
        world.run_until(19.0 - 0.1)

        assert world.gateway.peer.counters.keepalives_sent == 0

    def test_no_reply_to_data_for_15_seconds_leads_to_a_handshake(self) -> None:
        for side in ("client", "gateway"):
            world = World()
            world.connect()
            world.advance(1.0)
            world.lose = everything
            host: Host = getattr(world, side)
            before = host.peer.counters.initiations_sent
            host.send(b"is anybody there?")
            world.run_until(15.9)
            assert host.peer.counters.initiations_sent == before

            world.run_until(16.4)

            assert host.peer.counters.initiations_sent == before + 1

    def test_a_keepalive_counts_as_a_reply(self) -> None:
        world = World()
        world.connect()
        world.client.send(b"question")
        world.run_until(100.0)

        assert world.initiations() == 1

    def test_sending_on_does_not_put_off_the_handshake(self) -> None:
        world = World()
        world.connect()
        world.lose = everything
        for second in range(1, 18):
            world.client.send(b"is anybody there?")
            world.run_until(float(second))

        assert world.client.peer.counters.initiations_sent == 2


class TestGivingUp:
    def test_an_attempt_is_repeated_every_five_seconds_and_ends_after_fifteen(self) -> None:
        world = World()
        world.lose = everything
        world.client.initiate()
        world.run_until(600.0)

        times = world.times(INITIATION)
        assert len(times) == 3
        assert all(5.0 <= later - earlier <= 5.334 for earlier, later in pairwise(times))
        assert world.client.events == [Expired("no answer to a handshake for 15 s")]
        assert world.client.expired_at == [15.0]

    def test_every_initiation_of_an_attempt_is_new(self) -> None:
        world = World()
        world.lose = everything
        world.client.initiate()
        world.run_until(14.0)

        assert len({datagram[8:40] for datagram in world.datagrams}) == len({d[4:8] for d in world.datagrams}) == 3

    def test_the_attempt_time_can_be_chosen(self) -> None:
        world = World()
        world.client.replace_peer(rekey_attempt_time=90.0)
        world.lose = everything
        world.client.initiate()
        world.run_until(600.0)

        assert world.client.expired_at == [90.0]

    def test_the_time_is_counted_from_the_first_initiation_of_each_attempt(self) -> None:
        world = World()
        world.connect()
        world.lose = everything
        world.run_until(300.0)

        renewal = world.times(INITIATION)[1]
        assert world.client.expired_at == [pytest.approx(renewal + 15.0)]

    def test_a_peer_whose_data_arrives_is_not_given_up(self) -> None:
        world = World()
        world.connect()
        world.lose = lambda sender, kind: kind == INITIATION
        world.client.initiate()
        world.advance(1.0)
        world.client.initiate()
        for second in range(2, 170, 2):
            world.run_until(float(second))
            world.gateway.send(b"still here")
            world.settle()
        assert world.client.peer.is_handshaking
        assert not world.client.expired_at

        world.lose = everything
        world.run_until(200.0)

        assert world.client.expired_at == [168.0 + 15.0]

    def test_a_responder_whose_initiator_vanished_expires_after_540_seconds(self) -> None:
        world = World()
        world.connect()
        world.client.vanish()
        world.run_until(2000.0)

        assert world.gateway.expired_at == [540.0]
        assert world.gateway.peer.next_timeout() is None

    def test_a_peer_that_never_had_a_session_expires_after_540_seconds(self) -> None:
        world = World()
        world.run_until(2000.0)

        assert world.client.expired_at == world.gateway.expired_at == [540.0]

    def test_an_expired_peer_can_begin_anew(self) -> None:
        world = World()
        world.run_until(600.0)
        world.client.initiate()
        world.settle()

        world.assert_traffic_flows()

    def test_one_call_handles_ten_minutes_of_suspend(self) -> None:
        world = World()
        world.connect()
        world.client.send(b"unanswered")
        world.settle()
        world.now += 600.0
        sent = len(world.datagrams)
        world.client.handle_timeout()
        world.client.flush()

        assert world.client.events[1:] == [Expired("no session for 540 s")]
        assert len(world.datagrams) == sent
        assert world.client.peer.next_timeout() is None
        assert not world.client.indices

    def test_after_five_minutes_of_suspend_one_handshake_restores_the_session(self) -> None:
        world = World()
        world.connect()
        world.exchange_every_second(until=3.0)
        world.now += 300.0
        world.run_until(310.0)

        assert world.initiations() == 2
        world.assert_traffic_flows()
        assert not any(isinstance(event, Expired) for event in world.client.events + world.gateway.events)

    def test_a_suspend_within_an_attempt_ends_it_once(self) -> None:
        world = World()
        world.lose = everything
        world.client.initiate()
        world.now += 120.0
        world.client.handle_timeout()
        world.client.flush()

        assert world.client.events == [Expired("no answer to a handshake for 15 s")]
        assert not world.datagrams  # not even packets that were queued before


class TestAnyNetwork:
    @settings(max_examples=examples(60))
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["client sends", "gateway sends", "client initiates", "gateway initiates", "suspend"]),
                st.floats(0.0, 200.0),
                st.sampled_from(["all", "none", "handshakes", "data"]),
            ),
            max_size=12,
        )
    )
    def test_timers_never_storm_nothing_leaks_and_traffic_flows_once_the_network_is_well(
        self, steps: list[tuple[str, float, str]]
    ) -> None:
        world = World()
        for action, duration, loss in steps:
            world.lose = LOSSES[loss]
            side = world.gateway if action.startswith("gateway") else world.client
            if action.endswith("sends"):
                side.send(b"data")
            elif action.endswith("initiates"):
                side.initiate()
            else:
                world.now += duration
            before = len(world.datagrams)
            world.run_until(world.now + duration)
            assert len(world.datagrams) - before <= 40 + 2 * duration
            assert len(world.client.indices) <= 9
            assert len(world.gateway.indices) <= 9

        world.lose = nothing
        world.client.send(b"at last")
        world.gateway.send(b"at last")
        world.run_until(world.now + 21.0)
        world.client.received.clear()
        world.gateway.received.clear()
        world.assert_traffic_flows()


LOSSES: dict[str, Callable[[Host, int], bool]] = {
    "all": everything,
    "none": nothing,
    "handshakes": lambda sender, kind: kind != DATA,
    "data": lambda sender, kind: kind == DATA,
}

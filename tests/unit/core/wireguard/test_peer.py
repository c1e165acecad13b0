from __future__ import annotations

import gc
import weakref

import pytest

from firezone_tunnel.core.wireguard.handshake import (
    HandshakeInitiation,
    HandshakeResponse,
    StaticKey,
    open_static,
    parse,
)
from firezone_tunnel.core.wireguard.peer import SessionEstablished
from firezone_tunnel.errors import ProtocolError
from tests.unit.core.wireguard.world import (
    COOKIE,
    DATA,
    INITIATION,
    RESPONSE,
    UTC,
    World,
    everything,
    initiation_from,
    nothing,
)


class TestFirstHandshake:
    @pytest.mark.parametrize("preshared_key", [bytes(32), bytes(range(32))])
    def test_it_establishes_a_session_on_both_sides(self, preshared_key: bytes) -> None:
        world = World(preshared_key=preshared_key)
        world.connect()

        assert [kind for _, _, kind in world.log] == [INITIATION, RESPONSE, DATA]
        assert [type(event) for event in world.client.events] == [SessionEstablished]
        assert [type(event) for event in world.gateway.events] == [SessionEstablished]
        world.assert_traffic_flows()

    def test_the_initiator_confirms_with_an_empty_message_at_once(self) -> None:
        world = World()
        world.connect()

        assert (world.client.peer.counters.keepalives_sent, world.now) == (1, 0.0)

    def test_the_responder_sends_nothing_on_a_session_before_data_arrives_on_it(self) -> None:
        world = World()
        world.lose = lambda sender, kind: sender is world.client and kind == DATA
        world.connect()

        assert world.client.events
        assert not world.gateway.events
        assert world.gateway.peer.sending_session(world.now) is None

        world.lose = nothing
        world.client.send(b"data confirms as well")
        world.settle()
        assert world.gateway.peer.sending_session(world.now) is not None

    def test_a_responder_that_waits_for_confirmation_initiates_only_after_five_seconds(self) -> None:
        world = World()
        world.lose = lambda sender, kind: sender is world.client and kind == DATA
        world.connect()
        world.gateway.send(b"queued")
        world.run_until(4.9)
        assert world.gateway.peer.counters.initiations_sent == 0

        world.lose = nothing
        world.run_until(5.0)

        assert world.gateway.peer.counters.initiations_sent == 1
        assert world.client.received == [b"queued"]

    def test_packets_without_a_session_start_a_handshake_on_either_side(self) -> None:
        world = World()
        world.gateway.send(b"from the gateway")
        world.gateway.send(b"and another")
        timeout = world.gateway.peer.next_timeout()
        assert timeout is not None
        assert (timeout.at, timeout.reason) == (world.now, "handshake for data to send")

        world.run_until(0.0)

        assert world.gateway.peer.counters.initiations_sent == 1
        assert world.client.received == [b"from the gateway", b"and another"]

    def test_asking_again_within_a_second_changes_nothing(self) -> None:
        world = World()
        world.lose = everything
        world.client.initiate()
        world.advance(0.9)
        world.client.initiate()
        world.settle()

        assert world.client.peer.is_handshaking
        assert world.client.peer.counters.initiations_sent == 1

    def test_asking_again_later_replaces_an_initiation_that_was_lost(self) -> None:
        world = World()
        world.lose = everything
        world.client.initiate()
        world.run_until(14.0)
        world.lose = nothing
        world.client.initiate()
        world.settle()

        assert world.now == 14.0
        assert len(world.client.indices) == 1
        world.assert_traffic_flows()


class TestRejection:
    def test_another_preshared_key_establishes_nothing(self) -> None:
        world = World()
        world.client.replace_peer(preshared_key=b"\1" * 32)
        world.connect()

        assert world.client.peer.counters.responses_rejected == 1
        assert not world.client.events

    def test_an_initiation_from_another_peer_is_rejected(self) -> None:
        world = World()
        stranger = StaticKey(b"\7" * 32)
        message = initiation_from(stranger, world.gateway.local)

        assert not world.gateway.peer.handle_initiation(message, 0.0)
        assert world.gateway.peer.counters.initiations_rejected == 1
        assert not list(world.gateway.peer.transmits())

    def test_a_replayed_initiation_is_rejected(self) -> None:
        world = World()
        message = initiation_from(world.client.local, world.gateway.local)

        assert world.gateway.peer.handle_initiation(message, 0.0)
        assert not world.gateway.peer.handle_initiation(message, 1.0)
        assert world.gateway.peer.counters.initiations_replayed == 1

    def test_an_older_initiation_than_the_newest_is_rejected(self) -> None:
        world = World()
        older = initiation_from(world.client.local, world.gateway.local, UTC)
        newer = initiation_from(world.client.local, world.gateway.local, UTC + 1)

        assert world.gateway.peer.handle_initiation(newer, 0.0)
        assert not world.gateway.peer.handle_initiation(older, 0.0)

    def test_a_response_to_no_handshake_of_ours_is_rejected(self) -> None:
        world = World()
        world.connect()
        late = parse(world.datagrams[1])
        assert isinstance(late, HandshakeResponse)

        assert not world.client.peer.handle_response(late, 0.0)
        assert world.client.peer.counters.responses_rejected == 1

    def test_a_forged_response_does_not_stop_the_genuine_response(self) -> None:
        world = World()
        world.client.initiate()
        initiation = parse(next(world.client.peer.transmits()))
        assert isinstance(initiation, HandshakeInitiation)
        world.gateway.peer.handle_initiation(initiation, 0.0)
        real = parse(next(world.gateway.peer.transmits()))
        assert isinstance(real, HandshakeResponse)

        assert not world.client.peer.handle_response(real._replace(sealed_nothing=bytes(16)), 0.0)
        assert world.client.peer.handle_response(real, 0.0)

    def test_a_worthless_public_key_is_refused_at_once(self) -> None:
        world = World()

        with pytest.raises(ProtocolError):
            world.client.replace_peer(remote_public_key=bytes(32))

    def test_a_worthless_ephemeral_key_releases_its_index(self) -> None:
        world = World()
        message = initiation_from(world.client.local, world.gateway.local)

        assert not world.gateway.peer.handle_initiation(message._replace(ephemeral=bytes(32)), 0.0)
        assert not world.gateway.indices

    def test_replayed_data_is_dropped(self) -> None:
        world = World()
        world.connect()
        world.client.send(b"once")
        world.settle()
        world.gateway.handle(world.datagrams[-1])

        assert world.gateway.received == [b"once"]
        assert world.gateway.peer.counters.replayed == 1


class TestLoad:
    def test_a_handshake_succeeds_under_load_with_a_cookie(self) -> None:
        world = World()
        world.client.initiate()
        world.gateway.flood()
        world.settle()
        assert [kind for _, _, kind in world.log] == [INITIATION, COOKIE]
        assert not world.gateway.events

        world.advance(world.client.retry_at())
        world.gateway.flood()
        world.settle()

        assert [kind for _, _, kind in world.log] == [INITIATION, COOKIE, INITIATION, RESPONSE, DATA]
        world.assert_traffic_flows()

    def test_a_cookie_does_not_bring_the_next_initiation_forward(self) -> None:
        world = World()
        world.client.initiate()
        world.gateway.flood()
        world.run_until(4.9)

        assert world.initiations() == 1

    def test_a_responder_is_asked_for_cookies_as_well(self) -> None:
        world = World()
        world.client.initiate()
        world.client.flood()
        world.settle()
        assert [kind for _, _, kind in world.log] == [INITIATION, RESPONSE, COOKIE]

        world.advance(world.client.retry_at())
        world.client.flood()
        world.settle()

        world.assert_traffic_flows()

    def test_a_forged_cookie_reply_is_counted(self) -> None:
        world = World()
        world.client.initiate()
        world.client.handle(b"\3\0\0\0" + bytes(60))

        assert world.client.peer.counters.cookie_replies_rejected == 1


class TestHygiene:
    def test_indices_are_released_with_their_sessions(self) -> None:
        world = World()
        world.connect()
        world.exchange_every_second(until=1000.0)
        assert len(world.client.indices) <= 2
        assert len(world.gateway.indices) <= 2

        world.client.peer.close()
        world.client.vanish()
        world.run_until(2000.0)

        assert not world.client.indices
        assert not world.gateway.indices

    def test_an_unanswered_attempt_holds_one_index_until_it_ends(self) -> None:
        world = World()
        world.lose = everything
        world.client.initiate()
        for second in range(15):
            world.run_until(float(second))
            assert len(world.client.indices) == 1
        world.run_until(15.0)

        assert not world.client.indices

    def test_an_eager_initiator_gets_at_most_eight_sessions(self) -> None:
        world = World()
        world.connect()
        for second in range(1, 31):
            world.advance(float(second))
            world.client.initiate()
            world.settle()

        assert len(world.gateway.indices) == 8
        world.assert_traffic_flows()

    def test_unconfirmed_sessions_never_push_out_the_session_in_use(self) -> None:
        world = World()
        world.connect()
        current = world.gateway.peer.sending_session(0.0)
        for number in range(30):
            world.gateway.peer.handle_initiation(
                initiation_from(world.client.local, world.gateway.local, UTC + 1 + number), 1.0
            )

        assert world.gateway.peer.sending_session(1.0) is current
        assert len(world.gateway.indices) == 8

    def test_the_keys_of_a_dropped_session_are_released(self) -> None:
        world = World()
        world.connect()
        watched = weakref.ref(world.client.only_session())
        session = watched()
        assert session is not None
        world.run_until(180.0)

        with pytest.raises(AttributeError):
            session.seal_cipher.encrypt(bytes(12), b"", None)
        del session
        gc.collect()
        assert watched() is None

    def test_a_closed_peer_keeps_no_secret_and_stays_silent(self) -> None:
        world = World(preshared_key=b"\1" * 32)
        world.connect()
        peer = world.client.peer
        peer.initiate(1.0, UTC)
        secrets = [secret for name in ("_preshared_key", "_static_secret") for secret in [getattr(peer, name)]]
        peer.close()
        peer.initiate(2.0, UTC)

        assert secrets == [bytes(32), bytes(32)]
        assert peer.sending_session(2.0) is None
        assert not peer.handle_initiation(initiation_from(world.gateway.local, world.client.local), 2.0)
        assert peer.next_timeout() is None
        assert not list(peer.transmits())
        assert not world.client.indices

    def test_no_representation_shows_a_secret(self) -> None:
        world = World()
        world.connect()

        assert repr(world.client.peer) == f"<Peer {world.gateway.local.public.hex()[:16]} with 1 sessions>"

    def test_the_static_key_in_an_initiation_finds_the_peer(self) -> None:
        world = World()

        message = initiation_from(world.client.local, world.gateway.local)

        assert open_static(world.gateway.local, message) == world.client.local.public

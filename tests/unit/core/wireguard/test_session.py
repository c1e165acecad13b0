from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from firezone_tunnel.core.wireguard.handshake import TransportKeys
from firezone_tunnel.core.wireguard.session import (
    REJECT_AFTER_MESSAGES,
    REKEY_AFTER_MESSAGES,
    WINDOW_SIZE,
    PeerCounters,
    Session,
)

COUNTERS = st.one_of(
    st.integers(0, 200), st.integers(WINDOW_SIZE - 5, WINDOW_SIZE + 5), st.integers(0, 3 * WINDOW_SIZE)
)
RUNS = st.builds(lambda first, count: list(range(first, first + count)), COUNTERS, st.integers(0, 70))
BATCHES = st.lists(st.one_of(RUNS, st.lists(COUNTERS, max_size=64)), max_size=12)


class NaiveWindow:
    """A simple replay window that remembers every counter."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def accept(self, counter: int) -> bool:
        if counter in self.seen or counter <= max(self.seen, default=-1) - WINDOW_SIZE:
            return False
        self.seen.add(counter)
        return True


class TestReplayWindow:
    @given(BATCHES, st.randoms(use_true_random=False), st.booleans())
    @example([[0], [WINDOW_SIZE], [0, 1]], None, True)
    @example([[5, 5], [4, 6, 6]], None, True)
    def test_it_accepts_the_same_counters_as_a_set_of_all_counters(
        self, batches: list[list[int]], random: object, honest: bool
    ) -> None:
        tested, model = session(), NaiveWindow()
        for batch in batches:
            authentic = [honest or random.random() < 0.9 for _ in batch]
            expected = [
                is_authentic and model.accept(counter) for counter, is_authentic in zip(batch, authentic, strict=True)
            ]
            mask = tested.accept(np.array(batch, np.uint64), np.array(authentic, np.bool_))
            assert mask.tolist() == expected

    def test_plain_lists_are_accepted(self) -> None:
        assert session().accept([3, 1, 3], [True, True, True]).tolist() == [True, True, False]

    def test_an_empty_batch_changes_nothing(self) -> None:
        assert session().accept([], []).tolist() == []

    def test_a_forged_message_does_not_shut_out_the_genuine_message(self) -> None:
        tested = session()

        assert tested.accept([7, 2**63], [False, False]).tolist() == [False, False]
        assert tested.accept([7], [True]).tolist() == [True]

    def test_counters_beyond_the_limit_are_rejected(self) -> None:
        tested = session()

        assert tested.accept([REJECT_AFTER_MESSAGES - 1], [True]).tolist() == [True]
        assert tested.accept([REJECT_AFTER_MESSAGES], [True]).tolist() == [False]
        assert tested.accept([2**64 - 1], [True]).tolist() == [False]

    def test_a_replayed_batch_is_counted(self) -> None:
        counters = PeerCounters()
        tested = session(counters=counters)
        batch = np.arange(48, dtype=np.uint64)
        authentic = np.ones(48, np.bool_)

        assert tested.accept(batch, authentic).all()
        assert not tested.accept(batch, authentic).any()
        assert not tested.accept(batch, ~authentic).any()
        assert (counters.replayed, counters.forged) == (48, 48)

    def test_the_callers_mask_is_never_changed(self) -> None:
        tested = session()
        authentic = np.ones(3, np.bool_)

        tested.accept([1, 2, 3], authentic)
        tested.accept([1, 2, 3], authentic)

        assert authentic.all()


class TestLifetime:
    def test_the_initiator_sends_for_170_seconds_and_both_receive_for_180(self) -> None:
        initiator, responder = session(initiator=True), session(initiator=False)

        assert initiator.may_send(169.9)
        assert not initiator.may_send(170.0)
        assert responder.may_send(179.9)
        assert not responder.may_send(180.0)
        for side in (initiator, responder):
            assert side.may_receive(179.9)
            assert not side.may_receive(180.0)

    def test_only_the_initiator_renews_for_age(self) -> None:
        assert not session(initiator=True).wants_rekey_after_sending(119.9)
        assert session(initiator=True).wants_rekey_after_sending(120.0)
        assert not session(initiator=False).wants_rekey_after_sending(179.0)

    def test_both_renew_after_too_many_messages_and_stop_before_the_counter_ends(self) -> None:
        for initiator in (True, False):
            tested = session(initiator=initiator)
            tested.send_counter = REKEY_AFTER_MESSAGES
            assert tested.wants_rekey_after_sending(0.0)
            assert tested.may_send(0.0)
            tested.send_counter = REJECT_AFTER_MESSAGES
            assert not tested.may_send(0.0)

    def test_counters_are_handed_out_once(self) -> None:
        tested = session()

        assert [tested.take_counters(3), tested.take_counters(1), tested.take_counters(48)] == [0, 3, 4]


class TestKeys:
    def test_no_representation_shows_the_keys(self) -> None:
        assert repr(session()) == "<Session 0x00000001 initiator since 0.000>"

    def test_a_closed_session_has_no_keys(self) -> None:
        tested = session()
        tested.close()

        with pytest.raises(AttributeError):
            tested.seal_cipher.encrypt(bytes(12), b"", None)
        with pytest.raises(AttributeError):
            tested.open_cipher.decrypt(bytes(12), bytes(16), None)

    def test_nothing_keeps_a_session_alive(self) -> None:
        tested = session()
        watched = weakref.ref(tested)
        del tested

        assert watched() is None


def session(*, initiator: bool = True, counters: PeerCounters | None = None) -> Session:
    return Session(
        TransportKeys(b"\1" * 32, b"\2" * 32),
        receiver_index=1,
        peer_index=2,
        initiator=initiator,
        serial=1,
        counters=counters or PeerCounters(),
        now=0.0,
    )

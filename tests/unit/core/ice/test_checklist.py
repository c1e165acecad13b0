"""The schedule of checks, the removal of pairs, and the limit on their number."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.ice.candidate import Candidate
from firezone_tunnel.core.ice.checklist import DEFAULT_TIMINGS, MAX_PAIRS, Checklist, Pair, Schedule
from firezone_tunnel.core.sansio import SocketAddress

_ACTIVE, _IDLE = DEFAULT_TIMINGS.active, DEFAULT_TIMINGS.idle
_LOCAL = Candidate.host(SocketAddress("10.0.0.1", 52625))
_REMOTE = Candidate.host(SocketAddress("10.0.0.2", 52625))


@pytest.mark.parametrize(("schedule", "seconds"), [(_ACTIVE, 15.25), (_IDLE, 100.0)])
def test_a_pair_that_never_answers_ends_when_its_checks_are_used_up(schedule: Schedule, seconds: float) -> None:
    checklist, pair = _one_pair(schedule)

    sent, ended_at = _run_without_answers(checklist, pair)

    assert ended_at - sent[0] == seconds
    assert len(sent) == schedule.max_checks


def test_checks_begin_at_once_and_slow_down() -> None:
    checklist, pair = _one_pair(_ACTIVE)

    sent, _ = _run_without_answers(checklist, pair)

    assert sent[:6] == [0.0, 0.25, 0.75, 1.75, 3.25, 4.75]


def test_a_pair_that_answers_goes_on_being_checked_at_the_slowest_pace() -> None:
    checklist, pair = _one_pair(_ACTIVE)

    sent = _run_with_answers(checklist, pair, until=60.0)

    gaps = [after - before for before, after in pairwise(sent)]
    assert gaps[:4] == [0.25, 0.5, 1.0, 1.5]
    assert set(gaps[4:]) == {1.5}
    assert pair in checklist


def test_a_pair_that_stops_answering_is_probed_quickly_and_ends_a_check_later_than_a_silent_pair() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    answered = _run_with_answers(checklist, pair, until=60.0)

    sent, ended_at = _run_without_answers(checklist, pair, start=60.0)

    assert sent[0] - answered[-1] == 1.5
    assert sent[1] - sent[0] == 0.75
    assert [sent[2] - sent[1], sent[3] - sent[2]] == [0.5, 1.0]
    assert 15.25 <= ended_at - sent[0] <= 15.25 + 1.5


def test_an_answer_to_an_older_check_counts() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    for number in range(3):
        checklist.sent(pair, bytes([number]), pair.due)

    checklist.answered(pair, bytes([1]), pair.due)

    assert pair.succeeded
    assert pair.unanswered == 1
    assert checklist.waiting_for(bytes([1])) is None
    assert checklist.waiting_for(bytes([0])) is pair


def test_missed_counts_only_checks_that_we_no_longer_wait_for() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    checklist.sent(pair, b"a", 0.0)

    assert pair.missed(0.2) == 0
    assert pair.missed(0.25) == 1


def test_ids_of_checks_that_fell_out_of_the_history_answer_nothing() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    for number in range(20):
        checklist.sent(pair, bytes([number]), pair.due)
        checklist.answered(pair, bytes([number]), pair.due)
    for number in range(20, 40):
        checklist.sent(pair, bytes([number]), pair.due)

    assert [n for n in range(40) if checklist.waiting_for(bytes([n]))] == list(range(28, 40))


def test_a_pair_out_of_checks_is_not_hastened_back_to_life() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    for number in range(12):
        checklist.sent(pair, bytes([number]), pair.due)
    due = pair.due

    checklist.hasten(pair, due - 1.0)

    assert pair.due == due
    checklist.remove_exhausted(due)
    assert len(checklist) == 0


def test_on_becoming_active_again_a_pair_is_checked_soon() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    _run_with_answers(checklist, pair, until=30.0)
    checklist.follow(_IDLE)
    last = _run_with_answers(checklist, pair, until=120.0)[-1]

    assert pair.due == last + 25.0
    checklist.follow(_ACTIVE)
    assert pair.due == last + 1.5


def test_the_nominated_pair_is_checked_before_pairs_that_were_due_earlier() -> None:
    checklist, pair = _one_pair(_ACTIVE)
    other = checklist.add(_LOCAL, Candidate.host(SocketAddress("10.0.0.3", 52625)), -1.0, spare=None)

    assert checklist.next_check(0.0, None) is other
    assert checklist.next_check(0.0, pair) is pair


def test_the_better_of_two_pairs_due_at_once_is_checked_first() -> None:
    checklist = Checklist(controlling=True, schedule=_ACTIVE)
    relayed = checklist.add(_LOCAL, Candidate.relayed(SocketAddress("10.9.0.1", 50000)), 0.0, spare=None)
    direct = checklist.add(_LOCAL, _REMOTE, 0.0, spare=None)

    assert relayed is not None
    assert checklist.next_check(0.0, None) is direct


def test_a_base_and_a_remote_address_form_a_single_pair() -> None:
    checklist, pair = _one_pair(_ACTIVE)

    assert checklist.add(_LOCAL.lowered(), _REMOTE.lowered(), 5.0, spare=None) is pair
    assert len(checklist) == 1


def test_addresses_of_different_families_make_no_pair() -> None:
    checklist = Checklist(controlling=True, schedule=_ACTIVE)

    assert checklist.add(_LOCAL, Candidate.host(SocketAddress("2001:db8::1", 1)), 0.0, spare=None) is None


def test_a_full_list_replaces_its_worst_pair_only_by_a_better_pair() -> None:
    checklist = Checklist(controlling=True, schedule=_ACTIVE)
    pairs = [checklist.add(_LOCAL, _reflexive(number), 0.0, spare=None) for number in range(MAX_PAIRS)]
    worst = min((pair for pair in pairs if pair), key=lambda pair: pair.priority)
    checklist.sent(worst, b"worst", 0.0)

    assert checklist.add(_LOCAL, Candidate.relayed(SocketAddress("10.9.0.1", 1)), 0.0, spare=None) is None
    assert checklist.add(_LOCAL, _REMOTE, 0.0, spare=None) is not None

    assert len(checklist) == MAX_PAIRS
    assert worst not in checklist
    assert checklist.waiting_for(b"worst") is None


def test_the_pair_in_use_is_not_replaced_by_a_better_pair() -> None:
    checklist = Checklist(controlling=True, schedule=_ACTIVE)
    pairs = [checklist.add(_LOCAL, _reflexive(number), 0.0, spare=None) for number in range(MAX_PAIRS)]
    worst = min((pair for pair in pairs if pair), key=lambda pair: pair.priority)

    checklist.add(_LOCAL, _REMOTE, 0.0, spare=worst)

    assert worst in checklist


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.booleans()), max_size=60), st.sampled_from([_ACTIVE, _IDLE]))
def test_the_next_check_is_never_immediate_nor_later_than_the_slowest_pace(
    steps: list[tuple[float, bool]], schedule: Schedule
) -> None:
    checklist, pair = _one_pair(schedule)
    now = 0.0
    for number, (late, is_answered) in enumerate(steps):
        now = pair.due + late
        checklist.remove_exhausted(now)
        if pair not in checklist:
            return
        checklist.sent(pair, number.to_bytes(2, "big"), now)
        assert 0.0 < pair.due - now <= schedule.max_rto + 1e-6
        if is_answered:
            checklist.answered(pair, number.to_bytes(2, "big"), now)
            assert 0.0 < pair.due - now <= schedule.max_rto + 1e-6
            assert not pair.is_exhausted(now + 1000.0, schedule)


def _one_pair(schedule: Schedule) -> tuple[Checklist, Pair]:
    checklist = Checklist(controlling=True, schedule=schedule)
    pair = checklist.add(_LOCAL, _REMOTE, 0.0, spare=None)
    assert pair is not None
    return checklist, pair


def _run_without_answers(checklist: Checklist, pair: Pair, start: float = 0.0) -> tuple[list[float], float]:
    """The times at which checks were sent, and at which the pair was removed."""
    sent: list[float] = []
    while True:
        now = max(pair.due, start)
        checklist.remove_exhausted(now)
        if pair not in checklist:
            return sent, now
        checklist.sent(pair, f"unanswered {len(sent)}".encode(), now)
        sent.append(now)


def _run_with_answers(checklist: Checklist, pair: Pair, *, until: float) -> list[float]:
    sent: list[float] = []
    while pair.due < until:
        now = pair.due
        transaction_id = f"answered {now}".encode()
        checklist.sent(pair, transaction_id, now)
        checklist.answered(pair, transaction_id, now)
        sent.append(now)
    return sent


def _reflexive(number: int) -> Candidate:
    return Candidate.server_reflexive(SocketAddress("203.0.113.1", 1000 + number), _LOCAL.base)

"""How long a silence was, by the pings around it."""

from __future__ import annotations

import pytest

from benchmarks.recovery import silence_in
from tests.system.traffic import PING_INTERVAL, Answer

ROUND_TRIP = 0.002


def test_a_silence_lasts_from_the_last_answer_to_the_next_less_one_interval() -> None:
    answers = _answers(*range(20), *range(60, 80))

    assert silence_in(answers, since=19.5 * PING_INTERVAL) == pytest.approx(40 * PING_INTERVAL)


def test_without_a_missing_answer_there_was_no_silence() -> None:
    assert silence_in(_answers(*range(60)), since=1.0) == 0.0


def test_pings_that_are_answered_late_were_a_silence_too() -> None:
    kept = [Answer(n, n * PING_INTERVAL, 2.0) for n in range(20, 40)]
    later = [Answer(n, n * PING_INTERVAL, n * PING_INTERVAL + ROUND_TRIP) for n in range(40, 60)]

    assert silence_in([*_answers(*range(20)), *kept, *later], since=1.0) == pytest.approx(1.0, abs=PING_INTERVAL)


def test_what_went_missing_before_is_not_counted() -> None:
    assert silence_in(_answers(*range(10), *range(40, 100)), since=41.5 * PING_INTERVAL) == 0.0


def test_of_two_silences_the_longer_one_counts() -> None:
    answers = _answers(*range(20), *range(30, 40), *range(80, 99))

    assert silence_in(answers, since=19.5 * PING_INTERVAL) == pytest.approx(40 * PING_INTERVAL)


def _answers(*numbers: int) -> list[Answer]:
    """Each sent in its turn and answered at once."""
    return [Answer(n, n * PING_INTERVAL, n * PING_INTERVAL + ROUND_TRIP) for n in numbers]

"""Limiting how often a message repeats."""

from __future__ import annotations

from typing import Any

import pytest

from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_repetitions_are_suppressed_for_an_interval_and_then_counted(
    clock: Clock, logged: list[dict[str, Any]]
) -> None:
    limiter = Limiter(clock=clock)

    for seconds in (0, 1, 59.9, 60, 61, 120):
        clock.now = 1000 + seconds
        limiter.warning("area:happened", at=seconds)

    assert [(message["at"], message.get("suppressed")) for message in logged] == [(0, None), (60, 2), (120, 1)]
    assert {message["level"] for message in logged} == {"warning"}


def test_a_message_without_repetitions_has_no_count(clock: Clock, logged: list[dict[str, Any]]) -> None:
    limiter = Limiter(clock=clock)

    limiter.info("area:happened")
    clock.now += 3600
    limiter.info("area:happened")

    assert ["suppressed" in message for message in logged] == [False, False]
    assert {message["level"] for message in logged} == {"info"}


def test_suppressed_messages_are_logged_at_debug(clock: Clock, logged: list[dict[str, Any]]) -> None:
    log.set_threshold(log.DEBUG)
    limiter = Limiter(clock=clock)

    for number in range(3):
        limiter.warning("area:happened", number=number)

    assert [(message["level"], message["number"]) for message in logged] == [("warning", 0), ("debug", 1), ("debug", 2)]


def test_keys_and_message_types_are_limited_separately(clock: Clock, logged: list[dict[str, Any]]) -> None:
    limiter = Limiter(clock=clock)

    for _ in range(2):
        limiter.warning("area:happened", key="a", rid="a")
        limiter.warning("area:happened", key="b", rid="b")
        limiter.warning("area:ended", key="a", rid="a")

    assert [(message["message_type"], message["rid"]) for message in logged] == [
        ("area:happened", "a"),
        ("area:happened", "b"),
        ("area:ended", "a"),
    ]


def test_many_keys_cannot_fill_the_log_nor_the_memory(clock: Clock, logged: list[dict[str, Any]]) -> None:
    limiter = Limiter(clock=clock, max_keys=4)

    for key in range(1000):
        limiter.warning("area:happened", key=key)
    clock.now += 60
    for key in range(1000, 2000):
        limiter.warning("area:happened", key=key)

    assert len(logged) == 8
    assert [message.get("suppressed") for message in logged] == [None] * 4 + [996] + [None] * 3
    assert len(limiter._logged_at) == 4
    assert len(limiter._suppressed) == 0


def test_a_known_key_keeps_its_count_while_others_come_and_go(clock: Clock, logged: list[dict[str, Any]]) -> None:
    limiter = Limiter(clock=clock, max_keys=2)

    for key in ("a", "a", "b", "c"):
        limiter.warning("area:happened", key=key, rid=key)
    clock.now += 60
    for key in ("a", "c"):
        limiter.warning("area:happened", key=key, rid=key)

    # "c" takes the place of "b", and has the count of the keys that found no place.
    assert [(message["rid"], message.get("suppressed")) for message in logged] == [
        ("a", None),
        ("b", None),
        ("a", 1),
        ("c", 1),
    ]

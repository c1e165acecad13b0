"""Serialized work."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.shell.reactor.serial import SerialRunner


@pytest.fixture
def failures() -> list[Failure]:
    return []


@pytest.fixture
def runner(failures: list[Failure]) -> SerialRunner:
    return SerialRunner(failures.append)


def test_work_runs_one_at_a_time_in_the_order_requested(runner: SerialRunner) -> None:
    log: list[str] = []
    first, second = Deferred[None](), Deferred[None]()

    runner.request(_work(log, "first", first))
    runner.request(_work(log, "second", second))

    assert log == ["first begins"]
    first.callback(None)
    assert log == ["first begins", "first ends", "second begins"]
    second.callback(None)
    assert log[-1] == "second ends"


def test_work_that_waits_is_not_queued_again_and_runs_once_more_if_requested_while_it_runs(
    runner: SerialRunner,
) -> None:
    log: list[str] = []
    slow = Deferred[None]()
    runner.request(_work(log, "slow", slow))
    work = _work(log, "work")

    for _ in range(10_000):
        runner.request(work)
    slow.callback(None)

    assert log == ["slow begins", "slow ends", "work begins", "work ends"]
    runner.request(work)
    assert log.count("work ends") == 2


def test_any_number_of_different_pieces_may_wait(runner: SerialRunner, failures: list[Failure]) -> None:
    """A DeferredLock with 124 waiters recursed too deeply, and held the lock for ever."""
    log: list[str] = []
    slow = Deferred[None]()
    runner.request(_work(log, "slow", slow))
    for number in range(3000):
        runner.request(_work(log, str(number)))

    slow.callback(None)

    assert log[-1] == "2999 ends"
    assert failures == []


def test_a_failure_is_reported_and_the_rest_goes_on(runner: SerialRunner, failures: list[Failure]) -> None:
    log: list[str] = []

    async def failing() -> None:
        raise KeyError("a bug")

    runner.request(failing)
    runner.request(_work(log, "next"))

    assert [failure.type for failure in failures] == [KeyError]
    assert log == ["next begins", "next ends"]


def test_closing_lets_the_current_work_finish_and_drops_the_rest(runner: SerialRunner) -> None:
    log: list[str] = []
    slow = Deferred[None]()
    runner.request(_work(log, "slow", slow))
    runner.request(_work(log, "dropped"))

    runner.close(_work(log, "last"))
    runner.close(_work(log, "a second close"))
    runner.request(_work(log, "late"))
    slow.callback(None)

    assert log == ["slow begins", "slow ends", "last begins", "last ends"]


def _work(log: list[str], name: str, done: Deferred[None] | None = None) -> Callable[[], Coroutine[Any, Any, None]]:
    async def work() -> None:
        log.append(f"{name} begins")
        if done is not None:
            await done
        log.append(f"{name} ends")

    return work

"""Timers under the real reactor."""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as any_reactor
from twisted.internet.defer import Deferred

from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, call_later, utc
from firezone_tunnel.shell.reactor.queues import BoundedQueue

_reactor: Any = any_reactor


@pytest_twisted.ensureDeferred
async def test_a_timer_fires_once_its_deadline_has_passed(timers: Timers) -> None:
    timer, fired = timers.new()
    deadline = boottime() + 0.05

    timer.set(deadline)
    at = await fired

    assert deadline <= at < deadline + 1
    assert timer.deadline is None


@pytest_twisted.ensureDeferred
async def test_a_deadline_in_the_past_fires_at_once(timers: Timers) -> None:
    timer, fired = timers.new()
    before = boottime()

    timer.set(before - 100)

    assert await fired < before + 1


@pytest_twisted.ensureDeferred
async def test_a_later_deadline_replaces_the_earlier_one(timers: Timers) -> None:
    timer, fired = timers.new()
    now = boottime()

    timer.set(now + 0.01)
    timer.set(now + 0.1)

    assert await fired >= now + 0.1


@pytest_twisted.ensureDeferred
async def test_a_timer_that_is_unset_does_not_fire(timers: Timers) -> None:
    unset, unwanted = timers.new()
    other, fired = timers.new()
    now = boottime()

    unset.set(now + 0.01)
    unset.set(None)
    other.set(now + 0.05)
    await fired

    assert not unwanted.called


@pytest_twisted.ensureDeferred
async def test_a_timer_that_is_set_anew_after_it_expired_waits_for_the_new_deadline(timers: Timers) -> None:
    """Another event of the same turn moves the deadline after the reactor has seen the expiry."""
    timer, fired = timers.new()
    timer.set(boottime() - 1)
    deadline = boottime() + 0.05
    timer.set(deadline)

    timer.doRead()

    assert not fired.called
    assert await fired >= deadline


@pytest_twisted.ensureDeferred
async def test_a_callback_that_raises_is_called_again_a_second_later(timers: Timers) -> None:
    called: list[float] = []
    again: Deferred[float] = Deferred()

    def fail() -> None:
        called.append(boottime())
        if len(called) == 1:
            raise KeyError("a failure")
        again.callback(called[1] - called[0])

    timers.calling(fail).set(boottime())

    assert 0.9 < await again < 2


@pytest_twisted.ensureDeferred
async def test_a_callback_that_raises_after_setting_the_timer_again_is_called_when_it_said(timers: Timers) -> None:
    called: list[float] = []
    again: Deferred[float] = Deferred()

    def fail() -> None:
        called.append(boottime())
        if len(called) == 1:
            timer.set(boottime())
            raise KeyError("a failure")
        again.callback(called[1] - called[0])

    timer = timers.calling(fail)
    timer.set(boottime())

    assert await again < 0.5


@pytest_twisted.ensureDeferred
async def test_a_delayed_call_comes_once_in_a_later_turn_and_leaves_no_descriptor() -> None:
    before = boottime()
    calls: list[float] = []

    at_once = call_later(_reactor, 0, lambda: calls.append(boottime()))
    later = call_later(_reactor, 0.05, lambda: calls.append(boottime()))
    assert calls == []
    await _until(lambda: len(calls) == 2)

    assert before <= calls[0] < before + 0.05 <= calls[1]
    assert at_once.fileno() == later.fileno() == -1


@pytest_twisted.ensureDeferred
async def test_a_delayed_call_that_is_closed_does_not_come() -> None:
    calls: list[str] = []
    unwanted = call_later(_reactor, 0.01, lambda: calls.append("unwanted"))
    call_later(_reactor, 0.05, lambda: calls.append("wanted"))

    unwanted.close()
    await _until(lambda: bool(calls))

    assert calls == ["wanted"]


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
@pytest_twisted.ensureDeferred
async def test_a_step_of_the_wall_clock_neither_delays_nor_hastens_anything(
    timers: Timers, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    timer, fired = timers.new()
    got: list[int] = []
    queue: BoundedQueue[int] = BoundedQueue(_reactor, 2, got.append)
    called: Deferred[float] = Deferred()
    before = boottime()

    timer.set(before + 0.05)
    queue.put(1)
    call_later(_reactor, 0.05, lambda: called.callback(boottime()))
    wall_clock = _reactor.seconds
    monkeypatch.setattr(_reactor, "seconds", lambda: wall_clock() + step)

    for at in (await fired, await called):
        assert before + 0.05 <= at < before + 1
    assert got == [1]
    queue.close()


def test_a_closed_timer_holds_no_descriptor(timers: Timers) -> None:
    timer, _ = timers.new()

    timer.close()
    timer.close()
    timer.set(boottime())

    assert (timer.fileno(), timer.deadline) == (-1, None)


def test_running_out_of_descriptors_is_reported(timers: Timers) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError) as failure:
            timers.new()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert failure.value.errno == errno.EMFILE


def test_the_clocks_match_the_kernels() -> None:
    assert abs(boottime() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
    assert abs(utc() - time.time()) < 1


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        turn: Deferred[None] = Deferred()
        call_later(_reactor, 0.005, partial(turn.callback, None))
        await turn


class Timers:
    """Makes timers under the running reactor; `fired` becomes the time at which a timer fired."""

    def __init__(self) -> None:
        self._timers: list[BoottimeTimer] = []

    def new(self) -> tuple[BoottimeTimer, Deferred[float]]:
        fired: Deferred[float] = Deferred()
        return self.calling(lambda: fired.callback(boottime())), fired

    def calling(self, callback: Callable[[], object]) -> BoottimeTimer:
        from twisted.internet import reactor

        timer = BoottimeTimer(reactor, callback)
        self._timers.append(timer)
        return timer

    def close(self) -> None:
        for timer in self._timers:
            timer.close()


@pytest.fixture
def timers() -> Iterator[Timers]:
    timers = Timers()
    yield timers
    timers.close()

"""How late the reactor is, measured while it is busy."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from firezone_tunnel.shell.reactor.clock import boottime
from firezone_tunnel.shell.reactor.lag import LoopLag

pytestmark = pytest.mark.serial


@pytest.fixture
def lag() -> Iterator[LoopLag]:
    lag = LoopLag(reactor)
    yield lag
    lag.close()


@pytest_twisted.ensureDeferred
async def test_an_idle_process_is_not_woken_and_nothing_is_measured(lag: LoopLag) -> None:
    await _sleep(0.06)

    assert lag.quantile_ms(0.5) is None
    assert lag.worst == 0


@pytest_twisted.ensureDeferred
async def test_a_turn_that_takes_long_is_the_worst_of_all(lag: LoopLag) -> None:
    for _ in range(3):
        lag.busy(boottime())
        await _sleep(0.05)

    lag.busy(boottime())
    time.sleep(0.2)  # which the reactor must never do
    await _sleep(0.05)

    assert 0.15 < lag.worst < 2
    worst = lag.quantile_ms(1.0)
    assert worst is not None
    assert lag.worst * 1000 <= worst <= lag.worst * 1000 + 1
    typical = lag.quantile_ms(0.25)
    assert typical is not None
    assert typical < worst


@pytest_twisted.ensureDeferred
async def test_packets_of_20_ms_share_a_tick_and_the_last_is_followed_by_silence() -> None:
    now = 1000.0
    lag = LoopLag(reactor, lambda: now)

    lag.busy(now)
    lag.busy(now + 0.01)
    assert lag._timer.deadline == pytest.approx(1000.02)
    now = 1000.05
    lag._timer.set(None)
    lag._tick()

    assert lag._timer.deadline is None
    assert lag.worst == pytest.approx(0.03)
    lag.busy(now)
    assert lag._timer.deadline == pytest.approx(1000.07)
    await _sleep(0)
    lag.close()


@pytest_twisted.ensureDeferred
async def test_lateness_beyond_the_histogram_is_in_its_last_bucket() -> None:
    now = 1000.0
    lag = LoopLag(reactor, lambda: now)
    lag.busy(now)
    now = 1100.0

    lag._tick()

    assert lag.quantile_ms(0.5) == 1000
    await _sleep(0)
    lag.close()


async def _sleep(seconds: float) -> None:
    await deferLater(reactor, seconds, lambda: None)

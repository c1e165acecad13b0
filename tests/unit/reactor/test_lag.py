"""How late the reactor is, measured while it is busy."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from firezone_tunnel.reactor.clock import boottime
from firezone_tunnel.reactor.lag import LoopLag


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
    lag.busy(boottime())
    await _sleep(0.05)

    time.sleep(0.2)  # what the reactor must never do
    await _sleep(0.05)

    assert 0.15 < lag.worst < 2
    worst = lag.quantile_ms(1.0)
    assert worst is not None
    assert lag.worst * 1000 <= worst <= lag.worst * 1000 + 1
    typical = lag.quantile_ms(0.25)
    assert typical is not None
    assert typical < worst


@pytest_twisted.ensureDeferred
async def test_it_goes_on_for_as_long_as_packets_flow_and_then_sleeps() -> None:
    now = 1000.0
    lag = LoopLag(reactor, lambda: now)

    lag.busy(now)
    assert lag._timer.deadline == pytest.approx(1000.002)
    now = 1000.05
    lag._tick()
    assert lag._timer.deadline == pytest.approx(1000.052)
    now = 1000.1
    lag._tick()

    assert lag.worst == pytest.approx(0.048)
    await _sleep(0)
    lag.close()


@pytest_twisted.ensureDeferred
async def test_ticks_without_a_packet_between_them_are_calm() -> None:
    now, calm = 1000.0, []
    lag = LoopLag(reactor, lambda: now, when_calm=lambda: calm.append(now))

    lag.busy(now)
    for now in (1000.002, 1000.004, 1000.006):
        if now == 1000.006:
            lag.busy(now - 0.001)
        lag._tick()

    assert calm == [1000.004]
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

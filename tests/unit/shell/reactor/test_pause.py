"""A pause of the process is noticed in the first turn after it, and once."""

from __future__ import annotations

import errno
import os

import pytest

from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime
from firezone_tunnel.shell.reactor.pause import MIN_PAUSE, PauseDetector
from tests.unit.shell.reactor.turns import Turns


class Machine:
    """A detector, and the two clocks that a suspend tells apart."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.awake = 700.0
        self.pauses: list[float] = []
        self.turns = Turns()
        self.detector = PauseDetector(self.turns, self.pauses.append, clock=lambda: self.now, awake=lambda: self.awake)

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.awake += seconds

    def suspend(self, seconds: float) -> None:
        self.now += seconds

    def set_wall_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel sets the wall clock, at resume or for any other reason."""

        def cancelled(fd: int, size: int) -> bytes:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

        with monkeypatch.context() as patch:
            patch.setattr(os, "read", cancelled)
            self.detector.doRead()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize("seconds", [MIN_PAUSE, 600.0, 86400.0])
def test_a_suspend_is_noticed_when_the_kernel_sets_the_wall_clock(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    machine.detector.start()
    machine.run(50.0)
    machine.suspend(seconds)

    machine.set_wall_clock(monkeypatch)
    machine.set_wall_clock(monkeypatch)
    machine.detector.close()

    assert machine.pauses == [pytest.approx(seconds)]


def test_a_wall_clock_that_is_set_is_not_a_pause(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.detector.start()
    machine.run(50.0)

    machine.set_wall_clock(monkeypatch)
    machine.detector.close()

    assert machine.pauses == []


def test_it_sleeps_while_nothing_happens(machine: Machine) -> None:
    machine.detector.start()

    machine.turns.run()
    machine.detector.close()
    machine.detector.close()

    assert (machine.pauses, machine.turns.readers, machine.detector.fileno()) == ([], [], -1)


def test_a_suspend_shows_in_a_timer_too_and_is_reported_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.detector.start()
    due = machine.now + 4.0
    machine.suspend(600.0)

    machine.detector.fired(due)
    machine.set_wall_clock(monkeypatch)
    machine.detector.fired(due + 1.0)
    machine.detector.close()

    assert machine.pauses == [pytest.approx(600.0)]


def test_a_stopped_process_is_as_late_as_its_first_timer(machine: Machine) -> None:
    due = machine.now + 4.0
    machine.run(30.0)

    for deadline in (due, due + 1.0, due + 25.0):
        machine.detector.fired(deadline)

    assert machine.pauses == [pytest.approx(26.0)]


def test_each_pause_is_reported(machine: Machine) -> None:
    for _ in range(2):
        machine.run(10.0)
        due = machine.now + 1.0
        machine.run(21.0)
        machine.detector.fired(due)

    assert machine.pauses == [pytest.approx(20.0)] * 2


@pytest.mark.parametrize("late", [0.0, MIN_PAUSE - 0.1])
def test_the_lag_of_a_busy_process_is_not_a_pause(machine: Machine, late: float) -> None:
    due = machine.now + 1.0
    machine.run(1.0 + late)

    machine.detector.fired(due)

    assert machine.pauses == []


def test_a_timer_tells_how_late_it_fires_before_it_calls() -> None:
    turns = Turns()
    seen: list[object] = []
    timer = BoottimeTimer(turns, lambda: seen.append("called"), observe=seen.append)
    deadline = boottime() - 5.0

    timer.set(deadline)
    turns.run()
    timer.close()

    assert seen == [deadline, "called"]


def test_a_timer_that_its_observer_puts_off_or_closes_does_not_call() -> None:
    turns = Turns()
    seen: list[str] = []
    later = BoottimeTimer(turns, lambda: seen.append("called"), observe=lambda _: later.set(boottime() + 60))
    closed = BoottimeTimer(turns, lambda: seen.append("called"), observe=lambda _: closed.close())

    later.set(0.0)
    closed.set(0.0)
    turns.run()
    later.close()

    assert (seen, turns.readers) == ([], [])

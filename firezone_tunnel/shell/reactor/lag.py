"""How late the reactor comes to what is due, measured while packets flow. An idle process stays asleep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime

PERIOD = 0.02  # seconds
_BUCKETS = 1000  # of a millisecond each; the last one holds everything later


class LoopLag:
    """A histogram of how many milliseconds late a timer fired that was set 20 ms ahead when a packet passed."""

    def __init__(self, reactor: Any, clock: Callable[[], float] = boottime) -> None:
        self.worst = 0.0  # seconds
        self._clock = clock
        self._timer = BoottimeTimer(reactor, self._tick)
        self._late = [0] * _BUCKETS
        self._due: float | None = None

    def busy(self, now: float) -> None:
        """A packet passed."""
        if self._due is None:
            self._due = now + PERIOD
            self._timer.set(self._due)

    def quantile_ms(self, fraction: float) -> int | None:
        """The lateness in milliseconds that this share of the samples did not exceed; None without samples."""
        total = sum(self._late)
        seen = 0
        for milliseconds, count in enumerate(self._late):
            seen += count
            if total and seen >= fraction * total:
                return milliseconds + 1
        return None

    def close(self) -> None:
        self._timer.close()

    def _tick(self) -> None:
        due, self._due = self._due, None
        if due is None:
            return
        late = max(0.0, self._clock() - due)
        self.worst = max(self.worst, late)
        self._late[min(int(late * 1000), _BUCKETS - 1)] += 1

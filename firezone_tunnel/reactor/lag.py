"""How late the reactor comes to what is due: measured while packets flow, so that an idle process stays asleep.

The ticks have a second use. A process that sleeps for ten milliseconds finds the processor's caches cold, and a lone
packet's way through it takes three times as long. Between the packets of a conversation the ticks keep it awake, and
give it time to rehearse. A ping every 10 ms took 0.76 ms through the whole tunnel with 20 ms between ticks, 0.60
with 2 ms, and no less with 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firezone_tunnel.reactor.clock import BoottimeTimer, boottime

PERIOD = 0.002  # seconds, as all times here
BUSY_FOR = 0.1  # after a packet
_BUCKETS = 1000  # of a millisecond each; the last one holds all that is later


class LoopLag:
    """A histogram of how many milliseconds late a timer fired that was due every 2 ms of a busy time."""

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float] = boottime,
        *,
        when_calm: Callable[[], object] = lambda: None,
    ) -> None:
        """`when_calm` is called by the ticks of a busy time between which there was no packet."""
        self.worst = 0.0  # seconds
        self._clock = clock
        self._when_calm = when_calm
        self._has_rested = True
        self._timer = BoottimeTimer(reactor, self._tick)
        self._late = [0] * _BUCKETS
        self._busy_until = float("-inf")
        self._due = 0.0

    def busy(self, now: float) -> None:
        """Packets are flowing."""
        self._has_rested = False
        is_asleep = now >= self._busy_until
        self._busy_until = now + BUSY_FOR
        if is_asleep:
            self._schedule(now)

    def quantile_ms(self, fraction: float) -> int | None:
        """That share of all was late by no more than this; None while nothing has been measured."""
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
        now = self._clock()
        late = max(0.0, now - self._due)
        self.worst = max(self.worst, late)
        self._late[min(int(late * 1000), _BUCKETS - 1)] += 1
        if self._has_rested:
            self._when_calm()
        self._has_rested = True
        if now < self._busy_until:
            self._schedule(now)

    def _schedule(self, now: float) -> None:
        self._due = now + PERIOD
        self._timer.set(self._due)

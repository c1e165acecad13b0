"""Notice that this process didn't run for a while: suspend, a paused virtual machine, or SIGSTOP."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from functools import partial

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.shell.reactor.clock import boottime, create_timer, set_timer

MIN_PAUSE = 3.0
"""Seconds. A shorter one harms nothing, and a busy process may lag as much."""

_monotonic = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
_NEVER = 1 << 33  # seconds of unix time, as far as the kernel counts nanoseconds


@implementer(IReadDescriptor)
class PauseDetector:
    """Calls `on_pause(seconds)` in the first turn after a pause, once for each, without a wake-up of its own.

    The kernel wakes a timer on the wall clock when that is set, which it is at resume; CLOCK_MONOTONIC has stood still
    meanwhile, CLOCK_BOOTTIME has not. A pause that no clock notices shows in timers that fire late: give `fired` to
    those of the process as their `observe`. It then counts from the deadline on, so the pause may have been longer.
    """

    def __init__(
        self,
        reactor: IReactorFDSet,
        on_pause: Callable[[float], object],
        *,
        clock: Callable[[], float] = boottime,
        awake: Callable[[], float] = _monotonic,
    ) -> None:
        """`clock` goes on during suspend, `awake` stands still; both in seconds."""
        self._reactor = reactor
        self._on_pause = on_pause
        self._clock = clock
        self._awake = awake
        self._slept = clock() - awake()
        self._noticed_at = clock()
        self._fd = -1

    def start(self) -> None:
        """
        Raises: OSError, where the process is out of file descriptors.
        """
        self._fd = create_timer(time.CLOCK_REALTIME)
        self._arm()
        self._reactor.addReader(self)

    def close(self) -> None:
        """May be called more than once."""
        if self._fd == -1:
            return
        self._reactor.removeReader(self)
        os.close(self._fd)
        self._fd = -1

    def fired(self, deadline: float) -> None:
        """A timer that was due then has fired, in `clock` seconds."""
        if deadline > self._noticed_at:  # else: it waited for the end of the same pause
            self._look(self._clock() - deadline)

    def fileno(self) -> int:
        return self._fd

    def doRead(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        self._arm()
        self._look(0.0)

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def logPrefix(self) -> str:
        return "PauseDetector"

    def _arm(self) -> None:
        set_timer(self._fd, _NEVER * 1_000_000_000, cancel_on_set=True)

    def _look(self, late: float) -> None:
        now = self._clock()
        before, self._slept = self._slept, now - self._awake()
        pause = max(late, self._slept - before)
        if pause >= MIN_PAUSE:
            self._noticed_at = now
            self._on_pause(pause)

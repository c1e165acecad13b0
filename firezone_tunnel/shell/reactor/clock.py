"""The shell's clocks: seconds since boot, which go on during suspend and never step, and unix time.

`reactor.callLater` runs on the wall clock, which may be set: every deadline runs on a `BoottimeTimer`, and whatever is
due once runs by `call_later`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.shell.reactor.boundary import Boundary

_TRY_AGAIN_AFTER = 1.0


boottime: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""CLOCK_BOOTTIME in seconds: the `now` of every core."""

utc = time.time
"""Unix time in seconds: the `utc_now` of every core."""


@implementer(IReadDescriptor)
class BoottimeTimer:
    """One timer on CLOCK_BOOTTIME: `callback()` is called by the reactor once the deadline has passed.

    It fires once for each `set`; setting it again replaces the deadline, and a deadline in the past fires in the
    next turn. A callback that raises without having set it again is called again a second later: what was due may be
    so still. It holds a file descriptor until `close()`.
    """

    def __init__(
        self,
        reactor: IReactorFDSet,
        callback: Callable[[], object],
        *,
        observe: Callable[[float], object] = lambda deadline: None,
    ) -> None:
        """`observe(deadline)` is called before each `callback()`, for those who look at how late it comes.

        Raises: OSError, where the process is out of file descriptors.
        """
        self._reactor = reactor
        self._callback = callback
        self._observe = observe
        self._boundary = Boundary("process:timer_failed")
        self._deadline: float | None = None
        self._fd = create_timer(time.CLOCK_BOOTTIME)
        reactor.addReader(self)

    @property
    def deadline(self) -> float | None:
        """The current deadline; None if none is set."""
        return self._deadline

    def set(self, deadline: float | None) -> None:
        """Fire at `deadline`, in `boottime()` seconds; None: not at all."""
        if deadline == self._deadline or self._fd == -1:
            return
        self._deadline = deadline
        # Zero would disarm it; a time long past fires at once.
        set_timer(self._fd, 0 if deadline is None else max(1, round(deadline * 1e9)))

    def close(self) -> None:
        """Never fire again. May be called more than once."""
        if self._fd == -1:
            return
        self._reactor.removeReader(self)
        os.close(self._fd)
        self._fd = -1
        self._deadline = None

    def fileno(self) -> int:
        return self._fd

    def doRead(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew after the reactor saw it fire
            return
        deadline, self._deadline = self._deadline, None
        with self._boundary:  # the reactor would close it
            if deadline is not None:
                self._observe(deadline)
            if self._deadline is None and self._fd != -1:  # else: what was due has been put off, or will not come
                self._callback()
            return
        if self._deadline is None:
            self.set(boottime() + _TRY_AGAIN_AFTER)

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def logPrefix(self) -> str:
        return "BoottimeTimer"


def call_later(reactor: IReactorFDSet, seconds: float, callback: Callable[[], object]) -> BoottimeTimer:
    """Call `callback()` once, in a later turn. The timer closes itself then; closing it earlier cancels the call.

    Raises: OSError, where the process is out of file descriptors.
    """

    def call() -> None:
        timer.close()
        callback()

    timer = BoottimeTimer(reactor, call)
    timer.set(boottime() + seconds)
    return timer


if sys.version_info >= (3, 13):

    def create_timer(clock: int) -> int:
        """A timerfd on one of the kernel's clocks, non-blocking (timerfd_create(2)).

        Raises: OSError.
        """
        return os.timerfd_create(clock, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)

    def set_timer(fd: int, nanoseconds: int, *, cancel_on_set: bool = False) -> None:
        """Let it expire at this time of its clock; 0: not at all. `cancel_on_set`: reading fails once that clock steps.

        Raises: OSError.
        """
        flags = os.TFD_TIMER_ABSTIME | (os.TFD_TIMER_CANCEL_ON_SET if cancel_on_set else 0)
        os.timerfd_settime_ns(fd, flags=flags, initial=nanoseconds)

else:
    import ctypes

    _TFD_TIMER_ABSTIME = 1  # <sys/timerfd.h>
    _TFD_TIMER_CANCEL_ON_SET = 2
    _TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

    class _TimeSpec(ctypes.Structure):
        _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    class _ITimerSpec(ctypes.Structure):
        _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))

    _libc = ctypes.CDLL(None, use_errno=True)

    def create_timer(clock: int) -> int:
        return _checked(_libc.timerfd_create(clock, _TFD_FLAGS))

    def set_timer(fd: int, nanoseconds: int, *, cancel_on_set: bool = False) -> None:
        value = _ITimerSpec(value=_TimeSpec(*divmod(nanoseconds, 1_000_000_000)))
        flags = _TFD_TIMER_ABSTIME | (_TFD_TIMER_CANCEL_ON_SET if cancel_on_set else 0)
        _checked(_libc.timerfd_settime(fd, flags, ctypes.byref(value), None))

    def _checked(result: int) -> int:
        if result == -1:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

"""Keep the host's network as it is wanted, whoever changes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.errors import FirezoneError, PlatformError, one_line
from firezone_tunnel.shell.host.parts import EVERYTHING, Aspect, HostState, Part
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime

LOOK_INTERVAL = 60.0
"""Seconds between looks without a reason. The kernel reports nearly every change."""

RETRY_INTERVAL = 1.0
"""Seconds between repairs where another program fights, and before the second attempt at what can't be put right."""

MAX_RETRY_INTERVAL = 10.0

REPAIRS_AT_ONCE = 5
CALM = 30.0
"""Seconds without a repair after which another program is no longer held to fight."""

SETTINGS_DELAY = 0.2
"""Seconds after a changed setting before it is looked at."""

_SHARE_OF_TIME = 10
"""A look that the kernel's notifications cause waits this many times as long as the last look that changed nothing."""
_MAX_PAUSE = 5.0
_MAX_NAMED = 5


@attrs.frozen
class Report:
    """The result of a look at the host."""

    repaired: tuple[str, ...] = ()
    """The things that another program had changed."""
    failed: tuple[str, ...] = ()
    """The things that could not be put right, with reasons."""
    error: FirezoneError | None = None
    """Of the first part that could do nothing."""
    has_changed: bool = True


class Reconciler:
    """Observes the host, puts right what differs from the wanted state, and looks again whenever that may be needed.

    A look runs in the worker's thread, never two at once. Whatever changes meanwhile only marks its aspect: so no
    queue grows, and the next look sees the newest state. Looks are caused by a changed wanted state, by `notice`, and
    by a slow timer. Setting up and putting right are the same work; `stop` removes everything.
    """

    def __init__(
        self,
        reactor: Any,
        worker: WorkerThread,
        parts: Sequence[Part],
        *,
        on_settled: Callable[[HostState], object],
        on_failed: Callable[[FirezoneError], object],
    ) -> None:
        """`parts` run in this order, and are removed in the opposite one.

        `on_settled(state)` is called after each look after which the wanted state is there, as far as this host can
        have it; `on_failed(error)` if the first one can't be.
        """
        self._worker = worker
        self._parts = parts
        self._on_settled = on_settled
        self._on_failed = on_failed
        self._timer = BoottimeTimer(reactor, self._look)
        self._wanted: HostState | None = None
        self._applied: HostState | None = None
        self._suspect = EVERYTHING
        self._needs: list[object] = [_NOTHING] * len(parts)  # used by the worker only
        self._is_running = False
        self._ended_at = float("-inf")
        self._full_look_at = float("-inf")
        self._pause = 0.0  # after the end of the last look
        self._retry_interval = RETRY_INTERVAL
        self._repaired_at: list[float] = []
        self._contested_until = float("-inf")
        self._culprit: str | None = None
        self._limiter = Limiter(clock=boottime)
        self._last: Deferred[None] | None = None
        self.problems: tuple[str, ...] = ()
        """The differences that remain, with reasons. The host isn't ready while there are any."""
        self.repairs = 0

    @property
    def is_applied(self) -> bool:
        """Whether the newest wanted state was there at the last look."""
        return self._wanted is not None and self._applied == self._wanted and not self.problems

    @property
    def is_settled(self) -> bool:
        """Whether it is there, and nothing may have changed since."""
        return self.is_applied and not self._suspect

    def want(self, state: HostState) -> None:
        """Bring this state about, and keep it."""
        if state != self._wanted:
            self._wanted = state
            self._schedule(boottime())

    def notice(self, aspects: Aspect, program: str | None) -> None:
        """Another program may have changed these aspects."""
        watched = Aspect(0)
        for part in self._parts:
            watched |= part.watches & aspects
        if not watched or self._wanted is None:
            return
        self._culprit = program or self._culprit
        self._suspect |= watched
        # Settings come in series, and the kernel doesn't report each of them.
        delay = SETTINGS_DELAY if watched == Aspect.SETTINGS else 0.0
        self._schedule(max(boottime() + delay, self._ended_at + self._pause))

    def close(self) -> None:
        """Look no more, and leave the host as it is. May be called more than once."""
        self._wanted = None
        self._timer.close()

    async def stop(self) -> None:
        """Leave the host as it was before. Failures are logged."""
        self.close()
        if self._is_running:
            self._last = Deferred()
            await self._last
        for part in reversed(self._parts):
            try:
                await self._worker.call(part.remove)
            except FirezoneError as error:
                log.error("host:not_restored", reason=one_line(error))

    def _schedule(self, at: float) -> None:
        """Look then, or earlier if that is planned."""
        if not self._is_running:
            planned = self._timer.deadline
            self._timer.set(at if planned is None else min(at, planned))

    def _look(self) -> None:
        if self._wanted is None:
            return
        state = attrs.evolve(self._wanted, is_guarded=bool(self.problems) or self._is_contested())
        started = boottime()
        suspect, self._suspect = self._suspect, Aspect(0)
        if started >= self._full_look_at + LOOK_INTERVAL:
            suspect, self._full_look_at = EVERYTHING, started
        self._is_running = True
        done: Deferred[Report] = self._worker.call(self._put_right, state, suspect)
        done.addErrback(_as_report).addCallback(partial(self._ended, self._wanted, state, started))
        done.addErrback(_log_crash)

    def _put_right(self, state: HostState, suspect: Aspect) -> Report:
        """Blocks, in the worker's thread."""
        repaired: list[str] = []
        failed: list[str] = []
        first_error: FirezoneError | None = None
        has_changed = False
        for number, part in enumerate(self._parts):
            needs = part.needs(state)
            is_suspect = bool(part.watches & suspect)
            if not is_suspect and needs == self._needs[number]:
                continue
            is_repair = needs == self._needs[number]
            self._needs[number] = _NOTHING
            try:
                changes = part.put_right(state, is_suspect=is_suspect)
            except FirezoneError as error:
                failed.append(one_line(error))
                first_error = first_error or error
                continue
            has_changed = has_changed or bool(changes)
            failed += [f"{change.item}: {change.failure}" for change in changes if change.failure is not None]
            if is_repair:
                repaired += [change.item for change in changes if change.failure is None]
            if all(change.failure is None for change in changes):
                self._needs[number] = needs
        return Report(tuple(repaired), tuple(failed), first_error, has_changed)

    def _ended(self, wanted: HostState, state: HostState, started: float, report: Report) -> None:
        now = self._ended_at = boottime()
        self._is_running = False
        if self._last is not None:
            self._last.callback(None)
            return
        if self.problems and not report.failed:
            log.info("host:as_wanted_again", missing=self.problems[:_MAX_NAMED], count=len(self.problems))
        self.problems = report.failed
        if not report.has_changed:
            self._pause = min((now - started) * _SHARE_OF_TIME, _MAX_PAUSE)
        if self._applied is None and report.error is not None:
            self._wanted = None
            self._on_failed(report.error)
            return
        if report.repaired:
            self._note_repairs(report.repaired, now)
        if report.failed:
            self._limiter.warning("host:not_as_wanted", missing=report.failed[:_MAX_NAMED], count=len(report.failed))
        if report.error is None:
            self._applied = wanted
            self._on_settled(wanted)
        self._plan(state, now)

    def _plan(self, state: HostState, now: float) -> None:
        """Choose when to look next."""
        is_contested = self._is_contested()
        self._retry_interval = min(self._retry_interval * 2, MAX_RETRY_INTERVAL) if self.problems else RETRY_INTERVAL
        if is_contested:
            self._pause = max(self._pause, RETRY_INTERVAL)
        if state.is_guarded != (is_contested or bool(self.problems)):
            at = now
        elif self.problems:
            at = now + self._retry_interval / 2
        elif self._wanted != self._applied:  # it has changed meanwhile
            at = now
        elif self._suspect:
            at = now + self._pause
        else:
            at = now + (CALM if is_contested else LOOK_INTERVAL)
        self._schedule(at)

    def _note_repairs(self, repaired: tuple[str, ...], now: float) -> None:
        self.repairs += len(repaired)
        self._repaired_at = [*self._repaired_at[-REPAIRS_AT_ONCE + 1 :], now]
        if len(self._repaired_at) == REPAIRS_AT_ONCE and self._repaired_at[0] > now - CALM:
            self._contested_until = now + CALM
        by, self._culprit = self._culprit, None
        named: dict[str, Any] = {"missing": repaired[:_MAX_NAMED], "count": len(repaired), "program": by or "unknown"}
        if self._is_contested():
            self._contested_until = now + CALM
            self._limiter.warning("host:contested", **named)
        else:
            log.warning("host:repaired", **named)

    def _is_contested(self) -> bool:
        """Whether another program changes the same things again and again."""
        return boottime() < self._contested_until


_NOTHING = object()  # no part needs this


def _as_report(failure: Failure) -> Report:
    """A bug must not end the keeping of the host."""
    log.error("host:crashed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())
    error = PlatformError(f"Can't set up the host's network: {failure.getErrorMessage()}")
    return Report(failed=(one_line(error),), error=error)


def _log_crash(failure: Failure) -> None:
    log.error("host:crashed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())

"""Coroutines that run one at a time, each waiting at most once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

Work = Callable[[], Coroutine[Any, Any, None]]


class SerialRunner:
    """Runs what is requested, one coroutine at a time, until it is closed.

    A request that is waiting already is not added again: work looks at the newest state when it runs. So however many
    changes come while one run takes time, no queue grows. (124 waiters of a DeferredLock end in a RecursionError that
    holds the lock for ever: docs/decisions.md, 32.)
    """

    def __init__(self, failed: Callable[[Failure], object]) -> None:
        """`failed(failure)` is called for work that raised; the rest goes on."""
        self._failed = failed
        self._waiting: dict[Work, None] = {}
        self._is_running = False
        self._last: Work | None = None

    def request(self, work: Work) -> None:
        """Run `work` once all that was requested before is done; ignored once closed."""
        if self._last is None:
            self._waiting[work] = None
            self._start()

    def close(self, last: Work) -> None:
        """Let the current work finish, forget the rest, then run `last`. Later calls do nothing."""
        if self._last is None:
            self._last = last
            self._waiting = {last: None}
            self._start()

    def _start(self) -> None:
        if not self._is_running:
            self._is_running = True
            Deferred.fromCoroutine(self._run())

    async def _run(self) -> None:
        while self._waiting:
            work = next(iter(self._waiting))
            del self._waiting[work]
            try:
                await work()
            except Exception:  # noqa: BLE001  # the boundary of a service: `failed` logs it
                self._failed(Failure())
        self._is_running = False

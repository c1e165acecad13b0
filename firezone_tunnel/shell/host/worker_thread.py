"""One thread for what blocks: netlink, sysctls and `nft`, in the order in which it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

_P = ParamSpec("_P")
_T = TypeVar("_T")


class WorkerThread:
    """A thread that starts with the first call and ends with `stop`, or with the reactor at the latest."""

    def __init__(self, reactor: Any, *, name: str = "host") -> None:
        """`reactor` is an IReactorThreads and IReactorCore."""
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name=name)
        self._trigger: object = None

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Deferred[_T]:
        """Call it in the thread; the result, or what it raises, arrives in the reactor's."""
        if not self._pool.started:
            self._pool.start()
            self._trigger = self._reactor.addSystemEventTrigger("after", "shutdown", self._pool.stop)
        result: Deferred[_T] = deferToThreadPool(self._reactor, self._pool, function, *args, **kwargs)
        return result

    def stop(self) -> Deferred[None]:
        """Fires once everything asked for so far is done and the thread has ended."""
        if self._trigger is None:
            return succeed(None)
        trigger, self._trigger = self._trigger, None
        self._reactor.removeSystemEventTrigger(trigger)

        def idle(_: None) -> None:
            self._pool.stop()

        return self.call(_nothing).addCallback(idle)


def _nothing() -> None:
    pass

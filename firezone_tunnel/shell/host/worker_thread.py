"""A single thread for blocking calls to netlink, sysctls and `nft`, which run in the order requested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

_P = ParamSpec("_P")
_T = TypeVar("_T")


class WorkerThread:
    """A thread that starts at the first call and ends at `stop`, or when the reactor stops."""

    def __init__(self, reactor: Any, *, name: str = "host") -> None:
        """`reactor` must provide IReactorThreads and IReactorCore."""
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name=name)
        self._trigger: object = None

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Deferred[_T]:
        """Call the function in the thread. Its result or exception arrives in the reactor's thread."""
        if not self._pool.started:
            self._pool.start()
            self._trigger = self._reactor.addSystemEventTrigger("after", "shutdown", self._pool.stop)
        result: Deferred[_T] = deferToThreadPool(self._reactor, self._pool, function, *args, **kwargs)
        return result

    def stop(self) -> Deferred[None]:
        """Fires when all calls made so far are done and the thread has ended."""
        if self._trigger is None:
            return succeed(None)
        trigger, self._trigger = self._trigger, None
        self._reactor.removeSystemEventTrigger(trigger)

        def idle(_: None) -> None:
            self._pool.stop()

        return self.call(_nothing).addCallback(idle)


def _nothing() -> None:
    pass

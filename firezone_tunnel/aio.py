"""The names of `firezone_tunnel` for asyncio programs: what returns a Deferred there is a coroutine here.

    async with aio.Session.connect(url="wss://portal.example/", token=token) as (session, events):
        async for event in events: ...

Twisted's reactor then runs on the program's event loop. There is one in a process, so all sessions of a process belong
to one event loop. Importing this installs no reactor; the first `connect` does.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from firezone_tunnel.apps.client import events as core
from firezone_tunnel.apps.client import session as twisted_session
from firezone_tunnel.apps.client.events import (
    AllGatewaysOffline,
    Disconnected,
    Event,
    GatewayVersionMismatch,
    ResourcesUpdated,
    TunInterfaceUpdated,
)
from firezone_tunnel.apps.client.session import DEFAULT_STATE_DIRECTORY
from firezone_tunnel.core.tunnel.resources import ResourceView
from firezone_tunnel.errors import (
    AuthenticationError,
    ConfigurationError,
    FirezoneError,
    PlatformError,
    PortalError,
    SessionClosed,
)
from firezone_tunnel.shell.tun.device import DEFAULT_NAME

__all__ = [
    "AllGatewaysOffline",
    "AuthenticationError",
    "ConfigurationError",
    "Connected",
    "Disconnected",
    "Event",
    "EventStream",
    "FirezoneError",
    "GatewayVersionMismatch",
    "PlatformError",
    "PortalError",
    "ResourceView",
    "ResourcesUpdated",
    "Session",
    "SessionClosed",
    "TunInterfaceUpdated",
    "install_reactor",
]


class Session:
    """Commands to a running client. Once the session is closed all but `close` raise.

    A session that is still open when `asyncio.run` ends is closed by that.
    """

    def __init__(self, session: twisted_session.Session) -> None:
        """For `connect` only."""
        self._session = session

    @classmethod
    def connect(
        cls,
        *,
        url: str,
        token: str,
        device_id: str | None = None,
        name: str | None = None,
        state_directory: Path = DEFAULT_STATE_DIRECTORY,
        interface: str = DEFAULT_NAME,
        ca_file: Path | None = None,
        max_partition_time: float | None = None,
    ) -> Connected:
        """Begin to connect; nothing has to succeed for this to return. What becomes of it is told by the events.

        The arguments are those of `firezone_tunnel.Session.connect`.

        Raises: ConfigurationError; FirezoneError, where another reactor is in the way; RuntimeError, where no event
        loop runs.
        """
        reactor = install_reactor()
        session, events = twisted_session.Session.connect(
            url=url,
            token=token,
            device_id=device_id,
            name=name,
            state_directory=state_directory,
            interface=interface,
            ca_file=ca_file,
            max_partition_time=max_partition_time,
            reactor=reactor,
        )
        loop = asyncio.get_running_loop()
        has_ended = events.when_ended().asFuture(loop)  # the session has it, and so keeps the task
        closing = _close_with_loop(session, has_ended)
        loop.create_task(closing, name="firezone_tunnel session")  # noqa: RUF006  # has_ended keeps it
        return Connected(cls(session), EventStream(events))

    def reset(self, reason: str) -> None:
        """Begin anew with new keys and sockets; flows come back by themselves.

        Raises: SessionClosed.
        """
        self._session.reset(reason)

    async def close(self) -> None:
        """End the session; the host is as it was before when this returns. May be called more than once."""
        await self._session.close().asFuture(asyncio.get_running_loop())


class EventStream:
    """Events in order, then the end: `async for event in stream`. It has one consumer, which may be slow.

    Nothing is lost where waiting is cancelled, as by `asyncio.wait_for(stream.next(), timeout)`.
    """

    def __init__(self, stream: core.EventStream) -> None:
        """For `Session` only."""
        self._stream = stream

    @property
    def dropped(self) -> int:
        """How many events nobody took in time: more than 1000 waited."""
        return self._stream.dropped

    async def next(self) -> Event | None:
        """The next event; None, again and again, when there is none to come.

        Raises: RuntimeError, if somebody waits already.
        """
        future: asyncio.Future[Event | None] = asyncio.get_running_loop().create_future()

        def deliver(event: Event | None) -> None:
            if not future.cancelled():
                future.set_result(event)
            elif event is not None:
                self._stream.put_back(event)

        waiting = self._stream.next().addCallbacks(deliver, _ignore_cancelled)
        try:
            return await future
        except asyncio.CancelledError:
            waiting.cancel()
            if future.done() and not future.cancelled() and (event := future.result()) is not None:
                self._stream.put_back(event)
            raise

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event


class Connected(NamedTuple):
    """A session and its events; as an async context manager it closes the session on leaving."""

    session: Session
    events: EventStream

    async def __aenter__(self) -> Connected:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.session.close()


def install_reactor() -> Any:
    """Twisted's reactor on the running event loop; the one that was installed before, if this is not the first call.

    Raises: FirezoneError, if there is another reactor, or one of another event loop; RuntimeError, if no loop runs.
    """
    from twisted.internet import asyncioreactor

    loop = asyncio.get_running_loop()
    reactor: Any = sys.modules.get("twisted.internet.reactor")
    if reactor is None:
        asyncioreactor.install(loop)
        from twisted.internet import reactor
    elif not isinstance(reactor, asyncioreactor.AsyncioSelectorReactor):
        raise FirezoneError(
            f"Twisted's {type(reactor).__name__} is installed already, and does not run on asyncio: "
            "connect before anything imports twisted.internet.reactor, or use firezone_tunnel without aio"
        )
    elif reactor._asyncioEventloop is not loop:
        raise FirezoneError(
            "Twisted's reactor belongs to another event loop, and a process has only one: "
            "use the loop that made the first connection"
        )
    if not reactor.running:
        # The pool resolves names; as daemons its threads don't keep a program that is through from ending.
        reactor.getThreadPool().threadFactory = functools.partial(threading.Thread, daemon=True)
        reactor.startRunning(installSignalHandlers=False)
    return reactor


def _ignore_cancelled(failure: Failure) -> None:
    failure.trap(CancelledError)


async def _close_with_loop(session: twisted_session.Session, has_ended: asyncio.Future[None]) -> None:
    """`asyncio.run` cancels what still runs at its end, and waits for it. A session left open would keep its thread,
    and so the process, alive, and its routes in place.
    """
    try:
        await has_ended
    except asyncio.CancelledError:
        await session.close().asFuture(asyncio.get_running_loop())
        raise

"""The API of `firezone_tunnel` for asyncio programs: the same names, with coroutines in place of Deferreds.

    async with aio.Session.connect(url="wss://portal.example/", token=token) as (session, events):
        async for event in events: ...

Importing this module installs no reactor. The first `connect` installs Twisted's asyncio reactor on the running event
loop. A process has one reactor, so all of its sessions belong to that event loop.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from firezone_tunnel.apps.client import session as twisted_session
from firezone_tunnel.apps.client.events import (
    AllGatewaysOffline,
    Disconnected,
    Event,
    EventBuffer,
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
    """Commands to a running client. After the session has ended, all but `close` raise.

    `asyncio.run` closes sessions that are still open when it ends.
    """

    def __init__(self, session: twisted_session.Session) -> None:
        """Internal: use `connect`."""
        self._session = session

    @classmethod
    def connect(
        cls,
        *,
        url: str,
        token: str,
        device_id: str | None = None,
        name: str | None = None,
        state_directory: str | Path = DEFAULT_STATE_DIRECTORY,
        interface: str = DEFAULT_NAME,
        ca_file: str | Path | None = None,
        max_partition_time: float | None = None,
    ) -> Connected:
        """Start to connect, and return at once. The events report progress and failures.

        The arguments are those of `firezone_tunnel.Session.connect`.

        Raises: ConfigurationError; FirezoneError, if another reactor is installed; RuntimeError, if no event loop is
        running.
        """
        reactor = install_reactor()
        session, _ = twisted_session.Session.connect(
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
        buffer = session._service.events
        has_ended = buffer.when_ended().asFuture(loop)  # the buffer refers to it, and it refers to the task
        closing = _close_with_loop(session, has_ended)
        loop.create_task(closing, name="firezone_tunnel session")  # noqa: RUF006  # has_ended keeps it alive
        return Connected(cls(session), EventStream(buffer))

    def reset(self, reason: str) -> None:
        """Start again with new keys and sockets. Flows recover by themselves. `reason` is logged.

        Raises: SessionClosed.
        """
        self._session.reset(reason)

    async def close(self) -> None:
        """End the session. Returns when the host's network is restored. May be called more than once."""
        await self._session.close().asFuture(asyncio.get_running_loop())

    def __repr__(self) -> str:
        return repr(self._session)


class EventStream:
    """A session's events in order: `async for event in stream`. The stream ends with the session.

    It supports one reader. A slow reader costs nothing: only the newest configuration and the newest list of resources
    are kept, and beyond 1000 events the oldest are dropped. Cancelling a wait, as `asyncio.wait_for(stream.next(),
    timeout)` does, loses no event.
    """

    def __init__(self, buffer: EventBuffer) -> None:
        """Internal: `Session.connect` returns a stream."""
        self._buffer = buffer

    @property
    def dropped(self) -> int:
        """The number of events dropped because more than 1000 were unread."""
        return self._buffer.dropped

    async def next(self) -> Event | None:
        """Return the next event, or None after the end of the stream.

        Raises: RuntimeError, if an earlier call is still waiting.
        """
        future: asyncio.Future[Event | None] = asyncio.get_running_loop().create_future()

        def deliver(event: Event | None) -> None:
            if not future.cancelled():
                future.set_result(event)
            elif event is not None:
                self._buffer.put_back(event)

        waiting = self._buffer.get().addCallbacks(deliver, _ignore_cancelled)
        try:
            return await future
        except asyncio.CancelledError:
            waiting.cancel()
            if future.done() and not future.cancelled() and (event := future.result()) is not None:
                self._buffer.put_back(event)
            raise

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._buffer.summary()}>"


class Connected(NamedTuple):
    """A session and its events. As an async context manager it closes the session on exit."""

    session: Session
    events: EventStream

    async def __aenter__(self) -> Connected:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.session.close()


def install_reactor() -> Any:
    """Install Twisted's reactor on the running event loop and start it. Later calls return the same reactor.

    Raises: FirezoneError, if another reactor is installed, or it runs on another event loop; RuntimeError, if no event
    loop is running.
    """
    from twisted.internet import asyncioreactor

    loop = asyncio.get_running_loop()
    reactor: Any = sys.modules.get("twisted.internet.reactor")
    if reactor is None:
        asyncioreactor.install(loop)
        from twisted.internet import reactor
    elif not isinstance(reactor, asyncioreactor.AsyncioSelectorReactor):
        raise FirezoneError(
            f"Twisted's {type(reactor).__name__} is already installed and does not run on asyncio: "
            "connect before anything imports twisted.internet.reactor, or use firezone_tunnel without aio"
        )
    elif reactor._asyncioEventloop is not loop:
        raise FirezoneError(
            "Twisted's reactor runs on another event loop, and a process has only one reactor: "
            "connect on the event loop of the first connection"
        )
    if not reactor.running:
        reactor.startRunning(installSignalHandlers=False)
    return reactor


def _ignore_cancelled(failure: Failure) -> None:
    failure.trap(CancelledError)


async def _close_with_loop(session: twisted_session.Session, has_ended: asyncio.Future[None]) -> None:
    """Close the session when its task is cancelled: `asyncio.run` cancels all tasks at its end, and awaits them.

    A session left open would keep its thread, and so the process, alive, and its routes in place.
    """
    try:
        await has_ended
    except asyncio.CancelledError:
        await session.close().asFuture(asyncio.get_running_loop())
        raise

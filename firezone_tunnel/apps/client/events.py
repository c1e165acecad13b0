"""The events of a session, and the stream that carries them (docs/protocol/client-application.md, 1.3)."""

from __future__ import annotations

import ipaddress
from collections import deque

import attrs
from twisted.internet.defer import Deferred, succeed

from firezone_tunnel.core.tunnel.resources import ResourceView
from firezone_tunnel.errors import FirezoneError

CAPACITY = 1000

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


@attrs.frozen
class TunInterfaceUpdated:
    """The interface has this configuration. The first of these events means that the tunnel is ready.

    `ipv4` or `ipv6` is None if the host lacks the family.
    """

    ipv4: ipaddress.IPv4Address | None
    ipv6: ipaddress.IPv6Address | None
    dns: tuple[str, ...]
    search_domain: str | None
    routes: tuple[IPNetwork, ...]


@attrs.frozen
class ResourcesUpdated:
    """All resources: the internet resource first, then the others sorted by name and id."""

    resources: tuple[ResourceView, ...]


@attrs.frozen
class AllGatewaysOffline:
    """All gateways in the resource's site are offline. Sent once per resource."""

    resource_id: str


@attrs.frozen
class GatewayVersionMismatch:
    """No gateway in the resource's site is compatible with this client. Sent once per resource."""

    resource_id: str


@attrs.frozen
class Disconnected:
    """The last event: `error` ended the session. To go on, connect a new session."""

    error: FirezoneError

    @property
    def requires_sign_in(self) -> bool:
        """Whether the portal rejected the token for good: discard it."""
        return bool(getattr(self.error, "requires_sign_in", False))


Event = TunInterfaceUpdated | ResourcesUpdated | AllGatewaysOffline | GatewayVersionMismatch | Disconnected

_LATEST_ONLY = (TunInterfaceUpdated, ResourcesUpdated)


class EventStream:
    """A session's events in order: `async for event in stream`. The stream ends with the session.

    It supports one reader. A slow reader costs nothing: only the newest configuration and the newest list of resources
    are kept, and beyond 1000 events the oldest are dropped.
    """

    def __init__(self, buffer: EventBuffer) -> None:
        """Internal: `Session.connect` returns a stream."""
        self._buffer = buffer

    @property
    def dropped(self) -> int:
        """The number of events dropped because more than 1000 were unread."""
        return self._buffer.dropped

    def next(self) -> Deferred[Event | None]:
        """Fire with the next event, or with None after the end of the stream.

        Raises: RuntimeError, if an earlier call is still waiting.
        """
        return self._buffer.get()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._buffer.summary()}>"


class EventBuffer:
    """The producer's end of an `EventStream`."""

    def __init__(self) -> None:
        self.dropped = 0
        self._events: deque[Event] = deque()
        self._waiting: Deferred[Event | None] | None = None
        self._has_ended = False
        self._endings: list[Deferred[None]] = []

    def put(self, event: Event) -> None:
        """Add an event without blocking. Events after the end are ignored."""
        if self._has_ended:
            return
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.callback(event)
            return
        if isinstance(event, _LATEST_ONLY):
            for older in [unread for unread in self._events if type(unread) is type(event)]:
                self._events.remove(older)
        if len(self._events) >= CAPACITY:
            self._events.popleft()
            self.dropped += 1
        self._events.append(event)

    def end(self) -> None:
        """End the stream. Unread events can still be read."""
        if self._has_ended:
            return
        self._has_ended = True
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)
        endings, self._endings = self._endings, []
        for ending in endings:
            ending.callback(None)

    def when_ended(self) -> Deferred[None]:
        """Fire after `end`, even if events are still unread."""
        if self._has_ended:
            return succeed(None)
        ending: Deferred[None] = Deferred()
        self._endings.append(ending)
        return ending

    def get(self) -> Deferred[Event | None]:
        """See `EventStream.next`."""
        if self._events:
            return succeed(self._events.popleft())
        if self._has_ended:
            return succeed(None)
        if self._waiting is not None:
            raise RuntimeError("Another call is waiting for the next event: a stream supports one reader")
        self._waiting = Deferred(self._forget_waiting)
        return self._waiting

    def put_back(self, event: Event) -> None:
        """Return an event that the reader got but can't use: it becomes the next event again."""
        self._events.appendleft(event)

    def summary(self) -> str:
        """The state in a few words, for a `repr`."""
        state = "ended" if self._has_ended else "open"
        return f"{state}, {len(self._events)} unread, {self.dropped} dropped"

    def _forget_waiting(self, _: object) -> None:
        self._waiting = None

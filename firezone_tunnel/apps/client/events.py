"""What a session tells: the events, and the stream that carries them (docs/protocol/client-application.md, 1.3)."""

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
    """The interface is set up like this; the first one means that the tunnel is ready. `None` where a family is off."""

    ipv4: ipaddress.IPv4Address | None
    ipv6: ipaddress.IPv6Address | None
    dns: tuple[str, ...]
    search_domain: str | None
    routes: tuple[IPNetwork, ...]


@attrs.frozen
class ResourcesUpdated:
    """All resources: the internet resource first, the others by name and id."""

    resources: tuple[ResourceView, ...]


@attrs.frozen
class AllGatewaysOffline:
    """No gateway of this resource's site is there. Told once for each resource."""

    resource_id: str


@attrs.frozen
class GatewayVersionMismatch:
    """No gateway of this resource's site can work with this client. Told once for each resource."""

    resource_id: str


@attrs.frozen
class Disconnected:
    """The last event: the session has ended because of `error`, and a new one must be made."""

    error: FirezoneError

    @property
    def requires_sign_in(self) -> bool:
        """Whether the token is worthless from now on."""
        return bool(getattr(self.error, "requires_sign_in", False))


Event = TunInterfaceUpdated | ResourcesUpdated | AllGatewaysOffline | GatewayVersionMismatch | Disconnected

_LATEST_COUNTS = (TunInterfaceUpdated, ResourcesUpdated)


class EventStream:
    """Events in order, then the end: `async for event in stream`. It has one consumer.

    A consumer that is slow, or doesn't read at all, costs nothing: of configurations and resources only the newest is
    kept, and beyond 1000 events the oldest are dropped.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._events: deque[Event] = deque()
        self._waiting: Deferred[Event | None] | None = None
        self._has_ended = False
        self._endings: list[Deferred[None]] = []

    def next(self) -> Deferred[Event | None]:
        """Fires with the next event; with None, again and again, when there is none to come.

        Raises: RuntimeError, if an earlier call still waits.
        """
        if self._events:
            return succeed(self._events.popleft())
        if self._has_ended:
            return succeed(None)
        if self._waiting is not None:
            raise RuntimeError("somebody waits for the next event already: a stream has one consumer")
        self._waiting = Deferred(self._forget_waiting)
        return self._waiting

    def put_back(self, event: Event) -> None:
        """For a consumer that took an event and can't use it: it is the next one again."""
        self._events.appendleft(event)

    def when_ended(self) -> Deferred[None]:
        """Fires when nothing is added any more, whether all was read or not."""
        if self._has_ended:
            return succeed(None)
        ending: Deferred[None] = Deferred()
        self._endings.append(ending)
        return ending

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    # What follows is for the session.

    def put(self, event: Event) -> None:
        """Never blocks. Nothing comes after the end."""
        if self._has_ended:
            return
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.callback(event)
            return
        if isinstance(event, _LATEST_COUNTS):
            for older in [one for one in self._events if type(one) is type(event)]:
                self._events.remove(older)
        if len(self._events) >= CAPACITY:
            self._events.popleft()
            self.dropped += 1
        self._events.append(event)

    def end(self) -> None:
        """What is in the stream can still be read."""
        if self._has_ended:
            return
        self._has_ended = True
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)
        endings, self._endings = self._endings, []
        for ending in endings:
            ending.callback(None)

    def _forget_waiting(self, _: object) -> None:
        self._waiting = None

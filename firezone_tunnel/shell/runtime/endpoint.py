"""The common half of client and gateway: a tunnel between its host and its portal, started and stopped in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.python.failure import Failure

from firezone_tunnel import __version__
from firezone_tunnel.core.messages.common import Generation, PortalMessage, write
from firezone_tunnel.core.phoenix.channel import Fatal, Joined, PushReceived
from firezone_tunnel.core.snownet.events import ConnectionEvent, RelayNews
from firezone_tunnel.errors import FirezoneError, InternalError, PlatformError, ProtocolError, one_line
from firezone_tunnel.shell.host.instance import Instance
from firezone_tunnel.shell.host.network import HostNetwork
from firezone_tunnel.shell.host.parts import HostState, Part
from firezone_tunnel.shell.host.tables import FIREZONE_MARK
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.portal_link.service import Notice, PortalLink
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, utc
from firezone_tunnel.shell.reactor.pause import PauseDetector
from firezone_tunnel.shell.reactor.queues import BoundedQueue
from firezone_tunnel.shell.reactor.service import MultiService
from firezone_tunnel.shell.runtime.endpoint_log import log_candidates, log_node_event
from firezone_tunnel.shell.runtime.tunnel import TunnelCore, TunnelService
from firezone_tunnel.shell.tun.device import DEFAULT_NAME, open_tun

_PORTAL_EVENTS = 128  # docs/protocol/client-application.md, 0.3


@attrs.frozen
class EndpointConfig:
    """The configuration of a client or a gateway."""

    url: LoginUrl
    state_directory: Path
    interface: str = DEFAULT_NAME
    trust: Any = None  # `portal_link.service.trust_from_file`; None: whom the host trusts
    max_partition_time: float | None = None  # seconds without a portal; None: without end


class EndpointCore(TunnelCore, Protocol):
    """A tunnel core that handles the portal's messages."""

    @property
    def public_key(self) -> bytes: ...

    def handle_joined(self) -> None: ...

    def handle_left(self) -> None: ...

    def handle_message(self, message: Any, now: float, utc_now: float) -> None: ...


class TunnelEndpoint(MultiService, ABC):
    """A client or a gateway at work. A fatal error stops it.

    Its children are the tunnel and the link to the portal. They start and stop in an order that depends on the host,
    so they are not left to MultiService: see `_start` and `_stop`. Subclasses implement the methods at the end.
    """

    def __init__(
        self,
        reactor: Any,
        config: EndpointConfig,
        core: EndpointCore,
        *,
        role: str,
        parse: Callable[[str, object, list[str]], Any],
        parts: Sequence[Part],
    ) -> None:
        """`role` is the portal's topic.

        `parts` of the host's network are kept right in addition to the interface, its routes and rules.

        `parse(event, payload, left_out)` reads a message, and appends to the list a reason for each entry that it
        leaves out.
        """
        super().__init__()
        self._host = HostNetwork(
            reactor,
            interface=config.interface,
            parts=parts,
            on_hosts=self._set_hosts,
            on_moved=self.moved,
            on_settled=self.host_settled,
        )
        self._config = config
        self._core = core
        self._role = role
        self.limiter = Limiter()
        self._parse = parse
        self._pauses = PauseDetector(reactor, self._paused)
        self._tunnel = TunnelService(
            reactor,
            core,
            open_device=lambda: open_tun(config.interface),
            on_event=self._handle_event,
            on_lost=self._fail,
            mark=FIREZONE_MARK,
            observe=self._pauses.fired,
        )
        self._portal_events: BoundedQueue[Notice] = BoundedQueue(reactor, _PORTAL_EVENTS, self._handle_notice)
        self._portal_link = PortalLink(
            reactor,
            url=config.url,
            topic=role,
            events=self._portal_events,
            mark=FIREZONE_MARK,
            trust=config.trust,
            max_partition_time=config.max_partition_time,
            make_timer=lambda callback: BoottimeTimer(reactor, callback, observe=self._pauses.fired),
        )
        for child in (self._tunnel, self._portal_link):
            child.setServiceParent(self)
        self._instance: Instance | None = None
        self._started: Deferred[None] | None = None  # fires when the start is over, whatever came of it
        self._stopped: Deferred[None] | None = None
        self._error: FirezoneError | None = None

    def startService(self) -> None:
        self.running = 1
        log.info(
            "service:started",
            role=self._role,
            version=__version__,
            portal=str(self._config.url),
            identity=self._config.url.identity,
            interface=self._config.interface,
        )
        self._started = Deferred()
        Deferred.fromCoroutine(self._start()).addBoth(self._start_ended)

    def stopService(self) -> Deferred[None]:
        """Fires when the host is as it was before. May be called more than once."""
        self.running = 0
        if self._stopped is None:
            self._stopped = Deferred.fromCoroutine(self._stop())
        done: Deferred[None] = Deferred()
        self._stopped.addBoth(lambda _: done.callback(None))
        return done

    def free_host(self) -> None:
        """Remove rules and routes at once, although something hangs: only for the end of the process. Blocks.

        Raises: PlatformError.
        """
        if self._instance is not None:
            self._host.free()

    def say(self, message: PortalMessage) -> None:
        """Send a message to the portal. V2 portals understand the names of V1, too (docs/decisions.md, 10)."""
        log_candidates(message, self.peer_fields)
        self._portal_link.send(message.event(Generation.V1), write(message))

    def rebind(self) -> None:
        """Bind new sockets and connect to the portal again. Without new sockets the service ends."""
        self._tunnel.settle()
        try:
            self._tunnel.bind()
        except PlatformError as error:
            self._fail(error)
            return
        self._set_hosts(self._host.hosts)
        self._portal_link.connect(self._core.public_key)

    async def _start(self) -> None:
        """
        Raises: FirezoneError.
        """
        self._instance = Instance(self._role)
        self._tunnel.startService()
        self._pauses.start()
        await self._host.start()
        self._portal_link.startService()
        self._portal_link.connect(self._core.public_key)

    async def _stop(self) -> None:
        """Say goodbye to the peers, leave the portal, restore the host. A step that fails doesn't stop the next."""
        if self._started is not None:
            await self._started
        steps: list[Callable[[], Any]] = [
            self._portal_events.close,
            self._pauses.close,
            self._host.close,
            self._tunnel.stopService,
        ]
        if self._portal_link.running:
            steps.append(self._portal_link.stopService)
        if self._instance is not None:
            steps += [self._host.restore, self._host.stop, self._instance.close]
        for step in (*steps, lambda: self.ended(self._error)):
            await maybeDeferred(step).addErrback(self._not_stopped)
        self._instance = None

    def _start_ended(self, result: Failure | None) -> None:
        assert self._started is not None
        self._started.callback(None)
        if result is not None:
            self._failed(result)

    def _not_stopped(self, failure: Failure) -> None:
        error: Any = failure.value
        if isinstance(error, FirezoneError):
            log.error("host:not_restored", reason=one_line(error))
        else:
            log.error("tunnel:crashed", reason=one_line(error), traceback=failure.getTraceback())

    def _failed(self, failure: Failure) -> None:
        error: Any = failure.value
        if not isinstance(error, FirezoneError):
            error = InternalError(f"The {self._role} failed: {one_line(error)}", failure.getTraceback())
        self._fail(error)

    def _fail(self, error: FirezoneError) -> None:
        if self.running:
            self._error = error
            self.stopService()

    def _paused(self, seconds: float) -> None:
        log.info("process:resumed", paused=round(seconds, 1))
        self._host.suspect()
        if self.running:
            self.resumed(seconds)

    def _set_hosts(self, hosts: list[str]) -> None:
        self._tunnel.set_hosts(hosts)

    def _handle_notice(self, notice: Notice) -> None:
        match notice:
            case Joined():
                self._core.handle_joined()
            case PushReceived(event, payload):
                self._handle_message(event, payload)
            case Fatal(error):
                self._fail(error)
            case _:
                self._core.handle_left()
        self._tunnel.settle()

    def _handle_message(self, event: str, payload: object) -> None:
        left_out: list[str] = []
        try:
            message = self._parse(event, payload, left_out)
        except ProtocolError as error:
            self.limiter.warning("portal:message_malformed", key=event, event=event, reason=one_line(error))
            return
        if message is None:
            log.debug("portal:message_unknown", event=event)
            return
        if left_out:  # unknown or malformed
            count, reasons = len(left_out), left_out[:5]
            self.limiter.info("portal:entries_left_out", key=event, event=event, count=count, reasons=reasons)
        log_candidates(message, self.peer_fields)
        self.message_received(message)
        self._core.handle_message(message, boottime(), utc())

    def _handle_event(self, event: Any) -> None:
        if isinstance(event, ConnectionEvent | RelayNews):
            log_node_event(event, self.peer_fields)
        else:
            self.handle_event(event)

    def summary(self) -> str:
        """The state in a few words, for a `repr`."""
        return f"{self._config.url.origin}, {self._config.interface}, {'running' if self.running else 'stopped'}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    # Subclasses implement the rest.

    @abstractmethod
    def host_settled(self, state: HostState) -> None:
        """The host is in this state now, as far as it can be."""

    @abstractmethod
    def peer_fields(self, peer_id: str) -> dict[str, Any]:
        """The log fields of a peer: its id, and a name if one is known."""

    @abstractmethod
    def message_received(self, message: Any) -> None:
        """Log a message of the portal, and learn the names in it, before the core handles it."""

    @abstractmethod
    def moved(self) -> None:
        """The host moved to another network."""

    def resumed(self, paused: float) -> None:
        """This process didn't run for so many seconds, or somewhat more: ask everyone whether they still know us."""
        self._tunnel.probe()
        self._portal_link.probe()

    @abstractmethod
    def handle_event(self, event: Any) -> None:
        """Handle an event of the core that is not about a connection or a relay."""

    @abstractmethod
    def ended(self, error: FirezoneError | None) -> None:
        """The service has stopped, because of `error` if there was one."""

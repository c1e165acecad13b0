"""The common half of client and gateway: a tunnel between its host and its portal, started and stopped in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.python.failure import Failure

from firezone_tunnel.core.messages.common import Generation, PortalMessage, write
from firezone_tunnel.core.phoenix.channel import Fatal, Joined, PushReceived
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionEvent,
    ConnectionFailed,
    PathChanged,
)
from firezone_tunnel.core.snownet.relays import RelayAllocated, RelayFailed
from firezone_tunnel.errors import FirezoneError, PlatformError, ProtocolError, one_line
from firezone_tunnel.shell.host.instance import Instance
from firezone_tunnel.shell.host.kernel import FIREZONE_MARK, Families
from firezone_tunnel.shell.host.monitor import NetworkMonitor
from firezone_tunnel.shell.host.netlink import Netlink
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link.service import Notice, PortalLink
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, utc
from firezone_tunnel.shell.reactor.pause import PauseDetector
from firezone_tunnel.shell.reactor.queues import BoundedQueue
from firezone_tunnel.shell.reactor.serial import SerialRunner, Work
from firezone_tunnel.shell.reactor.service import MultiService
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


class TunnelEndpoint(MultiService):
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
        peer_field: str,
        parse: Callable[[str, object, list[str]], Any],
    ) -> None:
        """`role` is the portal's topic, `peer_field` the log field for a peer's id: "cid" or "gid".

        `parse(event, payload, left_out)` reads a message, and appends to the list a reason for each entry that it
        leaves out.
        """
        super().__init__()
        self.worker = WorkerThread(reactor)
        self.netlink = Netlink(self.worker)
        self.monitor = NetworkMonitor(
            reactor,
            self.netlink,
            own_link=config.interface,
            on_hosts=self._set_hosts,
            on_moved=lambda _: self.moved(),
        )
        self._config = config
        self._core = core
        self._role = role
        self._peer_field = peer_field
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
        self._changes = SerialRunner(self._failed)  # of the host
        self._stopped: Deferred[None] = Deferred()
        self._error: FirezoneError | None = None

    def startService(self) -> None:
        self.running = 1
        self.run(self._start)

    def stopService(self) -> Deferred[None]:
        """Fires when the host is as it was before. May be called more than once."""
        self.running = 0
        self._changes.close(self._stop)
        done: Deferred[None] = Deferred()
        self._stopped.addBoth(lambda _: done.callback(None))
        return done

    def run(self, work: Work) -> None:
        """Change the host, one change at a time and none after the end. A failure ends the service."""
        self._changes.request(work)

    async def configure(self, ipv4: str, ipv6: str) -> Families:
        """Give the interface its addresses, and route unmarked packets into it. Returns which families work.

        Raises: PlatformError.
        """
        families = await self.netlink.configure_link(self._config.interface, ipv4=ipv4, ipv6=ipv6)
        await self.netlink.set_rules(families)
        return families

    def say(self, message: PortalMessage) -> None:
        """Send a message to the portal. V2 portals understand the names of V1, too (docs/decisions.md, 10)."""
        self._portal_link.send(message.event(Generation.V1), write(message))

    def rebind(self) -> None:
        """Bind new sockets and connect to the portal again. Without new sockets the service ends."""
        self._tunnel.settle()
        try:
            self._tunnel.bind()
        except PlatformError as error:
            self._fail(error)
            return
        self._set_hosts(self.monitor.hosts)
        self._portal_link.connect(self._core.public_key)

    async def _start(self) -> None:
        """
        Raises: FirezoneError.
        """
        self._instance = Instance(self._role)
        if removed := await self.netlink.remove_everything():
            log.info("host:leftovers_removed", count=removed)
        self._tunnel.startService()
        self._pauses.start()
        await self.monitor.start()
        await self.set_up_host()
        self._portal_link.startService()
        self._portal_link.connect(self._core.public_key)

    async def _stop(self) -> None:
        """Say goodbye to the peers, leave the portal, restore the host. A step that fails doesn't stop the next."""
        steps: list[Callable[[], Any]] = [
            self._portal_events.close,
            self._pauses.close,
            self.monitor.close,
            self._tunnel.stopService,
        ]
        if self._portal_link.running:
            steps.append(self._portal_link.stopService)
        if self._instance is not None:
            steps += [self.netlink.remove_everything, self.restore_host, self.netlink.close, self._instance.close]
        for step in (*steps, self.worker.stop, lambda: self.ended(self._error)):
            await maybeDeferred(step).addErrback(self._not_stopped)
        self._stopped.callback(None)

    def _not_stopped(self, failure: Failure) -> None:
        error: Any = failure.value
        if isinstance(error, FirezoneError):
            log.error("host:not_restored", reason=one_line(error))
        else:
            log.error(f"{self._role}:crashed", reason=one_line(error), traceback=failure.getTraceback())

    def _failed(self, failure: Failure) -> None:
        error: Any = failure.value
        if isinstance(error, FirezoneError):
            self._fail(error)
            return
        log.error(f"{self._role}:crashed", reason=one_line(error), traceback=failure.getTraceback())
        self._fail(PlatformError(f"The {self._role} failed: {one_line(error)}"))

    def _fail(self, error: FirezoneError) -> None:
        if self.running:
            self._error = error
            self.stopService()

    def _paused(self, seconds: float) -> None:
        log.info("process:resumed", paused=round(seconds, 1))
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
            log.warning("portal:message_malformed", event=event, reason=one_line(error))
            return
        if message is None:
            log.debug("portal:message_unknown", event=event)
            return
        if left_out:  # unknown or malformed
            log.info("portal:entries_left_out", event=event, count=len(left_out), reasons=left_out[:5])
        self._core.handle_message(message, boottime(), utc())

    def _handle_event(self, event: Any) -> None:
        if isinstance(event, ConnectionEvent):
            self._log_connection(event)
        elif isinstance(event, RelayAllocated):
            log.info("tunnel:relay_allocated", relay=event.rid, address=str(event.address))
        elif isinstance(event, RelayFailed):
            log.info("tunnel:relay_failed", relay=event.rid, reason=f"the relay {event.reason}")
        else:
            self.handle_event(event)

    def _log_connection(self, event: ConnectionEvent) -> None:
        peer = {self._peer_field: event.peer_id}
        match event:
            case ConnectionEstablished(_, path, local, remote):
                log.info("tunnel:connection_established", **peer, path=path, local=str(local), remote=str(remote))
            case PathChanged(_, path, local, remote):
                log.info("tunnel:path_changed", **peer, path=path, local=str(local), remote=str(remote))
            case ConnectionFailed(_, reason):
                log.info("tunnel:connection_failed", **peer, reason=reason)
            case ConnectionClosed():
                log.info("tunnel:connection_closed", **peer)

    def summary(self) -> str:
        """The state in a few words, for a `repr`."""
        return f"{self._config.url}, {self._config.interface}, {'running' if self.running else 'stopped'}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    # Subclasses implement the rest.

    async def set_up_host(self) -> None:
        """The interface exists, and the host's network is known.

        Raises: FirezoneError.
        """

    async def restore_host(self) -> None:
        """The interface is gone.

        Raises: PlatformError.
        """

    def moved(self) -> None:
        """The host moved to another network."""
        raise NotImplementedError

    def resumed(self, paused: float) -> None:
        """This process didn't run for so many seconds, or somewhat more: ask everyone whether they still know us."""
        self._tunnel.probe()
        self._portal_link.probe()

    def handle_event(self, event: Any) -> None:
        """Handle an event of the core that is not about a connection or a relay."""
        raise NotImplementedError

    def ended(self, error: FirezoneError | None) -> None:
        """The service has stopped, because of `error` if there was one."""
        raise NotImplementedError

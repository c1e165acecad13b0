"""The common half of client and gateway: a tunnel between its host and its portal, started and stopped in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.python.failure import Failure

from firezone_tunnel import __version__
from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.messages.common import Generation, PortalMessage, write
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, TCP, UDP
from firezone_tunnel.core.phoenix.channel import Fatal, Joined, PushReceived
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionEvent,
    ConnectionFailed,
    PairNominated,
    PathChanged,
)
from firezone_tunnel.core.snownet.relays import RelayAllocated, RelayFailed
from firezone_tunnel.errors import FirezoneError, InternalError, PlatformError, ProtocolError, one_line
from firezone_tunnel.shell.host.instance import Instance
from firezone_tunnel.shell.host.link import TunnelLink
from firezone_tunnel.shell.host.monitor import NetworkMonitor
from firezone_tunnel.shell.host.parts import EVERYTHING, Aspect, HostState, Part
from firezone_tunnel.shell.host.reconciler import Reconciler
from firezone_tunnel.shell.host.route_socket import RouteSocket
from firezone_tunnel.shell.host.routing import TunnelRoutes, TunnelRules
from firezone_tunnel.shell.host.rtnetlink import Families, RtNetlink
from firezone_tunnel.shell.host.tables import FIREZONE_MARK
from firezone_tunnel.shell.host.watcher import NetworkWatcher
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.portal_link.service import Notice, PortalLink
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, utc
from firezone_tunnel.shell.reactor.pause import PauseDetector
from firezone_tunnel.shell.reactor.queues import BoundedQueue
from firezone_tunnel.shell.reactor.service import MultiService
from firezone_tunnel.shell.runtime.tunnel import TunnelCore, TunnelService
from firezone_tunnel.shell.tun.device import DEFAULT_NAME, open_tun

_MAX_CANDIDATES = 20  # in a message of the log
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
        parse: Callable[[str, object, list[str]], Any],
        parts: Sequence[Part],
    ) -> None:
        """`role` is the portal's topic.

        `parts` of the host's network are kept right in addition to the interface, its routes and rules.

        `parse(event, payload, left_out)` reads a message, and appends to the list a reason for each entry that it
        leaves out.
        """
        super().__init__()
        self._worker = WorkerThread(reactor)
        self._netlink = RtNetlink()
        self._monitor = NetworkMonitor(
            reactor,
            self._worker,
            self._netlink,
            own_link=config.interface,
            on_hosts=self._set_hosts,
            on_moved=lambda _: self.moved(),
        )
        self._link = TunnelLink(self._netlink, config.interface)
        self._routes = RouteSocket()
        rules, routes = TunnelRules(self._netlink, self._link), TunnelRoutes(self._routes, self._link)
        self._host = Reconciler(
            reactor,
            self._worker,
            (self._link, rules, routes, *parts),
            on_settled=self._host_settled,
            on_failed=self._host_failed,
        )
        self._host_state = HostState()
        self._host_ready: Deferred[None] = Deferred()
        self._watcher: NetworkWatcher | None = None
        self._reactor = reactor
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

    @property
    def families(self) -> Families:
        """The families that work on the interface."""
        return self._link.families

    def free_host(self) -> None:
        """Remove rules and routes at once, although the worker's thread hangs. The rest is for the next start.

        Blocks. Only for the end of the process.

        Raises: PlatformError.
        """
        if self._instance is None:
            return
        netlink, routes = RtNetlink(), RouteSocket()
        link = TunnelLink(netlink, self._config.interface)
        try:
            TunnelRules(netlink, link).remove()
            TunnelRoutes(routes, link).remove()
        finally:
            netlink.close()
            routes.close()

    def want(self, **changes: Any) -> None:
        """Change the wanted state of the host, by the fields of `HostState`, and keep the host so."""
        self._host_state = attrs.evolve(self._host_state, **changes)
        self._host.want(self._host_state)

    def host_problems(self) -> Sequence[str]:
        """What the host lacks of what is wanted, with reasons."""
        if self._host.problems or self._host.is_applied:
            return self._host.problems
        return ("the host's network is being set up",)

    def say(self, message: PortalMessage) -> None:
        """Send a message to the portal. V2 portals understand the names of V1, too (docs/decisions.md, 10)."""
        self._log_candidates(message)
        self._portal_link.send(message.event(Generation.V1), write(message))

    def rebind(self) -> None:
        """Bind new sockets and connect to the portal again. Without new sockets the service ends."""
        self._tunnel.settle()
        try:
            self._tunnel.bind()
        except PlatformError as error:
            self._fail(error)
            return
        self._set_hosts(self._monitor.hosts)
        self._portal_link.connect(self._core.public_key)

    async def _start(self) -> None:
        """
        Raises: FirezoneError.
        """
        self._instance = Instance(self._role)
        self._tunnel.startService()
        self._pauses.start()
        self._watcher = NetworkWatcher(
            self._reactor, self._noticed, own_link=self._config.interface, own_ports=self._own_ports
        )
        await self._monitor.start()
        self.want(uplinks=self._monitor.interfaces)
        await self._host_ready
        self._portal_link.startService()
        self._portal_link.connect(self._core.public_key)

    async def _stop(self) -> None:
        """Say goodbye to the peers, leave the portal, restore the host. A step that fails doesn't stop the next."""
        if self._started is not None:
            await self._started
        steps: list[Callable[[], Any]] = [
            self._portal_events.close,
            self._pauses.close,
            self._monitor.close,
            self._host.close,
            self._tunnel.stopService,
        ]
        if self._watcher is not None:
            steps.append(self._watcher.close)
        if self._portal_link.running:
            steps.append(self._portal_link.stopService)
        if self._instance is not None:
            steps += [self._host.stop, self._close_netlink, self._instance.close]
        for step in (*steps, self._worker.stop, lambda: self.ended(self._error)):
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
        self._host.notice(EVERYTHING, None)
        if self.running:
            self.resumed(seconds)

    def _noticed(self, aspects: Aspect, program: str | None) -> None:
        if Aspect.UPLINKS in aspects:
            self._monitor.notice()
        self._host.notice(aspects, program)

    def _own_ports(self) -> tuple[int | None, ...]:
        return self._netlink.port_id, self._routes.port_id

    def _close_netlink(self) -> Deferred[None]:
        def close() -> None:
            self._netlink.close()
            self._routes.close()

        return self._worker.call(close)

    def _host_settled(self, state: HostState) -> None:
        if not self._host_ready.called:
            self._host_ready.callback(None)
        self.host_settled(state)

    def _host_failed(self, error: FirezoneError) -> None:
        self._host_ready.errback(error)

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
        self._log_candidates(message)
        self.message_received(message)
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
        peer = self.peer_fields(event.peer_id)
        match event:
            case PairNominated(_, local_kind, local, remote_kind, remote):
                ends = {"local": f"{local_kind} {local}", "remote": f"{remote_kind} {remote}"}
                log.debug("tunnel:pair_nominated", **peer, **ends)
            case ConnectionEstablished(_, path, local, remote):
                log.info("tunnel:connection_established", **peer, path=path, local=str(local), remote=str(remote))
            case PathChanged(_, path, local, remote):
                log.info("tunnel:path_changed", **peer, path=path, local=str(local), remote=str(remote))
            case ConnectionFailed(_, reason):
                log.info("tunnel:connection_failed", **peer, reason=reason)
            case ConnectionClosed():
                log.info("tunnel:connection_closed", **peer)

    def _log_candidates(self, message: Any) -> None:
        match message:
            case to_client.IceCandidates(gateway_id=peer_id) | to_gateway.IceCandidates(client_id=peer_id):
                peer, candidates = self.peer_fields(peer_id), message.candidates[:_MAX_CANDIDATES]
                log.debug("tunnel:candidates_added", **peer, side="remote", candidates=candidates)
            case (
                to_client.InvalidateIceCandidates(gateway_id=peer_id)
                | to_gateway.InvalidateIceCandidates(client_id=peer_id)
            ):
                peer, candidates = self.peer_fields(peer_id), message.candidates[:_MAX_CANDIDATES]
                log.debug("tunnel:candidates_removed", **peer, side="remote", candidates=candidates)
            case (
                to_client.BroadcastIceCandidates(gateway_ids=[peer_id])
                | to_gateway.BroadcastIceCandidates(client_ids=[peer_id])
            ):
                peer, candidates = self.peer_fields(peer_id), message.candidates
                log.debug("tunnel:candidates_added", **peer, side="local", candidates=candidates)
            case (
                to_client.BroadcastInvalidatedIceCandidates(gateway_ids=[peer_id])
                | to_gateway.BroadcastInvalidatedIceCandidates(client_ids=[peer_id])
            ):
                peer, candidates = self.peer_fields(peer_id), message.candidates
                log.debug("tunnel:candidates_removed", **peer, side="local", candidates=candidates)

    def summary(self) -> str:
        """The state in a few words, for a `repr`."""
        return f"{self._config.url.origin}, {self._config.interface}, {'running' if self.running else 'stopped'}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    # Subclasses implement the rest.

    def host_settled(self, state: HostState) -> None:
        """The host is in this state now, as far as it can be."""
        raise NotImplementedError

    def peer_fields(self, peer_id: str) -> dict[str, Any]:
        """The log fields of a peer: its id, and a name if one is known."""
        raise NotImplementedError

    def message_received(self, message: Any) -> None:
        """Log a message of the portal, and learn the names in it, before the core handles it."""
        raise NotImplementedError

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


def describe_packet(protocol: int, port: int) -> str:
    """A packet in the form of the filters: "tcp/22"."""
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    return f"{name}/{port}" if protocol in {TCP, UDP} else name


_PROTOCOLS = {ICMP: "icmp", ICMPV6: "icmp", TCP: "tcp", UDP: "udp"}

"""The relay as a service: its core, its sockets, its portal if it has one, and its end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import attrs
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.datagrams import DatagramBatch
from firezone_tunnel.errors import FirezoneError, PlatformError
from firezone_tunnel.logs import events as log
from firezone_tunnel.messages import relay as messages
from firezone_tunnel.phoenix.channel import Fatal, Joined
from firezone_tunnel.portal_connection.service import Notice, PortalService
from firezone_tunnel.portal_connection.url import LoginUrl
from firezone_tunnel.relay.ports import AllocationPorts, PortTaken, is_bindable
from firezone_tunnel.relaying.addresses import Network, PeerPolicy
from firezone_tunnel.relaying.allocating import RelayConfig
from firezone_tunnel.relaying.credentials import Credentials, StampSecret
from firezone_tunnel.relaying.outputs import ClosePort, Command, Drained, OpenPort
from firezone_tunnel.relaying.server import RelayServer
from firezone_tunnel.runtime.clock import BoottimeTimer, boottime, utc
from firezone_tunnel.runtime.queues import BoundedQueue
from firezone_tunnel.sansio import SocketAddress
from firezone_tunnel.stun.message import FAMILY_IPV6
from firezone_tunnel.udp.transport import IBatchProtocol, UdpTransport
from firezone_tunnel.wireguard.seal import ReceiveBuffer

DRAIN_TIME = 30.0  # decision 6
STATISTICS_INTERVAL = 10.0  # spec/gateway-and-relay.md, 8.4

_PORTAL_EVENTS = 16
_STAMP_SECRET_SIZE = 32  # spec, 6.2


@attrs.frozen
class PortalConfig:
    """Where a relay announces itself, and with it the secret that credentials are derived from."""

    url: LoginUrl
    trust: Any = None  # `portal_connection.trust_from_file`; None: whom the host trusts
    max_partition_time: float | None = None  # seconds without a portal; None: without end


@attrs.frozen
class RelayOptions:
    """Everything a relay must be told. Exactly one of `portal` and `users` is given."""

    relaying: RelayConfig
    listen_port: int = 3478
    bind_ipv4: str = "0.0.0.0"
    bind_ipv6: str = "::"
    own_hosts: tuple[str, ...] = ()
    """Addresses of this host, which nobody may reach through it."""
    allow_peers: tuple[Network, ...] = ()
    drain_time: float = DRAIN_TIME
    portal: PortalConfig | None = None
    users: Credentials | None = None


class RelayService(Service):
    """One relay at work.

    `ready` fires with None once it serves and the portal knows of it; `failed` with the FirezoneError that ended it.
    """

    def __init__(self, reactor: Any, options: RelayOptions) -> None:
        self.ready: Deferred[None] = Deferred()
        self.failed: Deferred[FirezoneError] = Deferred()
        self._reactor = reactor
        self._options = options
        secret = os.urandom(_STAMP_SECRET_SIZE).hex()
        config = options.relaying
        policy = PeerPolicy(
            relayed_hosts=config.hosts.values(),
            own_hosts=options.own_hosts,
            lowest_port=config.lowest_port,
            highest_port=config.highest_port,
            allow=options.allow_peers,
        )
        self._server = RelayServer(
            config,
            credentials=options.users or StampSecret(secret),
            policy=policy,
            entropy=os.urandom,
            now=boottime(),
        )
        self._buffer = ReceiveBuffer()
        binding = {family: self._bind_host(family) for family in config.hosts}
        self._listen_hosts = binding
        # Datagrams must leave from the address that was told: not from whichever the route would choose.
        relayed = {family: host if is_bindable(host) else binding[family] for family, host in config.hosts.items()}
        self._ports = AllocationPorts(reactor, relayed, self._buffer, self._peer_received, self._crashed)
        self._listening: dict[bool, UdpTransport] = {}
        self._timer: BoottimeTimer | None = None
        self._statistics: Any = None
        self._reported = (0, 0, 0)
        self._drained: Deferred[None] | None = None
        self._is_hurried = False
        self._stopped: Deferred[None] | None = None
        self._portal_events: BoundedQueue[Notice] = BoundedQueue(reactor, _PORTAL_EVENTS, self._handle_notice)
        self._portal = self._make_portal(options.portal, secret)

    @property
    def is_ready(self) -> bool:
        return bool(self.running and self.ready.called)

    @property
    def allocations(self) -> int:
        """How many there are."""
        return self._server.allocations

    @property
    def addresses(self) -> Sequence[SocketAddress]:
        """Where it listens."""
        return [transport.getHost() for transport in self._listening.values()]

    def startService(self) -> None:
        """
        Raises: PlatformError, ConfigurationError.
        """
        super().startService()  # type: ignore[no-untyped-call]
        self._timer = BoottimeTimer(self._reactor, self._timed_out)
        for family, host in self._listen_hosts.items():
            self._listening[family == FAMILY_IPV6] = UdpTransport(
                self._reactor,
                _Listening(self),
                host=host,
                port=self._options.listen_port,
                fallback_port=None,
                buffer=self._buffer,
            )
        log.info(
            "relay:listening",
            addresses=[str(address) for address in self.addresses],
            public=list(self._options.relaying.hosts.values()),
            lowest_port=self._options.relaying.lowest_port,
            highest_port=self._options.relaying.highest_port,
            max_sockets=self._ports.limit,
        )
        self._schedule_statistics()
        if self._portal is None:
            self._reactor.callLater(0, self._serve)  # once the reactor runs: a signal is in good hands from then on
            return
        self._portal.startService()
        self._portal.connect()

    def stopService(self) -> Deferred[None]:
        """Leave the portal, so that nobody new comes, and serve those who are there until they have gone elsewhere.

        Fires when they have, or after the drain time. May be called more than once.
        """
        if self._stopped is None:
            super().stopService()  # type: ignore[no-untyped-call]
            self._stopped = Deferred.fromCoroutine(self._stop())
        done: Deferred[None] = Deferred()
        self._stopped.addBoth(lambda _: done.callback(None))
        return done

    def hurry(self) -> None:
        """Drain no longer, or not at all."""
        self._is_hurried = True
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.callback(None)

    async def _stop(self) -> None:
        if self._portal is not None and self._portal.running:
            await self._portal.stopService()
        self._portal_events.close()
        if self._server.allocations and not self._is_hurried:
            await self._drain()
        self._ports.close_all()
        for transport in self._listening.values():
            transport.close()
        self._listening.clear()
        if self._timer is not None:
            self._timer.close()
        if self._statistics is not None and self._statistics.active():
            self._statistics.cancel()
        log.info("relay:stopped", **_nonzero(self._server.counters), **_nonzero(self._ports.counters))

    async def _drain(self) -> None:
        log.info("relay:draining", allocations=self._server.allocations, seconds=self._options.drain_time)
        drained: Deferred[None] = Deferred()
        self._drained = drained
        limit = self._reactor.callLater(self._options.drain_time, self.hurry)
        self._server.drain()
        self._settle()
        await drained
        if limit.active():
            limit.cancel()
        log.info("relay:drained", allocations=self._server.allocations)

    # What follows is called by the sockets and the timer.

    def client_received(self, batch: DatagramBatch) -> None:
        self._server.handle_client_datagrams(batch, boottime(), utc())
        self._settle()

    def listening_lost(self, reason: Failure) -> None:
        if reason.check(ConnectionDone) is None:  # type: ignore[no-untyped-call]  # else: by our own `close`
            self._crashed(reason)

    def _peer_received(self, port: int, batch: DatagramBatch) -> None:
        self._server.handle_peer_datagrams(port, batch, boottime())
        self._settle()

    def _timed_out(self) -> None:
        self._server.handle_timeout(boottime())
        self._settle()

    def _crashed(self, reason: Failure) -> None:
        log.error("relay:crashed", reason=reason.getErrorMessage(), traceback=reason.getTraceback())
        self._fail(PlatformError(f"The relay broke: {reason.getErrorMessage()}"))

    def _settle(self) -> None:
        """Carry out what the core wants; opening a port makes it want to answer."""
        server, listening, ports = self._server, self._listening, self._ports
        while True:
            for transmit in server.transmits():
                if transmit.port:
                    ports.send(transmit)
                    continue
                transport = listening.get(transmit.destination.is_ipv6)
                if transport is None:
                    transmit.release()
                else:
                    transport.send(transmit)
            commands = list(server.commands())
            if not commands:
                break
            for command in commands:
                self._carry_out(command)
        timeout = server.next_timeout()
        if self._timer is not None:
            self._timer.set(None if timeout is None else timeout.at)

    def _carry_out(self, command: Command) -> None:
        match command:
            case OpenPort(port, families):
                try:
                    self._ports.open(port, families)
                except PortTaken as taken:
                    self._server.handle_port_failed(port, boottime(), exhausted=taken.exhausted)
                    return
                log.debug("relay:allocation_opened", port=port, families=len(families))
                if not self._server.handle_port_opened(port, boottime()):
                    self._ports.close(port, families)
            case ClosePort(port, families):
                self._ports.close(port, families)
                log.debug("relay:allocation_closed", port=port, families=len(families))
            case Drained():
                self.hurry()

    def _handle_notice(self, notice: Notice) -> None:
        if isinstance(notice, Joined):
            self._serve()
        elif isinstance(notice, Fatal):
            self._fail(notice.error)

    def _serve(self) -> None:
        if self.running and not self.ready.called:
            log.info("relay:ready")
            self.ready.callback(None)

    def _fail(self, error: FirezoneError) -> None:
        if not self.failed.called:
            self.failed.callback(error)

    def _make_portal(self, config: PortalConfig | None, secret: str) -> PortalService | None:
        if config is None:
            return None
        return PortalService(
            self._reactor,
            url=config.url,
            topic=messages.TOPIC,
            events=self._portal_events,
            join_payload={"stamp_secret": secret},
            trust=config.trust,
            max_partition_time=config.max_partition_time,
        )

    def _bind_host(self, family: int) -> str:
        return self._options.bind_ipv6 if family == FAMILY_IPV6 else self._options.bind_ipv4

    def _schedule_statistics(self) -> None:
        self._statistics = self._reactor.callLater(STATISTICS_INTERVAL, self._report)

    def _report(self) -> None:
        """What has changed in ten seconds; nothing while nothing happens."""
        self._schedule_statistics()
        relayed = self._server.counters.relayed_bytes
        current = (self._server.allocations, self._server.channels, relayed)
        if current != self._reported:
            rate = round((relayed - self._reported[2]) / STATISTICS_INTERVAL)
            log.info("relay:measured", allocations=current[0], channels=current[1], bytes_per_second=rate)
            self._reported = current


@implementer(IBatchProtocol)
class _Listening:
    def __init__(self, relay: RelayService) -> None:
        self.batchReceived = relay.client_received
        self.connectionLost = relay.listening_lost

    def makeConnection(self, transport: UdpTransport) -> None:
        pass

    def sendingPaused(self) -> None:
        pass  # its queue is bounded, and so are our buffers: what finds none is dropped

    def sendingResumed(self) -> None:
        pass


def _nonzero(counters: Any) -> dict[str, int]:
    values = {attribute.name: getattr(counters, attribute.name) for attribute in attrs.fields(type(counters))}
    return {name: value for name, value in values.items() if value and isinstance(value, int)}

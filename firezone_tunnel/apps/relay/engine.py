"""Runs the relay's core with its sockets, its timer and its log messages."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.apps.relay.config import EngineConfig, Secrets
from firezone_tunnel.apps.relay.ports import AllocationPorts, PortTaken, is_bindable
from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.relay.outputs import ClosePort, Command, Drained, OpenPort
from firezone_tunnel.core.relay.server import RelayServer
from firezone_tunnel.errors import FirezoneError, InternalError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.boundary import Boundary
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, call_later, utc
from firezone_tunnel.shell.udp.transport import IBatchProtocol, UdpTransport

STATISTICS_INTERVAL = 10.0  # docs/protocol/gateway-and-relay.md, 8.4
REPEAT_ADVICE_AFTER = 3600.0
REPEAT_REFUSALS_AFTER = 60.0


class Engine:
    """Relays from `start` to `stop`, in this process."""

    def __init__(
        self,
        reactor: Any,
        config: EngineConfig,
        secrets: Secrets,
        sockets: Sequence[socket.socket],
        failed: Callable[[FirezoneError], object],
    ) -> None:
        """`sockets` are bound, one for each family; the engine owns them. `failed(error)` is called on a fatal error.

        Raises: ValueError for an invalid configuration.
        """
        self._reactor = reactor
        self._config = config
        self._failed = failed
        self._sockets = sockets
        hosts = config.relaying.hosts
        self._server = RelayServer(
            config.relaying,
            credentials=secrets.credentials(),
            policy=config.policy(),
            entropy=os.urandom,
            now=boottime(),
            nonce_key=secrets.nonce_key,
        )
        self._buffer = receive_buffer()
        # Datagrams must leave from the announced address, not from the one that the route selects.
        relayed = {family: host if is_bindable(host) else config.bind_host(family) for family, host in hosts.items()}
        self._ports = AllocationPorts(reactor, relayed, self._buffer, self._peer_received, self._crashed)
        self._listening: dict[bool, UdpTransport] = {}
        self._boundary = Boundary("relay:event_failed")
        self._timer: BoottimeTimer | None = None
        self._report = Report(reactor, self._server)
        self._drained: Deferred[None] | None = None
        self._skips_drain = False
        self._stopped: Deferred[None] | None = None

    @property
    def is_serving(self) -> bool:
        return bool(self._listening)

    def start(self) -> Deferred[None]:
        """Fires once it serves, which it does when this returns.

        Raises: OSError if the process is out of file descriptors.
        """
        self._timer = BoottimeTimer(self._reactor, self._timed_out)
        for one in self._sockets:
            transport = UdpTransport(self._reactor, _Listening(self), bound=one, buffer=self._buffer)
            self._listening[one.family == socket.AF_INET6] = transport
        own = self._config.relaying.own_ports
        log.info(
            "relay:listening",
            addresses=[str(transport.getHost()) for transport in self._listening.values()],
            public=list(self._config.relaying.hosts.values()),
            lowest_port=own.start,
            highest_port=own.stop - 1,
            max_sockets=self._ports.limit,
        )
        self._report.start()
        return succeed(None)

    def stop(self) -> Deferred[None]:
        """Serve present clients until they have moved to another relay, or the drain time is over; then fire.

        May be called more than once.
        """
        if self._stopped is None:
            self._stopped = Deferred.fromCoroutine(self._stop()).addErrback(self._not_stopped)
        done: Deferred[None] = Deferred()
        self._stopped.addBoth(lambda _: done.callback(None))
        return done

    def stop_draining(self) -> None:
        """Stop draining, or don't start."""
        self._skips_drain = True
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.callback(None)

    # The sockets and the timer call the methods below.

    def client_received(self, batch: DatagramBatch) -> None:
        with self._boundary:
            self._server.handle_client_datagrams(batch, boottime(), utc())
            self._settle()

    def listening_lost(self, reason: Failure) -> None:
        if reason.check(ConnectionDone) is None:  # else: by our own `close`
            self._crashed(reason)

    def _peer_received(self, port: int, batch: DatagramBatch) -> None:
        with self._boundary:
            self._server.handle_peer_datagrams(port, batch, boottime())
            self._settle()

    def _timed_out(self) -> None:
        self._server.handle_timeout(boottime())
        self._settle()

    def _crashed(self, reason: Failure) -> None:
        self._failed(InternalError(f"The relay failed: {reason.getErrorMessage()}", reason.getTraceback()))

    def _not_stopped(self, failure: Failure) -> None:
        log.error("relay:crashed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())

    def _settle(self) -> None:
        """Execute the core's transmits and commands. Opening a port makes it answer."""
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
                self.stop_draining()

    async def _stop(self) -> None:
        if self._server.allocations and not self._skips_drain:
            await self._drain()
        self._ports.close_all()
        for transport in self._listening.values():
            transport.close()
        self._listening.clear()
        if self._timer is not None:
            self._timer.close()
        self._report.stop()
        counters = {**log.nonzero(self._server.counters), **log.nonzero(self._ports.counters)}
        log.debug("relay:stopped", failures=self._boundary.failures, **counters)

    async def _drain(self) -> None:
        log.info("relay:draining", allocations=self._server.allocations, seconds=self._config.drain_time)
        drained: Deferred[None] = Deferred()
        self._drained = drained
        limit = call_later(self._reactor, self._config.drain_time, self.stop_draining)
        self._server.drain()
        self._settle()
        await drained
        limit.close()
        log.info("relay:drained", allocations=self._server.allocations)


class Report:
    """Logs changes every ten seconds, refusals every minute, and nothing while nothing changes."""

    def __init__(self, reactor: Any, server: RelayServer, clock: Callable[[], float] = boottime) -> None:
        self._reactor = reactor
        self._server = server
        self._clock = clock
        self._timer: BoottimeTimer | None = None
        self._measured = (0, 0, 0)
        self._refused: Counter[str] = Counter()
        self._advised: dict[str, float] = {}  # networks, and when
        self._rejected: Counter[str] = Counter()
        self._forbidden = 0
        self._refusals_due = float("-inf")

    def start(self) -> None:
        """
        Raises: OSError if the process is out of file descriptors.
        """
        self._timer = BoottimeTimer(self._reactor, self._write)
        self._timer.set(self._clock() + STATISTICS_INTERVAL)

    def stop(self) -> None:
        """Log what has not been logged yet."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()
            self._advise()
            self._report_refusals()

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.set(self._clock() + STATISTICS_INTERVAL)
        relayed = self._server.counters.relayed_bytes
        current = (self._server.allocations, self._server.channels, relayed)
        if current != self._measured:
            rate = round((relayed - self._measured[2]) / STATISTICS_INTERVAL)
            log.info("relay:measured", allocations=current[0], channels=current[1], bytes_per_second=rate)
            self._measured = current
        self._advise()
        if self._clock() >= self._refusals_due:
            self._report_refusals()

    def _report_refusals(self) -> None:
        """Log invalid credentials and forbidden peers. Names and addresses of users are for DEBUG."""
        counters, last = self._server.counters, self._server.last_rejected
        rejected, forbidden = counters.rejected_logins - self._rejected, counters.forbidden_peers - self._forbidden
        if rejected:
            log.info("relay:logins_rejected", count=rejected.total(), reasons=dict(rejected))
            if last is not None:
                client = str(last.client)
                log.debug("relay:login_rejected", reason=last.reason, username=last.username, client=client)
        if forbidden:
            log.info(
                "relay:peers_refused", count=forbidden, reason="users asked for peers that the relay must not reach"
            )
        if rejected or forbidden:
            self._rejected, self._forbidden = counters.rejected_logins.copy(), counters.forbidden_peers
            self._refusals_due = self._clock() + REPEAT_REFUSALS_AFTER

    def _advise(self) -> None:
        """Refused private peers may be what the relay is for: the operator can allow them."""
        now = self._clock()
        for network, count in self._server.counters.private_peers.items():
            is_due = now - self._advised.get(network, float("-inf")) >= REPEAT_ADVICE_AFTER
            if count > self._refused[network] and is_due:
                log.info(
                    "relay:private_peers_refused",
                    network=network,
                    times=count - self._refused[network],
                    advice=f"to let users reach peers there, set --allow-peers {network}",
                )
                self._refused[network] = count
                self._advised[network] = now


@implementer(IBatchProtocol)
class _Listening:
    def __init__(self, engine: Engine) -> None:
        self.batchReceived = engine.client_received
        self.connectionLost = engine.listening_lost

    def makeConnection(self, transport: UdpTransport) -> None:
        pass

    def sendingPaused(self) -> None:
        pass  # its queue is bounded, and so are our buffers: what finds none is dropped

    def sendingResumed(self) -> None:
        pass

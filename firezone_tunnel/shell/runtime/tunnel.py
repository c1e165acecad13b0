"""The tunnel as a service: a core on its TUN device, its UDP sockets and the clocks.

The core decides, the transports carry batches. Each read handler of the transports does a bounded amount of work. A
socket without room stops the delivery of packets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress, Timeout, Transmit
from firezone_tunnel.core.snownet.node import Node
from firezone_tunnel.core.tunnel.client import ClientCounters
from firezone_tunnel.core.tunnel.gateway import GatewayCounters
from firezone_tunnel.errors import FirezoneError, InternalError, PlatformError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.boundary import Boundary
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, utc
from firezone_tunnel.shell.reactor.lag import LoopLag
from firezone_tunnel.shell.reactor.service import Service
from firezone_tunnel.shell.tun.device import TunDevice
from firezone_tunnel.shell.tun.transport import IPacketProtocol, TunTransport
from firezone_tunnel.shell.udp.transport import PREFERRED_PORT, IBatchProtocol, UdpTransport

_RUNS_AT_ONCE = 3
"""So many super-packets are sealed before what they became is sent: each takes up to two of the eight slot buffers."""
_ANY_HOST = {False: "0.0.0.0", True: "::"}  # by whether it is IPv6


class TunnelCore(Protocol):
    """`tunnel.client.ClientTunnel` or `tunnel.gateway.GatewayTunnel`."""

    @property
    def counters(self) -> ClientCounters | GatewayCounters: ...

    @property
    def node(self) -> Node: ...

    def handle_packets(self, packets: Sequence[SuperPacket], now: float, utc_now: float) -> list[SuperPacket]: ...

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[SuperPacket]: ...

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None: ...

    def transmits(self) -> Iterator[Transmit]: ...

    def events(self) -> Iterator[Any]: ...

    def next_timeout(self) -> Timeout | None: ...

    def handle_timeout(self, now: float, utc_now: float) -> None: ...

    def probe(self, now: float, utc_now: float) -> None: ...

    def close(self, now: float) -> None: ...


class TunnelService(Service):
    """One core at work while the service runs. A caller of the core calls `settle` afterwards."""

    name = "tunnel"

    def __init__(
        self,
        reactor: Any,
        core: TunnelCore,
        *,
        open_device: Callable[[], TunDevice],
        on_event: Callable[[Any], object],
        on_lost: Callable[[FirezoneError], object],
        mark: int | None,
        observe: Callable[[float], object] = lambda deadline: None,
    ) -> None:
        """`on_event` gets the core's events, in order. `on_lost` is called once if the TUN device or a socket is gone.

        `open_device` opens the TUN device, or raises PlatformError. `mark` is the firewall mark of the sockets, which
        keeps their datagrams out of the tunnel. `observe` is that of the core's timer.
        """
        self.lag = LoopLag(reactor)
        self._reactor = reactor
        self._core = core
        self._open_device = open_device
        self._on_event = on_event
        self._on_lost = on_lost
        self._mark = mark
        self._timer = BoottimeTimer(reactor, self._timed_out, observe=observe)
        self._buffer = receive_buffer()
        self._tun: TunTransport | None = None
        self._udp: dict[bool, UdpTransport] = {}
        self._blocked: list[UdpTransport] = []
        self._boundary = Boundary("tunnel:callback_failed")

    def startService(self) -> None:
        """Open the TUN device and bind the sockets. One address family is enough.

        Raises: PlatformError.
        """
        super().startService()
        self._tun = TunTransport(self._reactor, TunnelPacketProtocol(self), self._open_device())
        self.bind()

    def stopService(self) -> None:
        """Let the core say goodbye to its peers, then close everything. May be called more than once."""
        super().stopService()
        self._core.close(boottime())
        self.settle()
        self._log_counters()
        self._timer.close()
        self.lag.close()
        for transport in self._udp.values():
            transport.close()
        self._udp.clear()
        if self._tun is not None:
            self._tun.close()
            self._tun = None

    def bind(self) -> None:
        """Open the UDP sockets, anew where there are some.

        Raises: PlatformError, if neither family works.
        """
        for transport in self._udp.values():
            transport.close()
        self._udp.clear()
        self._blocked.clear()
        failures: list[PlatformError] = []
        for is_ipv6 in (False, True):
            try:
                self._udp[is_ipv6] = UdpTransport(
                    self._reactor,
                    TunnelDatagramProtocol(self),
                    host=_ANY_HOST[is_ipv6],
                    mark=self._mark,
                    buffer=self._buffer,
                )
            except PlatformError as error:
                failures.append(error)
        if not self._udp:
            raise failures[0]
        if self._tun is not None:
            self._tun.resumeProducing()
        self._log_features()

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """The addresses of this host, the preferred one of each family first: our sockets can be reached there."""
        addresses = [
            SocketAddress(host, self._udp[is_ipv6].getHost().port)
            for host in hosts
            if (is_ipv6 := ":" in host) in self._udp
        ]
        self._core.set_local_addresses(addresses, boottime())
        self.settle()

    def probe(self) -> None:
        """Ask all relays and peers at once whether they still know us."""
        self._core.probe(boottime(), utc())
        self.settle()

    def forget_paths(self) -> None:
        """The network changed: paths may support segmented sends now."""
        for transport in self._udp.values():
            transport.forget_paths()

    def settle(self) -> None:
        """Carry out the core's output after a call."""
        for transmit in self._core.transmits():
            transport = self._udp.get(transmit.destination.is_ipv6)
            if transport is None:
                transmit.release()
            else:
                transport.send(transmit)
        for event in self._core.events():
            self._on_event(event)
        timeout = self._core.next_timeout()
        self._timer.set(None if timeout is None else timeout.at)

    # The protocols below call the rest.

    def packets_received(self, packets: list[SuperPacket]) -> None:
        now = boottime()
        for portion in _portions(packets):
            with self._boundary:
                self._write(self._core.handle_packets(portion, now, utc()))
                self.settle()
        self.lag.busy(now)

    def batch_received(self, batch: DatagramBatch) -> None:
        now = boottime()
        with self._boundary:
            self._write(self._core.handle_datagrams(batch, now, utc()))
            self.settle()
        self.lag.busy(now)

    def sending_paused(self, transport: UdpTransport) -> None:
        self._blocked.append(transport)
        if self._tun is not None:
            self._tun.pauseProducing()

    def sending_resumed(self, transport: UdpTransport) -> None:
        if transport in self._blocked:
            self._blocked.remove(transport)
        if not self._blocked and self._tun is not None:
            self._tun.resumeProducing()

    def lost(self, reason: Failure) -> None:
        sentence = f"The tunnel broke: {reason.getErrorMessage()}"
        if reason.check(ConnectionLost):
            self._on_lost(PlatformError(sentence))
        elif reason.check(ConnectionDone) is None:  # else: by our own `close`
            self._on_lost(InternalError(sentence, reason.getTraceback()))

    def _write(self, packets: list[SuperPacket]) -> None:
        if self._tun is not None:
            for packet in packets:
                self._tun.write(packet)

    def _timed_out(self) -> None:
        self._core.handle_timeout(boottime(), utc())
        self.settle()

    def _log_features(self) -> None:
        for is_ipv6, transport in self._udp.items():
            features = transport.features
            log.info(
                "udp:bound",
                family="IPv6" if is_ipv6 else "IPv4",
                port=transport.getHost().port,
                preferred=transport.getHost().port == PREFERRED_PORT,
                gso=features.gso,
                gro=features.gro,
                receive_buffer=features.receive_buffer,
            )

    def _log_counters(self) -> None:
        """Log the counters of the core and the transports that are not zero."""
        node = self._core.node
        counters = {**log.nonzero(self._core.counters), **log.nonzero(node.counters), **log.nonzero(node.layers)}
        log.debug("tunnel:closed", failures=self._boundary.failures, **counters)
        if self._tun is not None:
            log.debug("tun:closed", interface=self._tun.device.name, **log.nonzero(self._tun.counters))
        for transport in self._udp.values():
            log.debug("udp:closed", port=transport.getHost().port, **log.nonzero(transport.counters))
        late = {"late_p999_ms": self.lag.quantile_ms(0.999), "late_max_ms": round(self.lag.worst * 1000, 1)}
        log.debug("tunnel:loop_measured", **late)


def _portions(packets: list[SuperPacket]) -> Iterator[list[SuperPacket]]:
    """The packets in order, with a few super-packets in each portion."""
    if len(packets) <= _RUNS_AT_ONCE:
        yield packets
        return
    first = runs = 0
    for index, packet in enumerate(packets):
        if packet.segment_size:
            if runs == _RUNS_AT_ONCE:
                yield packets[first:index]
                first, runs = index, 0
            runs += 1
    yield packets[first:]


@implementer(IPacketProtocol)
class TunnelPacketProtocol:
    """The protocol on the TUN device: hands the host's packets to the tunnel."""

    def __init__(self, tunnel: TunnelService) -> None:
        self.packetsReceived = tunnel.packets_received
        self.connectionLost = tunnel.lost

    def makeConnection(self, transport: TunTransport) -> None:
        log.info("tun:opened", interface=transport.device.name, offload=transport.device.offload.name.lower())


@implementer(IBatchProtocol)
class TunnelDatagramProtocol:
    """The protocol on a UDP socket: hands batches to the tunnel, and stops its reading where the socket has no room."""

    def __init__(self, tunnel: TunnelService) -> None:
        self._tunnel = tunnel
        self.batchReceived = tunnel.batch_received
        self.connectionLost = tunnel.lost

    def makeConnection(self, transport: UdpTransport) -> None:
        self._transport = transport

    def sendingPaused(self) -> None:
        self._tunnel.sending_paused(self._transport)

    def sendingResumed(self) -> None:
        self._tunnel.sending_resumed(self._transport)

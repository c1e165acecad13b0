"""UDP as batches: one socket that receives with UDP_GRO and sends with UDP_SEGMENT, under a batch protocol.

Twisted's `listenUDP` moves one datagram at a time, which costs more than a whole batch does here.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

import attrs
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorFDSet, IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.reactor.clock import boottime
from firezone_tunnel.shell.udp.segmented import SegmentedSender, SendCounters
from firezone_tunnel.shell.udp.sockets import ANCILLARY_SPACE, Ancillary, Arrival, bind, configure, received, remember

PREFERRED_PORT = 52625  # docs/protocol/data-plane.md, 7.4


class IBatchProtocol(Interface):
    """The protocol on a `UdpTransport`."""

    def makeConnection(transport: UdpTransport) -> None:
        """The socket is bound: batches may arrive from the next turn on."""

    def batchReceived(batch: DatagramBatch) -> None:
        """Datagrams of one sender arrived. The batch is valid until this returns."""

    def sendingPaused() -> None:
        """The socket takes no more. What is sent now is queued, within limits: stop reading packets."""

    def sendingResumed() -> None:
        """All that was queued has left."""

    def connectionLost(reason: Failure) -> None:
        """The socket is closed: by `close` (the reason is ConnectionDone), or because handling a batch failed."""


@attrs.define
class UdpCounters(SendCounters):
    """Counters of one socket."""

    received_batches: int = 0
    received_datagrams: int = 0
    received_bytes: int = 0
    receive_overflows: int = 0  # datagrams that found the receive buffer full
    receive_errors: int = 0
    paused: int = 0
    queue_full: int = 0  # transmits dropped, as too many were waiting


@implementer(IReadWriteDescriptor)
class UdpTransport:
    """One UDP socket of one address family.

    A turn of the reactor hands at most `MAX_BATCHES` batches to the protocol, and no further one once `MAX_TURN`
    seconds have passed. The first turn after a calm takes one batch only, so that its answer doesn't wait for a read
    that finds nothing.
    """

    MAX_BATCHES = 32
    MAX_TURN = 0.002
    CALM = 0.001
    MAX_QUEUE = 256  # transmits

    def __init__(
        self,
        reactor: IReactorFDSet,
        protocol: IBatchProtocol,
        *,
        host: str = "0.0.0.0",
        port: int = PREFERRED_PORT,
        fallback_port: int | None = 0,
        mark: int | None = None,
        bound: socket.socket | None = None,
        buffer: memoryview | None = None,
        gso: bool = True,
        gro: bool = True,
        clock: Callable[[], float] = boottime,
    ) -> None:
        """Bind `host` ("0.0.0.0", "::" or one address) to `port`, else to `fallback_port`, and start reading.

        `mark` is the SO_MARK that keeps datagrams out of the tunnel. A `bound` socket, non-blocking, takes the place of
        all this, and is closed with the transport. The sockets of one tunnel may share a `buffer`.
        `gso` and `gro` allow what the kernel may offer; `features` says what it does.

        Raises: PlatformError.
        """
        self._reactor = reactor
        self._protocol = protocol
        self._buffer = buffer or receive_buffer()
        ports = [port] if fallback_port is None else [port, fallback_port]
        udp = bind(host, ports, mark=mark) if bound is None else bound
        self._socket: socket.socket | None = udp
        self._is_ipv6 = udp.family == socket.AF_INET6
        self.features = configure(udp, gso=gso, gro=gro)
        self.counters = UdpCounters()
        self._sender = SegmentedSender(
            is_ipv6=self._is_ipv6, gso=self.features.gso, counters=self.counters, clock=clock
        )
        self._host = SocketAddress(*udp.getsockname()[:2])
        self._arrivals: dict[tuple[Ancillary, ...], tuple[Arrival, SocketAddress | None]] = {}
        self._sources: dict[tuple[Any, ...], SocketAddress] = {}
        self._queue: deque[tuple[Transmit, int]] = deque()  # and the byte from which on it has yet to leave
        self._limiter = Limiter(clock=clock)
        self._ended = perf_counter()  # of the last turn
        self._was_single = False
        reactor.addReader(self)
        protocol.makeConnection(self)

    def getHost(self) -> SocketAddress:
        """The address and port it is bound to."""
        return self._host

    def send(self, transmit: Transmit) -> None:
        """Send, or queue until there is room. The transmit is released once it has left or has been given up.

        A failure is counted, never raised: which paths work is for ICE to find out.
        """
        if self._queue or self._socket is None:
            self._enqueue(transmit, 0)
            return
        blocked_at = self._sender.send(self._socket, transmit)
        if blocked_at is None:
            transmit.release()
            return
        self._enqueue(transmit, blocked_at)

    def forget_paths(self) -> None:
        """The network changed: try segmentation again wherever it had been refused."""
        self._sender.forget_paths()

    def close(self) -> None:
        """Close the socket; what is queued is dropped. May be called more than once."""
        self.connectionLost(Failure(ConnectionDone()))

    def doRead(self) -> None:
        began = perf_counter()
        deadline = began + self.MAX_TURN
        # Never twice in a row: the pause may be the reactor's other work, during which the queue grows.
        most = self.MAX_BATCHES if self._was_single or began - self._ended <= self.CALM else 1
        self._was_single = most == 1
        into = (self._buffer,)
        batch_received = self._protocol.batchReceived
        for _ in range(most):
            if self._socket is None:
                return
            try:
                length, ancillary, _, address = self._socket.recvmsg_into(into, ANCILLARY_SPACE)
            except BlockingIOError:
                break
            except OSError as error:
                self.counters.receive_errors += 1
                self._limiter.warning("udp:receive_failed", key=error.errno, errno=error.errno, reason=error.strerror)
                break
            batch = self._batch(length, tuple(ancillary), address)
            if batch is not None:
                batch_received(batch)
            if perf_counter() >= deadline:
                break
        self._ended = perf_counter()

    def doWrite(self) -> None:
        queue = self._queue
        while queue and self._socket is not None:
            transmit, offset = queue[0]
            blocked_at = self._sender.send(self._socket, transmit, offset)
            if blocked_at is not None:
                queue[0] = (transmit, blocked_at)
                return
            queue.popleft()
            transmit.release()
        self._reactor.removeWriter(self)
        self._protocol.sendingResumed()

    def connectionLost(self, reason: Failure) -> None:
        if self._socket is None:
            return
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._socket.close()
        self._socket = None
        while self._queue:
            self._queue.popleft()[0].release()
        self._protocol.connectionLost(reason)

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def logPrefix(self) -> str:
        return "UdpTransport"

    def _batch(self, length: int, ancillary: tuple[Ancillary, ...], address: tuple[Any, ...]) -> DatagramBatch | None:
        # Consecutive batches say the same: decoding costs more than a look-up by the raw bytes.
        arrival, local = self._arrivals.get(ancillary) or self._decode(ancillary)
        if local is None or not length:
            return None
        source = self._sources.get(address)
        if source is None:
            source = SocketAddress(address[0], address[1])
            remember(self._sources, address, source)
        segment_size = arrival.segment_size or length
        counters = self.counters
        counters.received_batches += 1
        counters.received_datagrams += -(-length // segment_size)
        counters.received_bytes += length
        return DatagramBatch.received(self._buffer, length, segment_size, source, local, arrival.ecn)

    def _decode(self, ancillary: tuple[Ancillary, ...]) -> tuple[Arrival, SocketAddress | None]:
        arrival = received(ancillary)
        if arrival.overflows is not None:
            self.counters.receive_overflows = arrival.overflows
        local = None if arrival.host is None else SocketAddress(arrival.host, self._host.port)
        remember(self._arrivals, ancillary, (arrival, local))
        return arrival, local

    def _enqueue(self, transmit: Transmit, offset: int) -> None:
        if self._socket is None or len(self._queue) >= self.MAX_QUEUE:
            self.counters.queue_full += 1
            transmit.release()
            return
        self._queue.append((transmit, offset))
        if len(self._queue) == 1:
            self.counters.paused += 1
            self._reactor.addWriter(self)
            self._protocol.sendingPaused()

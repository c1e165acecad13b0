"""UDP as batches: one socket that receives with UDP_GRO and sends with UDP_SEGMENT, under a batch protocol.

Twisted's `listenUDP` moves one datagram at a time, which costs more than a whole batch does here.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import attrs
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorFDSet, IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from firezone_tunnel.datagrams import DatagramBatch
from firezone_tunnel.errors import is_unreachable
from firezone_tunnel.logs import events as log
from firezone_tunnel.runtime.clock import boottime
from firezone_tunnel.sansio import SocketAddress, Transmit
from firezone_tunnel.udp.sockets import ANCILLARY_SPACE, Ancillary, Arrival, bind, configure, received, sending
from firezone_tunnel.wireguard.seal import ReceiveBuffer

PREFERRED_PORT = 52625  # spec/data-plane.md, 7.4
RETRY_SEGMENTATION_AFTER = 600.0  # seconds: a path may have changed without any sign of it here


class IBatchProtocol(Interface):
    """What stands on a `UdpTransport`."""

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
class UdpCounters:
    """What one socket has done and seen."""

    received_batches: int = 0
    received_datagrams: int = 0
    received_bytes: int = 0
    receive_overflows: int = 0  # datagrams that found the receive buffer full
    receive_errors: int = 0
    sent_batches: int = 0  # system calls
    sent_datagrams: int = 0
    sent_bytes: int = 0
    paused: int = 0
    queue_full: int = 0  # transmits dropped, as too many were waiting
    unreachable: int = 0
    forbidden: int = 0  # by a local firewall
    no_buffers: int = 0
    send_errors: int = 0
    segmentation_refused: int = 0  # batches sent again as single datagrams


@implementer(IReadWriteDescriptor)
class UdpTransport:
    """One UDP socket of one address family.

    A turn of the reactor hands at most `MAX_BATCHES` batches to the protocol, and no further one once `MAX_TURN`
    seconds have passed. The first turn after a calm takes one batch only: what answers it is not to wait for the news
    that there is no other.
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
        buffer: ReceiveBuffer | None = None,
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
        self._clock = clock
        self._buffer = buffer or ReceiveBuffer()
        ports = [port] if fallback_port is None else [port, fallback_port]
        udp = bind(host, ports, mark=mark) if bound is None else bound
        self._socket: socket.socket | None = udp
        self._is_ipv6 = udp.family == socket.AF_INET6
        self.features = configure(udp, gso=gso, gro=gro)
        self.counters = UdpCounters()
        self._host = SocketAddress(*udp.getsockname()[:2])
        self._arrivals: dict[tuple[Ancillary, ...], tuple[Arrival, SocketAddress | None]] = {}
        self._sources: dict[tuple[Any, ...], SocketAddress] = {}
        self._ancillary: dict[tuple[SocketAddress | None, int, int], list[Ancillary]] = {}
        self._unsegmented: dict[SocketAddress, float] = {}  # until when
        self._queue: deque[tuple[Transmit, int]] = deque()  # and the byte from which on it has yet to leave
        self._logged: set[int] = set()
        self._ended = perf_counter()  # of the last turn
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
        blocked_at = self._attempt(transmit, 0)
        if blocked_at is None:
            transmit.release()
            return
        self._enqueue(transmit, blocked_at)

    def forget_paths(self) -> None:
        """The network changed: try segmentation again wherever it had been refused."""
        self._unsegmented.clear()

    def close(self) -> None:
        """Close the socket; what is queued is dropped. May be called more than once."""
        self.connectionLost(Failure(ConnectionDone()))

    def doRead(self) -> None:
        began = perf_counter()
        deadline = began + self.MAX_TURN
        most = 1 if began - self._ended > self.CALM else self.MAX_BATCHES
        into = (self._buffer.view,)
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
                self._log_once(error, "udp:receive_failed")
                break
            batch = self._batch(length, tuple(ancillary), address)
            if batch is not None:
                batch_received(batch)
            if perf_counter() >= deadline:
                break
        self._ended = perf_counter()

    def doWrite(self) -> None:
        queue = self._queue
        while queue:
            transmit, offset = queue[0]
            blocked_at = self._attempt(transmit, offset)
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
            _remember(self._sources, address, source)
        segment_size = arrival.segment_size or length
        counters = self.counters
        counters.received_batches += 1
        counters.received_datagrams += -(-length // segment_size)
        counters.received_bytes += length
        return DatagramBatch(self._buffer, length, segment_size, source, local, arrival.ecn)

    def _decode(self, ancillary: tuple[Ancillary, ...]) -> tuple[Arrival, SocketAddress | None]:
        arrival = received(ancillary)
        if arrival.overflows is not None:
            self.counters.receive_overflows = arrival.overflows
        local = None if arrival.host is None else SocketAddress(arrival.host, self._host.port)
        _remember(self._arrivals, ancillary, (arrival, local))
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

    def _attempt(self, transmit: Transmit, offset: int) -> int | None:
        """Send what is left of it; where it blocked, or None if it has left or there is no point in trying again."""
        size = transmit.segment_size
        payload = transmit.payload
        if size >= len(payload):
            size = 0
        elif size and (offset or not self._may_segment(transmit.destination)):
            return self._send_singly(transmit, offset)
        try:
            self._sendmsg(transmit, payload, size)
        except BlockingIOError:
            return 0
        except OSError as error:
            if size and error.errno in _SEGMENTATION_REFUSED:
                return self._resend_singly(transmit)
            self._send_failed(error, transmit)
            return None
        self.counters.sent_datagrams += -(-len(payload) // size) if size else 1
        return None

    def _sendmsg(self, transmit: Transmit, payload: bytes | memoryview, segment_size: int) -> None:
        if self._socket is None:
            raise OSError(errno.ENOTCONN, "the socket is closed")
        key = (transmit.source, segment_size, transmit.ecn)
        ancillary = self._ancillary.get(key)
        if ancillary is None:
            ancillary = self._sending(transmit, segment_size)
            _remember(self._ancillary, key, ancillary)
        destination = transmit.destination
        if (":" in destination.host) != self._is_ipv6:
            raise OSError(errno.EAFNOSUPPORT, "an address of the other family")
        self._socket.sendmsg((payload,), ancillary, 0, destination)
        self.counters.sent_batches += 1
        self.counters.sent_bytes += len(payload)

    def _sending(self, transmit: Transmit, segment_size: int) -> list[Ancillary]:
        source = transmit.source.host if transmit.source is not None else None
        return sending(is_ipv6=self._is_ipv6, source=source, segment_size=segment_size, ecn=transmit.ecn)

    def _may_segment(self, destination: SocketAddress) -> bool:
        if not self.features.gso:
            return False
        until = self._unsegmented.get(destination)
        if until is None:
            return True
        if self._clock() < until:
            return False
        del self._unsegmented[destination]
        return True

    def _resend_singly(self, transmit: Transmit) -> int | None:
        """The path refused a segmented send: the batch leaves at once all the same."""
        self.counters.segmentation_refused += 1
        before = self.counters.sent_datagrams
        blocked_at = self._send_singly(transmit, 0)
        # Where single datagrams fail as well, the refusal had nothing to do with segmentation.
        if blocked_at is not None or self.counters.sent_datagrams > before:
            _remember(self._unsegmented, transmit.destination, self._clock() + RETRY_SEGMENTATION_AFTER)
        return blocked_at

    def _send_singly(self, transmit: Transmit, offset: int) -> int | None:
        payload = transmit.payload
        size = transmit.segment_size
        for start in range(offset, len(payload), size):
            try:
                self._sendmsg(transmit, payload[start : start + size], 0)
            except BlockingIOError:
                return start
            except OSError as error:
                self._send_failed(error, transmit)
                return None
            self.counters.sent_datagrams += 1
        return None

    def _send_failed(self, error: OSError, transmit: Transmit) -> None:
        counters = self.counters
        if is_unreachable(error):
            counters.unreachable += 1
            log.debug("udp:unreachable", destination=str(transmit.destination), reason=error.strerror)
        elif isinstance(error, PermissionError):
            counters.forbidden += 1
            if error.errno not in self._logged:
                self._logged.add(error.errno or 0)
                log.info("udp:sending_forbidden", reason="a local firewall refuses some of our datagrams")
        elif error.errno == errno.ENOBUFS:
            counters.no_buffers += 1
        else:
            counters.send_errors += 1
            self._log_once(error, "udp:send_failed")

    def _log_once(self, error: OSError, message_type: str) -> None:
        if error.errno not in self._logged:
            self._logged.add(error.errno or 0)
            log.warning(message_type, errno=error.errno, reason=error.strerror)


_SEGMENTATION_REFUSED = frozenset({errno.EMSGSIZE, errno.EINVAL, errno.EIO})
_MAX_REMEMBERED = 1024


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Keep it, within a bound: remote hosts choose most of these keys."""
    if len(known) >= _MAX_REMEMBERED:
        known.clear()
    known[key] = value

"""Segmented sends: a batch of datagrams leaves in one system call, or one by one where the path refuses that.

GSO fails per path, not per kernel (docs/decisions.md, 2): EMSGSIZE, EINVAL or EIO of a send with UDP_SEGMENT is never
"unreachable". The batch leaves again at once, and the destination keeps to single datagrams for ten minutes.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import attrs

from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.errors import is_unreachable
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.udp.sockets import Ancillary, remember, sending

RETRY_SEGMENTATION_AFTER = 600.0  # seconds: a path may have changed without any sign of it here


@attrs.define
class SendCounters:
    """Datagrams that were sent, and sends that failed, by reason."""

    sent_batches: int = 0  # system calls
    sent_datagrams: int = 0
    sent_bytes: int = 0
    unreachable: int = 0
    forbidden: int = 0  # by a local firewall
    no_buffers: int = 0
    send_errors: int = 0
    segmentation_refused: int = 0  # batches sent again as single datagrams


class SegmentedSender:
    """Sends on sockets of one address family, and remembers which destinations refuse segmented sends."""

    def __init__(self, *, is_ipv6: bool, gso: bool, counters: SendCounters, clock: Callable[[], float]) -> None:
        """`gso` says whether the kernel has UDP_SEGMENT; `clock` is CLOCK_BOOTTIME in seconds."""
        self._is_ipv6 = is_ipv6
        self._gso = gso
        self._counters = counters
        self._clock = clock
        self._ancillary: dict[tuple[SocketAddress | None, int, int], list[Ancillary]] = {}
        self._unsegmented: dict[SocketAddress, float] = {}  # until when
        self._limiter = Limiter(clock=clock)

    def send(self, udp: socket.socket, transmit: Transmit, offset: int = 0) -> int | None:
        """Send a transmit from the byte at `offset` on, where an earlier attempt has blocked.

        Returns the byte at which the socket blocked; None if everything left, or can't leave. Errors are counted,
        never raised: ICE finds out which paths work.
        """
        size = transmit.segment_size
        payload = transmit.payload
        if size >= len(payload):
            size = 0
        elif size and (offset or not self._may_segment(transmit.destination)):
            return self._send_singly(udp, transmit, offset)
        try:
            self._sendmsg(udp, transmit, payload, size)
        except BlockingIOError:
            return 0
        except OSError as error:
            if size and error.errno in _SEGMENTATION_REFUSED:
                return self._resend_singly(udp, transmit)
            self._failed(error, transmit)
            return None
        self._counters.sent_datagrams += -(-len(payload) // size) if size else 1
        return None

    def forget_paths(self) -> None:
        """The network changed: try segmentation again wherever it had been refused."""
        self._unsegmented.clear()

    def _sendmsg(self, udp: socket.socket, transmit: Transmit, payload: bytes | memoryview, segment_size: int) -> None:
        key = (transmit.source, segment_size, transmit.ecn)
        ancillary = self._ancillary.get(key)
        if ancillary is None:
            source = None if transmit.source is None else transmit.source.host
            ancillary = sending(is_ipv6=self._is_ipv6, source=source, segment_size=segment_size, ecn=transmit.ecn)
            remember(self._ancillary, key, ancillary)
        destination = transmit.destination
        if (":" in destination.host) != self._is_ipv6:
            raise OSError(errno.EAFNOSUPPORT, "an address of the other family")
        udp.sendmsg((payload,), ancillary, 0, destination)
        self._counters.sent_batches += 1
        self._counters.sent_bytes += len(payload)

    def _may_segment(self, destination: SocketAddress) -> bool:
        if not self._gso:
            return False
        until = self._unsegmented.get(destination)
        if until is None:
            return True
        if self._clock() < until:
            return False
        del self._unsegmented[destination]
        return True

    def _resend_singly(self, udp: socket.socket, transmit: Transmit) -> int | None:
        """The path refused a segmented send: the batch leaves at once all the same."""
        before = self._counters.sent_datagrams
        blocked_at = self._send_singly(udp, transmit, 0)
        # Where single datagrams fail as well, the refusal had nothing to do with segmentation.
        if blocked_at is not None or self._counters.sent_datagrams > before:
            self._counters.segmentation_refused += 1
            remember(self._unsegmented, transmit.destination, self._clock() + RETRY_SEGMENTATION_AFTER)
        return blocked_at

    def _send_singly(self, udp: socket.socket, transmit: Transmit, offset: int) -> int | None:
        payload = transmit.payload
        size = transmit.segment_size
        for start in range(offset, len(payload), size):
            try:
                self._sendmsg(udp, transmit, payload[start : start + size], 0)
            except BlockingIOError:
                return start
            except OSError as error:
                self._failed(error, transmit)
                return None
            self._counters.sent_datagrams += 1
        return None

    def _failed(self, error: OSError, transmit: Transmit) -> None:
        counters = self._counters
        if is_unreachable(error):
            counters.unreachable += 1
            log.debug("udp:unreachable", destination=str(transmit.destination), reason=error.strerror)
        elif isinstance(error, PermissionError):
            counters.forbidden += 1
            reason = "a local firewall refuses some of our datagrams"
            self._limiter.info("udp:sending_forbidden", errno=error.errno, reason=reason)
        elif error.errno == errno.ENOBUFS:
            counters.no_buffers += 1
        else:
            counters.send_errors += 1
            self._limiter.warning("udp:send_failed", key=error.errno, errno=error.errno, reason=error.strerror)


_SEGMENTATION_REFUSED = frozenset({errno.EMSGSIZE, errno.EINVAL, errno.EIO})

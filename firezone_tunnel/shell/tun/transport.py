"""A TUN device under a packet protocol, which gets the packets of a turn as one list of super-packets."""

from __future__ import annotations

import errno
import os
from time import perf_counter

import attrs
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IReactorFDSet, IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from firezone_tunnel.core.packet.coalesce import Arena, coalesce_lone
from firezone_tunnel.core.packet.fair_queue import FairQueue
from firezone_tunnel.core.packet.superpacket import (
    TCP,
    UDP,
    VIRTIO_HEADER_SIZE,
    SuperPacket,
    from_virtio,
    virtio_header,
)
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.tun.device import Offload, TunDevice


class IPacketProtocol(Interface):
    """The protocol on a `TunTransport`."""

    def makeConnection(transport: TunTransport) -> None:
        """The device is open: packets may arrive from the next turn on."""

    def packetsReceived(packets: list[SuperPacket]) -> None:
        """The host sent packets into the tunnel; they are valid until this returns."""

    def connectionLost(reason: Failure) -> None:
        """The device is closed: by `close` (the reason is ConnectionDone), or it was removed."""


@attrs.define
class TunCounters:
    """Counters of one device."""

    turns: int = 0
    received_frames: int = 0
    received_packets: int = 0  # super-packets, after merging
    received_bytes: int = 0
    malformed: int = 0
    waited_too_long: int = 0
    read_errors: int = 0
    written_frames: int = 0
    written_bytes: int = 0
    link_down: int = 0
    no_buffers: int = 0
    write_errors: int = 0
    segmentation_refused: int = 0  # super-packets written segment by segment instead


@implementer(IReadWriteDescriptor)
class TunTransport:
    """Reads and writes one TUN device.

    The kernel's queue is limited by a count of frames of up to 64 KiB each, so no count is both long enough for a burst
    of datagrams and short enough for TCP. Each turn of the reactor therefore empties it, within `MAX_READS` frames and
    `MAX_TURN` seconds, and what is more than one portion waits in a queue that is limited by time.

    A portion is at most `MAX_FRAMES` packets, or as many runs of 64 KiB as fill the slab: sealing them is what takes
    the time. The first turn after a calm reads one frame only, so that a lone packet doesn't wait for a read that finds
    nothing.
    """

    MAX_FRAMES = 64
    MAX_READS = 1024
    MAX_TURN = 0.001
    CALM = 0.001

    def __init__(self, reactor: IReactorFDSet, protocol: IPacketProtocol, device: TunDevice) -> None:
        """Start reading. From now on the device is the transport's to close."""
        self._reactor = reactor
        self._protocol = protocol
        self._fd = device.fd
        self.device = device
        self.counters = TunCounters()
        self._slab = memoryview(bytearray(_SLAB_SIZE))
        self._arena = Arena(_SLAB_SIZE)
        # IP protocols whose super-packets the kernel refuses, and IP protocols whose it has accepted.
        self._refused = {kind for kind, needed in _RUNS.items() if device.offload < needed}
        self._taken: set[int] = set()
        self._limiter = Limiter()
        self._ended = perf_counter()  # of the last turn
        self._was_single = False
        self._queue = FairQueue()
        self._is_paused = False
        protocol.makeConnection(self)
        self.resumeProducing()

    def pauseProducing(self) -> None:
        """Deliver nothing for now: packets wait in our queue, and once it is full in the kernel's, which drops some."""
        self._is_paused = True
        self._reactor.removeWriter(self)

    def resumeProducing(self) -> None:
        """Deliver again."""
        self._is_paused = False
        if self._fd == -1:
            return
        if not self._queue.is_full:
            self._reactor.addReader(self)
        if self._queue:
            self._reactor.addWriter(self)

    def write(self, packet: SuperPacket) -> None:
        """Hand a packet to the host. A packet that the kernel refuses is dropped and counted."""
        if packet.segment_size and packet.protocol in self._refused:
            self._write_singly(packet)
            return
        try:
            written = os.writev(self._fd, (virtio_header(packet), packet.data))
        except OSError as error:
            if error.errno == errno.EINVAL and packet.segment_size:
                self._run_refused(packet)
            else:
                self._write_failed(error)
            return
        counters = self.counters
        counters.written_frames += 1
        counters.written_bytes += written
        if packet.segment_size:
            self._taken.add(packet.protocol)

    def close(self) -> None:
        """Close the device, and so remove it from the host. May be called more than once."""
        self._lose(Failure(ConnectionDone()))

    def doRead(self) -> None:
        began = perf_counter()
        deadline = began + self.MAX_TURN
        # Never twice in a row: the pause may be the reactor's other work, during which the queue grows.
        most = self.MAX_READS if self._was_single or began - self._ended <= self.CALM else 1
        self._was_single = most == 1
        fd = self._fd
        if fd == -1:
            return
        slab = self._slab
        counters = self.counters
        packets: list[SuperPacket] = []
        position = _FIRST_FRAME
        failure: OSError | None = None
        for _ in range(most):
            try:
                length = os.readv(fd, (slab[position : position + _FRAME_SIZE],))
            except BlockingIOError:
                break
            except OSError as error:
                failure = error
                break
            if not length:
                failure = OSError(errno.EBADFD, "end of file")
                break
            packet = from_virtio(slab[position : position + length])
            counters.received_frames += 1
            counters.received_bytes += length
            if packet is None:
                counters.malformed += 1
            else:
                packets.append(packet)
                position += length + 7 & ~7
            if position > _LAST_FRAME:
                self._enqueue(packets)
                packets = []
                position = _FIRST_FRAME
                if self._queue.is_full:
                    break
            if perf_counter() >= deadline:
                break
        if packets:
            if self._queue or self._is_paused or len(packets) > self.MAX_FRAMES:
                self._enqueue(packets)
            else:
                self._deliver(packets)
        if failure is not None:
            self._read_failed(failure)
        self._ended = perf_counter()

    def doWrite(self) -> None:
        """Deliver a portion of the queue. The device is always writable: the reactor calls this once in each turn."""
        if self._fd == -1 or self._is_paused:
            return
        queue = self._queue
        now = perf_counter()
        packets: list[SuperPacket] = []
        size = 0
        while len(packets) < self.MAX_FRAMES and size < _LAST_FRAME:
            packet = queue.take(now)
            if packet is None:
                break
            packets.append(packet)
            size += len(packet.data)
        self.counters.waited_too_long = queue.dropped
        if not queue:
            self._reactor.removeWriter(self)
        if not queue.is_full:
            self._reactor.addReader(self)
        if packets:
            self._deliver(packets)
        self._ended = perf_counter()

    def connectionLost(self, reason: Failure) -> None:
        if isinstance(reason.value, ConnectionDone):
            # What the reactor makes of EPOLLERR: to our protocol only `close` is clean.
            reason = _removed(self.device)
        self._lose(reason)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return "TunTransport"

    def _enqueue(self, packets: list[SuperPacket]) -> None:
        """Let packets wait, in memory of their own."""
        queue, now = self._queue, perf_counter()
        for packet in packets:
            packet.data = memoryview(bytearray(packet.data))
            queue.add(packet, now)
        if queue.is_full:
            self._reactor.removeReader(self)
        if not self._is_paused:
            self._reactor.addWriter(self)

    def _deliver(self, packets: list[SuperPacket]) -> None:
        if len(packets) > 1:
            self._arena.reset()
            packets = coalesce_lone(packets, self._arena)
        self.counters.turns += 1
        self.counters.received_packets += len(packets)
        self._protocol.packetsReceived(packets)

    def _read_failed(self, error: OSError) -> None:
        if error.errno == errno.EBADFD:
            self._lose(_removed(self.device))
            return
        self.counters.read_errors += 1
        name, number = self.device.name, error.errno
        self._limiter.warning("tun:read_failed", key=number, interface=name, errno=number, reason=error.strerror)

    def _run_refused(self, packet: SuperPacket) -> None:
        """The kernel refuses super-packets of this protocol; or only this one, if it has accepted others."""
        self.counters.segmentation_refused += 1
        if packet.protocol not in self._taken:
            self._refused.add(packet.protocol)
            log.info("tun:segmentation_refused", interface=self.device.name, protocol=packet.protocol)
        self._write_singly(packet)

    def _write_singly(self, packet: SuperPacket) -> None:
        for index in range(packet.segments):
            segment = packet.segment(index)
            try:
                written = os.writev(self._fd, (virtio_header(segment), segment.data))
            except OSError as error:
                self._write_failed(error)
                return
            self.counters.written_frames += 1
            self.counters.written_bytes += written

    def _write_failed(self, error: OSError) -> None:
        counters = self.counters
        if error.errno in _LINK_DOWN:
            counters.link_down += 1
        elif error.errno in _NO_BUFFERS:
            counters.no_buffers += 1
        else:
            counters.write_errors += 1
            name, number = self.device.name, error.errno
            self._limiter.warning("tun:write_failed", key=number, interface=name, errno=number, reason=error.strerror)

    def _lose(self, reason: Failure) -> None:
        if self._fd == -1:
            return
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        self._queue.clear()
        self._fd = -1
        self.device.close()
        self._protocol.connectionLost(reason)


_FRAME_SIZE = VIRTIO_HEADER_SIZE + 65_535
_SLAB_SIZE = 256 * 1024
_FIRST_FRAME = 6  # so that its packet starts at a multiple of 8 bytes, and so the others
_LAST_FRAME = _SLAB_SIZE - _FRAME_SIZE

_RUNS = {TCP: Offload.TCP, UDP: Offload.UDP}
_LINK_DOWN = frozenset({errno.EIO, errno.EBADFD, errno.EBADF})  # the last two: removed, as the next read will find
_NO_BUFFERS = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})


def _removed(device: TunDevice) -> Failure:
    removed = ConnectionLost(f"the network interface {device.name} was removed")
    return Failure(removed)

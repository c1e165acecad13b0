"""Transport data messages (WireGuard whitepaper, section 5.4.6), sealed and opened a whole batch at a time.

A message is: type 4 (u8), three zero bytes, receiver index (u32), counter (u64), all little-endian; then the
encrypted packet and its 16-byte tag. The nonce is four zero bytes and the counter.

Everything here works in place in memory that is allocated once. What costs time is making views, so they are made
once for each layout and kept: `benchmarks/core.py` shows the result.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.packet.layout import Layouts, column
from firezone_tunnel.packet.segmentation import SegmentSlots, Shape, Template
from firezone_tunnel.packet.superpacket import SuperPacket
from firezone_tunnel.turn.channel import FIRST_CHANNEL, LAST_PARSED_CHANNEL
from firezone_tunnel.turn.channel import HEADER as _CHANNEL_HEADER

MESSAGE_TYPE = 4
HEADER_SIZE = 16
TAG_SIZE = 16
OVERHEAD = HEADER_SIZE + TAG_SIZE
MAX_SEGMENTS = 64  # Linux, UDP_MAX_SEGMENTS
MAX_SEND_SIZE = 65_507  # 65,535 less IPv4 and UDP headers
POOL_SIZE = 8
RECEIVE_BUFFER_SIZE = 65_536

Mask = npt.NDArray[np.bool_]
Counters = npt.NDArray[np.uint64]


def plan(packet: SuperPacket, headroom: int = 0) -> list[tuple[int, int]]:
    """Cut a super-packet into as few sends as the kernel allows, nearly equal: (first segment, count) of each.

    A small remainder would make one more small batch of every large one at each step of its way.
    """
    segments = packet.segments
    if segments == 1:
        return [(0, 1)]
    most = send_limit(packet.header_length + packet.segment_size, headroom)
    sends = -(-segments // most)
    if sends == 1:
        return [(0, segments)]
    share, larger = divmod(segments, sends)
    cuts = [i * share + min(i, larger) for i in range(sends + 1)]
    return [(first, after - first) for first, after in pairwise(cuts)]


def send_limit(length: int, headroom: int = 0) -> int:
    """How many packets of `length` bytes fit one send, sealed."""
    return min(MAX_SEGMENTS, MAX_SEND_SIZE // (headroom + OVERHEAD + length))


def seal_message(cipher: ChaCha20Poly1305, receiver_index: int, counter: int, plaintext: bytes) -> bytes:
    """Seal a single message into memory of its own: a keepalive (empty) or a control packet."""
    header = _HEADER.pack(MESSAGE_TYPE, receiver_index, counter)
    return header + cipher.encrypt(bytes(4) + header[8:], plaintext, None)


class SlotPool:
    """The buffers that a tunnel seals into; whoever sends gives them back. TUN reads pause when none is free."""

    def __init__(self, size: int = POOL_SIZE) -> None:
        self._unmade = size
        self._idle: list[SlotBuffer] = []

    @property
    def free(self) -> int:
        return self._unmade + len(self._idle)

    def borrow(self) -> SlotBuffer | None:
        if self._idle:
            buffer = self._idle.pop()
            buffer._lent = True
            return buffer
        if not self._unmade:
            return None
        self._unmade -= 1
        return SlotBuffer(self)


class SlotBuffer:
    """Room for one send: up to 64 sealed datagrams of one size in a row, the last maybe shorter.

    What `seal` and `seal_lone` return is valid until the next call of either, or `release()`.
    """

    __slots__ = ("_layouts", "_lent", "_memory", "_nonces", "_pool", "_stamp", "_view")

    def __init__(self, pool: SlotPool | None = None) -> None:
        self._pool = pool
        self._lent = True
        self._memory = bytearray(MAX_SEND_SIZE)
        self._view = memoryview(self._memory)
        self._nonces = _Nonces(MAX_SEGMENTS)
        self._layouts: Layouts[_Slots] = Layouts()
        self._stamp: tuple[_Slots | None, int] = (None, 0)

    def release(self) -> None:
        """Give the buffer back to its pool.

        Raises: RuntimeError if it was given back already: somebody else may be using it by now.
        """
        if not self._lent:
            raise RuntimeError("a slot buffer was released twice")
        self._lent = False
        if self._pool is not None:
            self._pool._idle.append(self)

    def seal(
        self,
        cipher: ChaCha20Poly1305,
        receiver_index: int,
        first_counter: int,
        packet: SuperPacket,
        *,
        first_segment: int = 0,
        count: int = 1,
        headroom: int = 0,
    ) -> tuple[memoryview, int]:
        """Segment and encrypt `count` segments of a packet, one of the sends of `plan(packet, headroom)`.

        Returns the datagrams in a row, each `headroom` bytes that the caller may fill, the message's header, the
        packet and the tag; and the size of each but the last, 0 if there is only one. A lone packet whose checksum
        is partial gets it completed in place.
        """
        if not packet.segment_size:
            packet.complete()
            return self._seal_single(cipher, receiver_index, first_counter, packet.data, headroom), 0
        if count == 1:
            alone = packet.segment(first_segment).data
            return self._seal_single(cipher, receiver_index, first_counter, alone, headroom), 0
        template = Template(packet, first_segment, count)
        length = packet.header_length + packet.segment_size
        slots = self._prepare((length, headroom, template.shape), receiver_index)
        slots.write_counters(self._nonces, first_counter, count)
        slots.segments.write(template)
        jobs = slots.jobs(self._nonces, count)
        if template.last_length != packet.segment_size:
            jobs[-1] = _short_job(jobs[-1], packet.header_length + template.last_length)
        seal_rows(cipher, jobs)
        return self._view[: slots.stride * count - (packet.segment_size - template.last_length)], slots.stride

    def seal_lone(
        self,
        cipher: ChaCha20Poly1305,
        receiver_index: int,
        first_counter: int,
        packets: Sequence[SuperPacket],
        *,
        headroom: int = 0,
    ) -> tuple[memoryview, int]:
        """Encrypt lone packets of one length, at most `send_limit(length, headroom)` of them, as one send.

        Returns what `seal` does.
        """
        count = len(packets)
        if count == 1:
            return self.seal(cipher, receiver_index, first_counter, packets[0], headroom=headroom)
        length = len(packets[0].data)
        slots = self._prepare((length, headroom, None), receiver_index)
        slots.write_counters(self._nonces, first_counter, count)
        jobs = slots.jobs(self._nonces, count)
        for packet, job in zip(packets, jobs, strict=True):
            if packet.checksum_start:
                packet.complete()
            job[1][:] = packet.data
        seal_rows(cipher, jobs)
        return self._view[: slots.stride * count], slots.stride

    def _prepare(self, key: _SlotsKey, receiver_index: int) -> _Slots:
        slots = self._layouts.get(key)
        if slots is None:
            slots = self._layouts.put(key, _Slots(self._memory, key))
        # Layouts share the memory: types and receiver indices stay only as long as no other layout has been used.
        if self._stamp[0] is not slots or self._stamp[1] != receiver_index:
            slots.starts[:] = MESSAGE_TYPE | receiver_index << 32
            self._stamp = (slots, receiver_index)
        return slots

    def _seal_single(
        self, cipher: ChaCha20Poly1305, receiver_index: int, counter: int, data: memoryview, headroom: int
    ) -> memoryview:
        view = self._view
        self._stamp = (None, 0)
        _HEADER.pack_into(view, headroom, MESSAGE_TYPE, receiver_index, counter)
        start = headroom + HEADER_SIZE
        end = start + len(data)
        view[start:end] = data
        nonce = _NONCE.pack(counter)
        cipher.encrypt_into(nonce, view[start:end], None, view[start : end + TAG_SIZE])
        return view[: end + TAG_SIZE]


class Opened(NamedTuple):
    """What `ReceiveBuffer.open` decrypted: packet i is `size` bytes at `offset + i * stride`, the last `last_size`."""

    offset: int
    stride: int
    size: int
    last_size: int
    packets: int  # how many
    counters: Counters  # valid until the next receive
    authentic: Mask
    failed: int  # how many are not authentic

    def where(self) -> dict[str, int]:
        """What `packet.coalesce.coalesce` has to know about the place of the packets."""
        return {
            "offset": self.offset,
            "stride": self.stride,
            "size": self.size,
            "count": self.packets,
            "last_size": self.last_size,
        }


class ReceiveBuffer:
    """The memory that a UDP transport receives batches into, and which they are decrypted in.

    The datagrams of a batch stand one after another from the start, `segment_size` bytes each but the last;
    in each, `headroom` bytes (a relay's channel header) come before the message.
    """

    __slots__ = ("_layouts", "_memory", "_nonces", "view")

    view: memoryview

    def __init__(self, size: int = RECEIVE_BUFFER_SIZE) -> None:
        self._memory = bytearray(size)
        self.view = memoryview(self._memory)
        self._nonces = _Nonces(size // OVERHEAD)
        self._layouts: Layouts[_Rows] = Layouts()

    def common_receiver(self, *, length: int, segment_size: int, headroom: int = 0) -> int | None:
        """The receiver index, if every datagram of the batch is a transport data message with the same one."""
        receiver = self.receiver(0, length=length, segment_size=segment_size, headroom=headroom)
        if length <= segment_size or receiver is None:
            return receiver
        count, last = _shape(length, segment_size)
        if last < headroom + OVERHEAD:
            return None
        starts = self._received(segment_size, headroom).starts[:count].tobytes()
        return receiver if starts == starts[:8] * count else None  # faster than NumPy for so few

    def common_channel(self, *, length: int, segment_size: int) -> int | None:
        """The channel number, if every datagram of the batch is TURN channel data on the same channel, its length field
        right (RFC 8656, section 12.4).
        """
        count = _shape(length, segment_size)[0]
        channel = self.channel(count - 1, length=length, segment_size=segment_size)
        if count <= 1 or channel is None:
            return channel
        headers = self._received(segment_size, _CHANNEL_HEADER.size).headers[: count - 1].tobytes()
        whole = _CHANNEL_HEADER.pack(channel, segment_size - _CHANNEL_HEADER.size)
        return channel if headers == whole * (count - 1) else None

    def channel(self, index: int, *, length: int, segment_size: int) -> int | None:
        """The channel number of one datagram; None if it is no channel data."""
        start = index * segment_size
        size = min(segment_size, length - start)
        if size < _CHANNEL_HEADER.size:
            return None
        channel, content = _CHANNEL_HEADER.unpack_from(self._memory, start)
        is_channel = FIRST_CHANNEL <= channel <= LAST_PARSED_CHANNEL and content == size - _CHANNEL_HEADER.size
        return channel if is_channel else None

    def receiver(self, index: int, *, length: int, segment_size: int, headroom: int = 0) -> int | None:
        """The receiver index of one datagram; None if it is no transport data message."""
        start = index * segment_size
        if min(segment_size, length - start) < headroom + OVERHEAD:
            return None
        kind, receiver, _ = _HEADER.unpack_from(self._memory, start + headroom)
        return receiver if kind == MESSAGE_TYPE else None

    def open_lone(
        self, cipher: ChaCha20Poly1305, *, length: int, start: int = 0, headroom: int = 0
    ) -> tuple[memoryview, int | None]:
        """Authenticate and decrypt, in place, the datagram of `length` bytes at `start`.

        Lone datagrams have any size: a layout for each would push out those of the batches. Returns the packet, and the
        message's counter; None if it is forged.
        """
        view = self.view
        counter = _HEADER.unpack_from(self._memory, start + headroom)[2]
        packet = start + headroom + HEADER_SIZE
        end = start + length
        opened = view[packet : end - TAG_SIZE]
        try:
            cipher.decrypt_into(_NONCE.pack(counter), view[packet:end], None, opened)
        except InvalidTag:
            return opened, None
        return opened, counter

    def open(
        self,
        cipher: ChaCha20Poly1305,
        *,
        length: int,
        segment_size: int,
        headroom: int = 0,
        first: int = 0,
        count: int | None = None,
    ) -> Opened:
        """Authenticate and decrypt, in place, the `count` (default: all) datagrams from `first` on.

        They must be transport data messages, as `common_receiver` or `receiver` say. Forged ones are marked; what
        is in their place is undefined. An empty packet is a keepalive. For a single one there is `open_lone`.
        """
        total, last = _shape(length, segment_size)
        after = total if count is None else first + count
        received = self._received(segment_size, headroom)
        counters = received.counters[first:after]
        self._nonces.counters[first:after] = counters
        jobs = received.jobs(self._nonces, total)[first:after]
        last_size = last if after == total else segment_size
        if last_size != segment_size:
            jobs[-1] = _short_job(jobs[-1], last_size - headroom - OVERHEAD)
        failed = open_rows(cipher, jobs)
        authentic = np.ones(after - first, np.bool_)
        if failed:
            authentic[failed] = False
        return Opened(
            offset=first * segment_size + headroom + HEADER_SIZE,
            stride=segment_size,
            size=segment_size - headroom - OVERHEAD,
            last_size=last_size - headroom - OVERHEAD,
            packets=after - first,
            counters=counters,
            authentic=authentic,
            failed=len(failed),
        )

    def _received(self, segment_size: int, headroom: int) -> _Rows:
        key = (segment_size, headroom)
        received = self._layouts.get(key)
        if received is None:
            # As many rows as have room for a message's header: the last datagram may be short.
            rows = 1 + (len(self._memory) - headroom - HEADER_SIZE) // segment_size
            layout = _Rows(self._memory, stride=segment_size, headroom=headroom, rows=rows)
            received = self._layouts.put(key, layout)
        return received


_Job = tuple[memoryview | bytes, memoryview, memoryview]
"""(nonce, packet, packet and tag): the last two start at the same byte."""


def seal_rows(cipher: ChaCha20Poly1305, jobs: Sequence[_Job]) -> None:
    """Encrypt packets in place, each with room for its tag behind it. With `open_rows` the one place for the AEAD."""
    encrypt_into = cipher.encrypt_into
    for nonce, packet, sealed in jobs:
        encrypt_into(nonce, packet, None, sealed)


def open_rows(cipher: ChaCha20Poly1305, jobs: Sequence[_Job]) -> list[int]:
    """Decrypt packets in place, and say which of them are not authentic."""
    decrypt_into = cipher.decrypt_into
    failed: list[int] = []
    for row, (nonce, packet, sealed) in enumerate(jobs):
        try:
            decrypt_into(nonce, sealed, None, packet)
        except InvalidTag:
            failed.append(row)
    return failed


_HEADER = struct.Struct("<IIQ")
"""type and reserved bytes, receiver index, counter (whitepaper, section 5.4.6)."""
_NONCE = struct.Struct("<4xQ")
_NONCE_SIZE = 12

_SlotsKey = tuple[int, int, Shape | None]
"""(length of the packets, headroom, shape where they are segments)."""


class _Rows:
    """What both kinds of buffer know of one layout: messages `stride` bytes apart, `headroom` bytes before each."""

    def __init__(self, memory: bytearray, *, stride: int, headroom: int, rows: int) -> None:
        self.rows = rows
        self.stride = stride
        self._memory = memory
        self._packet = headroom + HEADER_SIZE
        self._length = stride - headroom - OVERHEAD
        self._jobs: list[_Job] = []
        self.starts = column(memory, "<u8", headroom, stride, rows)  # type and receiver index
        self.counters = column(memory, "<u8", headroom + 8, stride, rows)
        self.headers = column(memory, "<u4", 0, stride, rows)  # of a channel, where there is headroom

    def jobs(self, nonces: _Nonces, count: int) -> list[_Job]:
        """What to hand to the AEAD for the first `count` messages; views are made when they are first needed."""
        jobs = self._jobs
        if len(jobs) < count:
            view = memoryview(self._memory)
            for row in range(len(jobs), count):
                start = row * self.stride + self._packet
                end = start + self._length
                jobs.append((nonces.view(row), view[start:end], view[start : end + TAG_SIZE]))
        return jobs[:count]


def _short_job(job: _Job, length: int) -> _Job:
    nonce, packet, sealed = job
    return nonce, packet[:length], sealed[: length + TAG_SIZE]


class _Slots(_Rows):
    """The views of one layout of a slot buffer."""

    def __init__(self, memory: bytearray, key: _SlotsKey) -> None:
        length, headroom, shape = key
        stride = headroom + OVERHEAD + length
        rows = send_limit(length, headroom)
        super().__init__(memory, stride=stride, headroom=headroom, rows=rows)
        if shape is not None:
            self.segments = SegmentSlots(memory, shape, rows=rows, stride=stride, offset=headroom + HEADER_SIZE)

    def write_counters(self, nonces: _Nonces, first: int, count: int) -> None:
        column = nonces.counters[:count]
        np.add(_COUNT[:count], np.uint64(first), out=column)
        self.counters[:count] = column


class _Nonces:
    """Nonces in a row, shared by all layouts of a buffer."""

    __slots__ = ("_views", "counters")

    def __init__(self, rows: int) -> None:
        memory = bytearray(rows * _NONCE_SIZE)
        view = memoryview(memory)
        self.counters = column(memory, "<u8", 4, _NONCE_SIZE, rows)
        self._views = [view[start : start + _NONCE_SIZE] for start in range(0, len(memory), _NONCE_SIZE)]

    def view(self, row: int) -> memoryview:
        return self._views[row]


def _shape(length: int, segment_size: int) -> tuple[int, int]:
    """How many datagrams a batch has, and the size of the last."""
    if segment_size <= 0 or length <= 0:
        return 0, 0
    count = -(-length // segment_size)
    return count, length - (count - 1) * segment_size


_COUNT = np.arange(MAX_SEGMENTS, dtype=np.uint64)

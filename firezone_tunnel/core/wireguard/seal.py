"""Seal packets into transport data messages a whole send at a time: segmented, encrypted, ready to leave.

Everything works in place in memory that is allocated once. Views of a layout are made once and kept, as making them
is what costs: `benchmarks/core.py` shows the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.core.datagrams import MAX_SEGMENTS, BufferPool, SendBuffer, send_limit
from firezone_tunnel.core.packet.layout import Layouts
from firezone_tunnel.core.packet.segmentation import SegmentSlots, Shape, Template
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.wireguard.transport_data import (
    HEADER,
    HEADER_SIZE,
    MESSAGE_TYPE,
    NONCE,
    OVERHEAD,
    TAG_SIZE,
    MessageRows,
    NonceRows,
    seal_rows,
    shorten,
)

POOL_SIZE = 8


def plan(packet: SuperPacket, headroom: int = 0) -> list[tuple[int, int]]:
    """Cut a super-packet into as few sends as the kernel allows, nearly equal: (first segment, count) of each.

    A small remainder would add a small batch to every large one at each step of the way.
    """
    segments = packet.segments
    if segments == 1:
        return [(0, 1)]
    most = send_limit(headroom + OVERHEAD + packet.header_length + packet.segment_size)
    sends = -(-segments // most)
    if sends == 1:
        return [(0, segments)]
    share, larger = divmod(segments, sends)
    cuts = [i * share + min(i, larger) for i in range(sends + 1)]
    return [(first, after - first) for first, after in pairwise(cuts)]


def seal_pool(size: int = POOL_SIZE) -> BufferPool[SealBuffer]:
    """The buffers of one tunnel. TUN reads pause while all of them are lent."""
    return BufferPool(SealBuffer, size)


class SealBuffer(SendBuffer):
    """Room for one send: up to 64 sealed datagrams of one size in a row, of which the last may be shorter.

    What `seal` and `seal_lone` return is valid until the next call of either, or `release()`.
    """

    __slots__ = ("_layouts", "_nonces", "_stamp")

    def __init__(self, pool: BufferPool[Any]) -> None:
        super().__init__(pool)
        self._nonces = NonceRows(MAX_SEGMENTS)
        self._layouts: Layouts[_Slots] = Layouts()
        self._stamp: tuple[_Slots | None, int] = (None, 0)

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
            segment = packet.segment(first_segment).data
            return self._seal_single(cipher, receiver_index, first_counter, segment, headroom), 0
        template = Template(packet, first_segment, count)
        length = packet.header_length + packet.segment_size
        slots = self._prepare((length, headroom, template.shape), receiver_index)
        slots.write_counters(self._nonces, first_counter, count)
        slots.segments.write(template)
        jobs = slots.jobs(self._nonces, count)
        if template.last_length != packet.segment_size:
            jobs[-1] = shorten(jobs[-1], packet.header_length + template.last_length)
        seal_rows(cipher, jobs)
        return self.view[: slots.stride * count - (packet.segment_size - template.last_length)], slots.stride

    def seal_lone(
        self,
        cipher: ChaCha20Poly1305,
        receiver_index: int,
        first_counter: int,
        packets: Sequence[SuperPacket],
        *,
        headroom: int = 0,
    ) -> tuple[memoryview, int]:
        """Encrypt lone packets of one length, no more than fit into one send.

        Returns the same as `seal`.
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
        return self.view[: slots.stride * count], slots.stride

    def _prepare(self, key: _SlotsKey, receiver_index: int) -> _Slots:
        slots = self._layouts.get(key)
        if slots is None:
            slots = self._layouts.put(key, _Slots(self.memory, key))
        # Layouts share the memory: types and receiver indices stay only as long as no other layout has been used.
        if self._stamp[0] is not slots or self._stamp[1] != receiver_index:
            slots.starts[:] = MESSAGE_TYPE | receiver_index << 32
            self._stamp = (slots, receiver_index)
        return slots

    def _seal_single(
        self, cipher: ChaCha20Poly1305, receiver_index: int, counter: int, data: memoryview, headroom: int
    ) -> memoryview:
        view = self.view
        self._stamp = (None, 0)
        HEADER.pack_into(view, headroom, MESSAGE_TYPE, receiver_index, counter)
        start = headroom + HEADER_SIZE
        end = start + len(data)
        view[start:end] = data
        cipher.encrypt_into(NONCE.pack(counter), view[start:end], None, view[start : end + TAG_SIZE])
        return view[: end + TAG_SIZE]


_SlotsKey = tuple[int, int, Shape | None]
"""(length of the packets, headroom, shape where they are segments)."""


class _Slots(MessageRows):
    """The views of one layout of a seal buffer."""

    def __init__(self, memory: bytearray, key: _SlotsKey) -> None:
        length, headroom, shape = key
        size = OVERHEAD + length
        stride = headroom + size
        rows = send_limit(stride)
        super().__init__(memory, offset=headroom, stride=stride, size=size, rows=rows)
        if shape is not None:
            self.segments = SegmentSlots(memory, shape, rows=rows, stride=stride, offset=headroom + HEADER_SIZE)

    def write_counters(self, nonces: NonceRows, first: int, count: int) -> None:
        column = nonces.counters[:count]
        np.add(_COUNT[:count], np.uint64(first), out=column)
        self.counters[:count] = column


_COUNT = np.arange(MAX_SEGMENTS, dtype=np.uint64)

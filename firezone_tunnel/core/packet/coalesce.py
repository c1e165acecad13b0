"""Merge packets into super-packets by the rules of the kernel's GRO: segmentation restores the original packets.

TCP packets must belong to one flow, have consecutive sequence numbers, the same acknowledgement, window and options,
and no flags but ACK, and PSH on the last packet. UDP packets must belong to one flow, have equal sizes and a checksum.
Both need the same IP header (TTL, DSCP, ECN, DF), no IP options, extension headers or fragments, and payloads of equal
size except for a shorter last one. Checksums are verified before merging: a merged packet gets a new checksum, which
would hide earlier corruption.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from firezone_tunnel.core.packet.checksum import MODULUS, RowSums, word_sum
from firezone_tunnel.core.packet.layout import Layouts, Rows, block, column
from firezone_tunnel.core.packet.superpacket import (
    CHECKSUM_OFFSET,
    TCP,
    TCP_ACK,
    TCP_PSH,
    UDP,
    SuperPacket,
    parse,
    set_lengths,
    set_partial_checksum,
)

ARENA_SIZE = 2 * 65_536
MAX_SUPER_PACKET = 65_535  # the maximum of the IPv4 total length, used for IPv6 as well
MAX_UDP_SEGMENTS = 64  # Linux, UDP_MAX_SEGMENTS before 6.9
MIN_ROWS = 3  # for fewer packets, parsing each costs less than comparing columns


class Arena:
    """Memory for merged packets. `reset()` frees all of it and invalidates the packets in it.

    When it is full, packets are not merged. `rejected` counts malformed packets.
    """

    __slots__ = ("_layouts", "_used", "_view", "rejected")

    def __init__(self, size: int = ARENA_SIZE) -> None:
        self._view = memoryview(bytearray(size))
        self._used = 0
        self._layouts: Layouts[_Columns] = Layouts()
        self.rejected = 0

    def reset(self) -> None:
        self._used = 0

    def take(self, length: int) -> memoryview | None:
        """`length` bytes, or None if there is not enough space left."""
        start = self._used
        end = start + length
        if end > len(self._view):
            return None
        self._used = end + 15 & ~15
        return self._view[start:end]

    def columns(self, memory: memoryview, key: _ColumnsKey) -> _Columns:
        """The views of a layout over `memory`, from the cache if possible."""
        full_key = (id(memory), key)
        columns = self._layouts.get(full_key)
        if columns is None or columns.memory is not memory:
            columns = self._layouts.put(full_key, _Columns(memory, key))
        return columns


def coalesce(packets: Rows, *, arena: Arena, keep: npt.NDArray[np.bool_] | None = None) -> list[SuperPacket]:
    """Parse the packets in one buffer and merge where possible.

    Where `keep` is given and false a packet is left out, as are empty ones (keepalives) and malformed ones (counted
    in `arena.rejected`). The order within each flow is kept. Lone packets are views into the buffer, merged ones lie
    in `arena`, which the caller resets for each batch.
    """
    count = packets.count
    full = count if packets.last_size == packets.size else count - 1
    if keep is not None and b"\0" not in keep.tobytes():
        keep = None
    if keep is None and full >= MIN_ROWS:
        merged = _coalesce_columns(packets, full, arena)
        if merged is not None:
            return merged
    lone: list[SuperPacket] = []
    for row, data in enumerate(packets.each()):
        if not data or (keep is not None and not keep[row]):
            continue
        packet = parse(data)
        if packet is None:
            arena.rejected += 1
        else:
            lone.append(packet)
    return coalesce_lone(lone, arena)


def coalesce_lone(packets: list[SuperPacket], arena: Arena) -> list[SuperPacket]:
    """Merge lone packets, such as those read from the TUN device in one turn, into the latest item of their flow.

    The order within each flow is kept. Full checksums are verified; partial checksums need no verification.
    """
    if len(packets) < 2:
        return packets
    open_runs: dict[tuple[int, bytes, bytes, int, int], _Run] = {}
    runs: list[_Run] = []
    for packet in packets:
        mergeable = _is_mergeable(packet)
        if not mergeable and not open_runs:
            runs.append(_Run(packet))
            continue
        if packet.fragment:  # a fragment's flow is unknown, so it ends all runs
            open_runs.clear()
        flow = (packet.protocol, packet.source, packet.destination, packet.source_port, packet.destination_port)
        run = open_runs.pop(flow, None)
        if not mergeable:
            runs.append(_Run(packet))
            continue
        if run is None or not run.join(packet):
            run = _Run(packet)
            run.start()
            runs.append(run)
        if run.is_open:
            open_runs[flow] = run
    merged: list[SuperPacket] = []
    for run in runs:
        merged += run.finish(arena)
    return merged


class _Run:
    """Consecutive packets of one flow, added one at a time."""

    __slots__ = ("_fingerprint", "_intact", "_length", "_packets", "_sequence", "_size", "is_open")

    def __init__(self, packet: SuperPacket) -> None:
        self._packets = [packet]
        self.is_open = False

    def start(self, *, intact: bool = False) -> None:
        """Accept more packets after the first, which is mergeable. `intact`: its checksums are verified already."""
        packet = self._packets[0]
        self._length = len(packet.data)
        self._size = self._length - packet.header_length
        self._fingerprint = _fingerprint(packet)
        self._intact = intact
        self.is_open = True
        if packet.protocol == TCP:
            self._sequence = _sequence(packet) + self._size
            self.is_open = not _flags(packet) & TCP_PSH

    def join(self, packet: SuperPacket) -> bool:
        """Add a mergeable packet of this flow, if it continues the run."""
        payload = len(packet.data) - packet.header_length
        first = self._packets[0]
        tcp = packet.protocol == TCP
        if payload > self._size or self._length + payload > MAX_SUPER_PACKET:
            return False
        if packet.header_length != first.header_length or _fingerprint(packet) != self._fingerprint:
            return False
        if tcp and _sequence(packet) != self._sequence & 0xFFFFFFFF:
            return False
        if not tcp and len(self._packets) == MAX_UDP_SEGMENTS:
            return False
        self._intact = self._intact or _is_intact(first)
        if not self._intact or not _is_intact(packet):
            return False
        self._packets.append(packet)
        self._length += payload
        self.is_open = payload == self._size
        if tcp:
            self._sequence += payload
            self.is_open = self.is_open and not _flags(packet) & TCP_PSH
        return True

    def finish(self, arena: Arena) -> list[SuperPacket]:
        """The merged packet, or the lone packets if there is nothing to merge or no memory left."""
        packets = self._packets
        if len(packets) == 1:
            return packets
        data = arena.take(self._length)
        if data is None:
            return packets
        first = packets[0]
        end = 0
        for packet in packets:
            payload = packet.data[packet.header_length if end else 0 :]
            data[end : end + len(payload)] = payload
            end += len(payload)
        return [_merged(first.with_data(data), self._size, _flags(packets[-1]))]


def _coalesce_columns(packets: Rows, rows: int, arena: Arena) -> list[SuperPacket] | None:
    """Merge packets that form one or a few long runs. The first `rows` packets have the full size.

    Returns None if the packets have to be checked one by one.
    """
    memory, offset, stride, size, count, _ = packets
    last = packets.row(rows) if rows != count else None
    first = parse(memory[offset : offset + size])
    if first is None or len(first.data) != size or not _is_mergeable(first):
        return None
    key = _ColumnsKey(offset, stride, size, first.version, first.protocol, first.header_length)
    columns = arena.columns(memory, key)
    breaks = columns.breaks(rows)
    if not breaks and last is None and rows <= columns.most:
        return columns.gather(first, 0, rows, None, arena)
    if len(breaks) > rows // 4:
        return None
    runs = columns.limit([0, *(row + 1 for row in breaks)], rows)
    heads = [first, *(columns.packet(start) for start, _ in runs[1:])]
    for head, (start, end) in zip(heads, runs, strict=True):
        # The columns have the offsets of the first packet's shape, so the results only hold for the same shape.
        if end - start > 1 and (head is None or not columns.fits(head) or not _is_mergeable(head)):
            return None
    tail = parse(last) if last else None
    arena.rejected += heads.count(None) + (tail is None and bool(last))
    joins = tail is not None and columns.is_followed(runs[-1], tail)
    merged: list[SuperPacket] = []
    for head, (start, end) in zip(heads, runs, strict=True):
        if head is not None:
            merged += columns.gather(head, start, end, tail if joins and end == rows else None, arena)
    if tail is not None and not joins:
        merged.append(tail)
    return merged


class _ColumnsKey(NamedTuple):
    offset: int
    stride: int
    size: int
    version: int
    protocol: int
    header_length: int


class _Columns:
    """The views of packets of one shape in one buffer: `size` bytes every `stride` bytes from `offset` on."""

    def __init__(self, memory: memoryview, key: _ColumnsKey) -> None:
        offset, stride, size, version, protocol, header_length = key
        rows = (len(memory) - offset - size) // stride + 1
        self.memory = memory
        self._key = key
        self._transport = transport = _IP_HEADER_LENGTH[version]
        self._payload_size = size - header_length
        self.most = (MAX_SUPER_PACKET - header_length) // self._payload_size
        if protocol == UDP:
            self.most = min(self.most, MAX_UDP_SEGMENTS)
        self._headers = block(memory, offset, stride, rows, header_length)
        self._payloads = block(memory, offset + header_length, stride, rows, self._payload_size)
        if protocol == TCP:
            self._sequences = column(memory, ">u4", offset + transport + 4, stride, rows)
            self._flags = column(memory, "u1", offset + transport + 13, stride, rows)
        self._checksums = column(memory, "<u2", offset + transport + CHECKSUM_OFFSET[protocol], stride, rows)
        # The addresses are adjacent to the L4 header, so one range covers all variable input of the checksum.
        covered = _ADDRESSES[version]
        self._sums = RowSums(memory, rows=rows, stride=stride, offset=offset + covered, length=size - covered)
        self._constant = (protocol + size - transport) << 8
        self._ip_varying = column(memory, "<u8", offset + 4, stride, rows)  # identification to header checksum
        self._ip_sums = RowSums(memory, rows=rows, stride=stride, offset=offset, length=20)
        self._mask = np.frombuffer(_header_mask(version, protocol, header_length, lengths=True), np.uint8)
        self._ramp = np.arange(rows, dtype=np.uint32) * np.uint32(self._payload_size)

    def breaks(self, rows: int) -> list[int]:
        """The indexes of rows that can't be merged with the next row."""
        uniform = self._is_uniform(rows)
        intact = self._intact(rows, uniform=uniform)
        if uniform and intact is None:
            return []
        follows = self._follows(rows)
        if intact is not None:
            follows &= intact[1:] & intact[:-1]
        breaks: list[int] = np.flatnonzero(~follows).tolist()
        return breaks

    def _is_uniform(self, rows: int) -> bool:
        """Whether all rows are consecutive, given that the first is mergeable.

        This is the common case. For so few bytes, comparing `bytes` takes a fraction of the time of a NumPy reduction.
        """
        headers = (self._headers[:rows] & self._mask).tobytes()
        if headers != headers[: self._key.header_length] * rows:
            return False
        if self._key.protocol != TCP:
            return True
        if TCP_ACK | TCP_PSH in self._flags[: rows - 1].tobytes():
            return False
        origins = (self._sequences[:rows] - self._ramp[:rows]).tobytes()
        return bool(origins == origins[:4] * rows)

    def _intact(self, rows: int, *, uniform: bool) -> npt.NDArray[np.bool_] | None:
        """Which rows have correct checksums; None if all do."""
        sums = self._sums.of(rows)
        sums += self._constant
        wrong = np.remainder(sums, MODULUS, out=sums)
        if self._key.protocol == UDP:
            wrong |= self._checksums[:rows] == 0
        if self._key.version == 4:
            varying = self._ip_varying[:rows].tobytes()
            if uniform and varying == varying[:8] * rows:
                start = self._key.offset
                wrong |= word_sum(self.memory[start : start + 20])
            else:
                wrong |= self._ip_sums.of(rows) % MODULUS
        return wrong == 0 if np.count_nonzero(wrong) else None

    def _follows(self, rows: int) -> npt.NDArray[np.bool_]:
        """For each row but the last, whether the next has the same headers and, for TCP, continues it."""
        headers = self._headers[:rows]
        differences = headers[1:] ^ headers[:-1]
        differences &= self._mask
        follows: npt.NDArray[np.bool_] = np.bitwise_or.reduce(differences, axis=1) == 0
        if self._key.protocol == TCP:
            sequences = self._sequences[:rows]
            follows &= (sequences[1:] - sequences[:-1]) == self._payload_size
            follows &= self._flags[: rows - 1] == TCP_ACK
        return follows

    def packet(self, row: int) -> SuperPacket | None:
        start = self._key.offset + row * self._key.stride
        return parse(self.memory[start : start + self._key.size])

    def fits(self, packet: SuperPacket) -> bool:
        """Whether a packet returned by `packet()` has the shape of these views."""
        key = self._key
        shape = (packet.version, packet.protocol, packet.header_length, packet.transport_offset, len(packet.data))
        return shape == (key.version, key.protocol, key.header_length, self._transport, key.size)

    def limit(self, starts: list[int], rows: int) -> list[tuple[int, int]]:
        """The bounds of the runs that start at these rows, split at the maximum size of a super-packet."""
        runs: list[tuple[int, int]] = []
        for start, end in pairwise([*starts, rows]):
            runs += ((first, min(first + self.most, end)) for first in range(start, end, self.most))
        return runs

    def is_followed(self, run: tuple[int, int], tail: SuperPacket) -> bool:
        """Whether a shorter packet after the last row can be merged with the run that ends there."""
        start, end = run
        before = self.packet(end - 1)
        if before is None or end - start == self.most or not self.fits(before):
            return False
        if not _is_mergeable(before) or not _is_mergeable(tail):
            return False
        pair = _Run(before)
        pair.start(intact=end - start > 1)
        return pair.is_open and pair.join(tail)

    def gather(
        self, head: SuperPacket, start: int, end: int, tail: SuperPacket | None, arena: Arena
    ) -> list[SuperPacket]:
        """Merge the consecutive rows from `start` up to `end`, and the tail."""
        rows = end - start
        if rows == 1 and tail is None:
            return [head]
        size = self._payload_size
        header_length = self._key.header_length
        filled = header_length + rows * size
        rest = tail.data[header_length:] if tail is not None else b""
        data = arena.take(filled + len(rest))
        if data is None:
            lone = [head, *(self.packet(row) for row in range(start + 1, end)), tail]
            return [packet for packet in lone if packet is not None]
        data[:header_length] = head.data[:header_length]
        payloads = np.frombuffer(data, np.uint8, rows * size, header_length)
        payloads.reshape(rows, size)[:] = self._payloads[start:end]
        data[filled:] = rest
        last_flags = 0
        if self._key.protocol == TCP:
            last_flags = int(self._flags[end - 1]) if tail is None else _flags(tail)
        head.data = data
        return [_merged(head, size, last_flags)]


def _is_mergeable(packet: SuperPacket) -> bool:
    """Whether a packet may be part of a super-packet."""
    data = packet.data
    start = packet.transport_offset
    if packet.segment_size or packet.fragment or start != _IP_HEADER_LENGTH[packet.version]:
        return False
    if len(data) == packet.header_length:
        return False
    if packet.protocol == TCP:
        return data[start + 13] & ~TCP_PSH == TCP_ACK
    if packet.protocol != UDP or data[start + 4 : start + 6] != (len(data) - start).to_bytes(2, "big"):
        return False
    return bool(data[start + 6] or data[start + 7])


def _is_intact(packet: SuperPacket) -> bool:
    """Whether the checksums of a mergeable packet are correct. Partial checksums are not verified."""
    data = packet.data
    start = packet.transport_offset
    if packet.checksum_start:
        return True
    if packet.version == 4 and word_sum(data[:start]):
        return False
    covered = word_sum(data[_ADDRESSES[packet.version] :])
    return (covered + packet.protocol + len(data) - start) % MODULUS == 0


def _fingerprint(packet: SuperPacket) -> int:
    """The header bits that must be equal in all packets of a run."""
    length = packet.header_length
    return int.from_bytes(packet.data[:length], "big") & _fingerprint_mask(packet.version, packet.protocol, length)


def _flags(packet: SuperPacket) -> int:
    if packet.protocol != TCP:
        return 0
    return packet.data[packet.transport_offset + 13]


def _sequence(packet: SuperPacket) -> int:
    start = packet.transport_offset + 4
    return int.from_bytes(packet.data[start : start + 4], "big")


def _merged(packet: SuperPacket, segment_size: int, last_flags: int) -> SuperPacket:
    """Turn a packet with the first segment's headers and all payload into a super-packet."""
    packet.segment_size = segment_size
    if last_flags & TCP_PSH:
        packet.data[packet.transport_offset + 13] |= TCP_PSH
    set_lengths(packet)
    set_partial_checksum(packet)
    return packet


_IP_HEADER_LENGTH = {4: 20, 6: 40}  # without options and extension headers
_ADDRESSES = {4: 12, 6: 8}


@functools.cache
def _fingerprint_mask(version: int, protocol: int, header_length: int) -> int:
    return int.from_bytes(_header_mask(version, protocol, header_length, lengths=False), "big")


def _header_mask(version: int, protocol: int, header_length: int, *, lengths: bool) -> bytes:
    """A mask of the header bits that must agree in a run; with `lengths`, it includes the length fields."""
    mask = bytearray(b"\xff" * header_length)
    start = _IP_HEADER_LENGTH[version]
    variable = [(4, 2), (10, 2)] if version == 4 else []  # identification and header checksum
    if protocol == TCP:
        mask[start + 13] = ~TCP_PSH & 0xFF
        variable += [(start + 4, 4), (start + 16, 2)]  # sequence number, checksum
    else:
        variable += [(start + 6, 2)]
    if not lengths:
        variable += [(2, 2)] if version == 4 else [(4, 2)]
        variable += [(start + 4, 2)] if protocol == UDP else []
    for offset, length in variable:
        mask[offset : offset + length] = bytes(length)
    return bytes(mask)

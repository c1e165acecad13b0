"""Cut super-packets into segments, writing the headers, payloads and checksums of all segments at once.

Building views is expensive, so the views of a layout are built once. A super-packet of 64 KiB then takes about ten
NumPy calls. Benchmark: `benchmarks/core.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from firezone_tunnel.core.packet.checksum import MODULUS, RowSums, checksum, word_sum
from firezone_tunnel.core.packet.layout import block, column
from firezone_tunnel.core.packet.superpacket import CHECKSUM_OFFSET, TCP, TCP_CWR, TCP_FIN, TCP_PSH, SuperPacket


class Shape(NamedTuple):
    """The properties that determine the field offsets in the segments of a run."""

    version: int
    protocol: int
    transport_offset: int
    header_length: int
    segment_size: int


class Template:
    """The header shared by the segments of a run, and its differences in the first and the last segment."""

    __slots__ = (
        "count",
        "data",
        "first_flags",
        "header",
        "identification",
        "last_flags",
        "last_length",
        "payload_start",
        "pseudo_sum",
        "sequence",
        "shape",
    )

    def __init__(self, packet: SuperPacket, first_segment: int, count: int) -> None:
        data = self.data = packet.data
        length = packet.header_length
        size = packet.segment_size
        self.shape = Shape(packet.version, packet.protocol, packet.transport_offset, length, size)
        self.count = count
        self.payload_start = length + first_segment * size
        end = self.payload_start + count * size
        self.last_length = size - max(0, end - len(data))
        self.header = bytearray(data[:length])
        self.identification = -1
        self._fill_ip(first_segment)
        self.sequence = self.first_flags = self.last_flags = 0
        start = packet.transport_offset
        if packet.protocol == TCP:
            self._fill_tcp(start, first_segment, final=end >= len(data))
        else:
            self.header[start + 4 : start + 6] = (length - start + size).to_bytes(2, "big")
        field = start + CHECKSUM_OFFSET[packet.protocol]
        self.header[field : field + 2] = b"\0\0"
        addresses = word_sum(packet.source) + word_sum(packet.destination)
        self.pseudo_sum = addresses + packet.protocol + length - start + size

    def _fill_ip(self, first_segment: int) -> None:
        header = self.header
        length = self.shape.header_length + self.shape.segment_size
        if self.shape.version == 6:
            header[4:6] = (length - 40).to_bytes(2, "big")
            return
        header[2:4] = length.to_bytes(2, "big")
        if not header[6] & 0x40:  # without DF each segment needs its own identification (RFC 6864)
            self.identification = int.from_bytes(header[4:6], "big") + first_segment
            header[4:6] = b"\0\0"
        header[10:12] = b"\0\0"
        header[10:12] = checksum(header[: (header[0] & 15) * 4]).to_bytes(2, "big")

    def _fill_tcp(self, start: int, first_segment: int, *, final: bool) -> None:
        header = self.header
        sequence = int.from_bytes(header[start + 4 : start + 8], "big")
        self.sequence = sequence + first_segment * self.shape.segment_size & 0xFFFFFFFF
        header[start + 4 : start + 8] = b"\0\0\0\0"
        flags = header[start + 13]
        header[start + 13] = flags & ~(TCP_FIN | TCP_PSH | TCP_CWR)
        self.first_flags = 0 if first_segment else flags & TCP_CWR
        self.last_flags = flags & (TCP_FIN | TCP_PSH) if final else 0


class SegmentSlots:
    """Output slots for segments of one shape: `rows` slots in `memory`, `stride` bytes apart, the first at `offset`."""

    def __init__(self, memory: bytearray, shape: Shape, *, rows: int, stride: int, offset: int) -> None:
        self._memory = memory
        self._offset = offset
        self._stride = stride
        payload = offset + shape.header_length
        transport = offset + shape.transport_offset
        self._headers = block(memory, offset, stride, rows, shape.header_length)
        self._payloads = block(memory, payload, stride, rows, shape.segment_size)
        self._identifications = column(memory, ">u2", offset + 4, stride, rows)
        self._ip_checksums = column(memory, ">u2", offset + 10, stride, rows)
        self._sequences = column(memory, ">u4", transport + 4, stride, rows)
        self._checksums = column(memory, "<u2", transport + CHECKSUM_OFFSET[shape.protocol], stride, rows)
        covered = payload - transport + shape.segment_size
        self._sums = RowSums(memory, rows=rows, stride=stride, offset=transport, length=covered)
        self._numbers = np.arange(rows, dtype=np.int64)
        self._ramp = self._numbers.astype(np.uint32) * np.uint32(shape.segment_size)

    def write(self, template: Template) -> None:
        """Write the segments with complete checksums."""
        count = template.count
        size = template.shape.segment_size
        tcp = template.shape.protocol == TCP
        self._headers[:count] = np.frombuffer(template.header, np.uint8)
        full = count if template.last_length == size else count - 1
        source = np.frombuffer(template.data, np.uint8, full * size, template.payload_start)
        self._payloads[:full] = source.reshape(full, size)
        if tcp:
            self._sequences[:count] = self._ramp[:count] + np.uint32(template.sequence)
        if template.identification >= 0:
            self._write_identifications(template)
        if full != count:
            self._shorten_last(template)
        if template.first_flags or template.last_flags:
            self._write_flags(template)
        sums = self._sums.of(count)
        sums[-1] -= (size - template.last_length) << 8  # the length in the pseudo-header
        # Little-endian sums: multiplying by 256 swaps the bytes of a word modulo 65,535.
        if tcp:
            np.subtract(-(template.pseudo_sum << 8), sums, out=sums)
            self._checksums[:count] = np.remainder(sums, MODULUS, out=sums)
        else:  # never zero, which means that there is no checksum (RFC 768)
            sums += template.pseudo_sum << 8
            self._checksums[:count] = np.subtract(MODULUS, np.remainder(sums, MODULUS, out=sums), out=sums)

    def _write_identifications(self, template: Template) -> None:
        count = template.count
        identifications = self._numbers[:count] + template.identification & 0xFFFF
        self._identifications[:count] = identifications
        others = ~int.from_bytes(template.header[10:12], "big") & 0xFFFF
        self._ip_checksums[:count] = np.remainder(np.negative(identifications + others), MODULUS)

    def _shorten_last(self, template: Template) -> None:
        memory = self._memory
        shape = template.shape
        last = self._offset + (template.count - 1) * self._stride
        length = shape.header_length + template.last_length
        # Pad with zeroes to the full length, so that its sum is computed as one more row of the same array.
        start = last + shape.header_length
        rest = bytes(template.data[len(template.data) - template.last_length :])
        memory[start : start + shape.segment_size] = rest.ljust(shape.segment_size, b"\0")
        if shape.version == 4:
            memory[last + 2 : last + 4] = length.to_bytes(2, "big")
            memory[last + 10 : last + 12] = b"\0\0"
            header = memory[last : last + (memory[last] & 15) * 4]
            memory[last + 10 : last + 12] = checksum(header).to_bytes(2, "big")
        else:
            memory[last + 4 : last + 6] = (length - 40).to_bytes(2, "big")
        if shape.protocol != TCP:
            field = last + shape.transport_offset + 4
            memory[field : field + 2] = (length - shape.transport_offset).to_bytes(2, "big")

    def _write_flags(self, template: Template) -> None:
        """Set the flags that belong to only the first or only the last segment of a run."""
        flags = self._offset + template.shape.transport_offset + 13
        self._memory[flags] |= template.first_flags
        self._memory[flags + (template.count - 1) * self._stride] |= template.last_flags

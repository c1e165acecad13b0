"""Change fields of packets in place: congestion marks, and TCP's maximum segment size."""

from __future__ import annotations

import struct

from firezone_tunnel.core.packet.checksum import update
from firezone_tunnel.core.packet.superpacket import CHECKSUM_OFFSET, MAX_PACKET_SIZE, TCP, TCP_SYN, SuperPacket

ECT_1 = 1  # RFC 3168, section 5
ECT_0 = 2
CE = 3
MAX_SEGMENT = {4: MAX_PACKET_SIZE - 40, 6: MAX_PACKET_SIZE - 60}
"""TCP payload that fits the tunnel without options, by IP version (RFC 6691)."""


def mark_congestion(packet: SuperPacket) -> None:
    """Copy a congestion mark (CE) from the outer packet to the inner packet, in place (RFC 6040).

    Packets that are not ECN-capable are left unchanged (docs/protocol/data-plane.md, 7.3).
    """
    if packet.ecn not in {ECT_0, ECT_1}:
        return
    data = packet.data
    if packet.version == 6:
        data[1] |= CE << 4
    else:
        old = _U16.unpack_from(data, 0)[0]
        data[1] |= CE
        _U16.pack_into(data, 10, update(_U16.unpack_from(data, 10)[0], old, old | CE))
    packet.ecn = CE


def clamp_segment_size(packet: SuperPacket) -> None:
    """Lower the maximum segment size that a TCP SYN or SYN-ACK announces to what fits the tunnel, in place.

    A host behind the client's host, such as a container, announces its own link's: 1460. The server's full segments
    are then too big for the tunnel, and where ICMP is filtered the server never learns that. All other packets, and
    options that are cut off or malformed, are left unchanged.
    """
    if packet.protocol != TCP or packet.segment_size or packet.fragment:
        return
    data, start = packet.data, packet.transport_offset
    if not data[start + 13] & TCP_SYN:
        return
    most = MAX_SEGMENT[packet.version]
    offset, end = start + _TCP_HEADER_SIZE, packet.header_length
    while offset < end and data[offset] != _END_OF_OPTIONS:
        if data[offset] == _NO_OPERATION:
            offset += 1
            continue
        length = data[offset + 1] if offset + 1 < end else 0
        if length < 2 or offset + length > end:
            return
        if data[offset] == _MAXIMUM_SEGMENT_SIZE and length == 4:
            _lower(packet, offset + 2, most)
        offset += length


_U16 = struct.Struct(">H")
_TCP_HEADER_SIZE = 20
_END_OF_OPTIONS, _NO_OPERATION, _MAXIMUM_SEGMENT_SIZE = 0, 1, 2  # RFC 9293, section 3.2


def _lower(packet: SuperPacket, offset: int, most: int) -> None:
    """Replace a 16-bit field of the TCP header, wherever it starts, by `most` if it is greater."""
    data, start = packet.data, packet.transport_offset
    old = _U16.unpack_from(data, offset)[0]
    if old <= most:
        return
    _U16.pack_into(data, offset, most)
    if packet.checksum_start:  # a partial checksum does not cover the header yet
        return
    if (offset - start) & 1:  # the field lies across two words: its bytes count in the other order
        old, most = _swapped(old), _swapped(most)
    field = start + CHECKSUM_OFFSET[TCP]
    _U16.pack_into(data, field, update(_U16.unpack_from(data, field)[0], old, most))


def _swapped(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8

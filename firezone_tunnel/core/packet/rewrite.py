"""Build ICMP errors about packets, and set congestion marks in them."""

from __future__ import annotations

import struct

from firezone_tunnel.core.packet.checksum import checksum, update
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, MAX_PACKET_SIZE, SuperPacket, parse

ECT_1 = 1  # RFC 3168, section 5
ECT_0 = 2
CE = 3


def icmp_error(packet: SuperPacket) -> SuperPacket | None:
    """The ICMP error for a prohibited packet, or a super-packet's first segment (docs/protocol/data-plane.md, 6.2).

    It is sent from the packet's destination. Returns None for packets that must not be answered (RFC 1122, 3.2.2;
    RFC 4443, 2.4): ICMP errors, fragments other than the first, and packets with a source or destination that is not
    a single host's address.
    """
    if packet.later_fragment or is_icmp_error(packet):
        return None
    if not (_is_of_a_host(packet.source) and _is_of_a_host(packet.destination)):
        return None
    about = packet.segment(0).data
    if packet.version == 4:
        return parse(_icmpv4_error(packet, about))
    return parse(_icmpv6_error(packet, about))


def is_icmp_error(packet: SuperPacket) -> bool:
    """Whether a packet is an ICMP error, not a query or a reply (RFC 792, RFC 4443)."""
    if packet.later_fragment or packet.protocol not in {ICMP, ICMPV6}:
        return False
    if packet.transport_offset >= len(packet.data):
        return False
    kind = packet.data[packet.transport_offset]
    return kind in _ICMP_ERRORS if packet.protocol == ICMP else kind < 128


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


_U16 = struct.Struct(">H")
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
_ERROR = struct.Struct(">BBHI")
"""type, code, checksum, unused (RFC 792; RFC 4443, 3.1)."""
_PROHIBITED = (3, 13)  # communication administratively prohibited (RFC 1812, section 5.2.7.1)
_PROHIBITED_V6 = (1, 1)  # the same (RFC 4443, section 3.1)

_TTL = 20  # docs/protocol/data-plane.md, 6.2
_ICMP_ERRORS = frozenset({3, 4, 5, 11, 12})  # unreachable, source quench, redirect, time exceeded, parameter problem


def _icmpv4_error(packet: SuperPacket, about: memoryview) -> bytearray:
    """It contains the original's IP header and the next 8 bytes (RFC 792)."""
    embedded = about[: (about[0] & 15) * 4 + 8]
    message = _ERROR.pack(*_PROHIBITED, 0, 0) + embedded
    message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    header = bytearray(
        _IPV4.pack(0x45, 0, 20 + len(message), 0, 0x4000, _TTL, ICMP, 0, packet.destination, packet.source)
    )
    _U16.pack_into(header, 10, checksum(header))
    return header + message


def _icmpv6_error(packet: SuperPacket, about: memoryview) -> bytearray:
    """It contains as much of the original as fits into the tunnel's MTU (RFC 4443, 3.1)."""
    embedded = about[: MAX_PACKET_SIZE - 40 - _ERROR.size]
    message = _ERROR.pack(*_PROHIBITED_V6, 0, 0) + embedded
    pseudo_header = packet.destination + packet.source + struct.pack(">II", len(message), ICMPV6)
    message = message[:2] + checksum(pseudo_header + message).to_bytes(2, "big") + message[4:]
    return bytearray(_IPV6.pack(6 << 28, len(message), ICMPV6, _TTL, packet.destination, packet.source) + message)


def _is_of_a_host(address: bytes) -> bool:
    if len(address) == 4:
        return 0 < address[0] < 224 and address[0] != 127
    return address[0] != 0xFF and any(address)

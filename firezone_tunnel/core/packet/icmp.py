"""ICMP errors about packets: build them, recognize them, and read the packet that one quotes."""

from __future__ import annotations

import struct
from typing import NamedTuple

from firezone_tunnel.core.packet.checksum import checksum
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, MAX_PACKET_SIZE, SuperPacket, parse, parse_quoted


class Unreachable(NamedTuple):
    """The codes of a destination unreachable message (RFC 1812, 5.2.7.1; RFC 4443, 3.1)."""

    ipv4_code: int
    ipv6_code: int


PROHIBITED = Unreachable(13, 1)
"""Communication administratively prohibited."""
SOURCE_REFUSED = Unreachable(13, 5)
"""The same in IPv4; in IPv6, the source address failed a policy."""


def icmp_error(packet: SuperPacket, reason: Unreachable = PROHIBITED) -> SuperPacket | None:
    """The ICMP error for a refused packet, or a super-packet's first segment (docs/protocol/data-plane.md, 6.2).

    It is sent from the packet's destination. Returns None for packets that must not be answered (RFC 1122, 3.2.2;
    RFC 4443, 2.4): ICMP errors, fragments other than the first, and packets with a source or destination that is not
    a single host's address.
    """
    if packet.later_fragment or is_icmp_error(packet):
        return None
    if not (is_of_a_host(packet.source) and is_of_a_host(packet.destination)):
        return None
    about = packet.segment(0).data
    if packet.version == 4:
        return parse(_icmpv4_error(packet, about, reason.ipv4_code))
    return parse(_icmpv6_error(packet, about, reason.ipv6_code))


def is_icmp_error(packet: SuperPacket) -> bool:
    """Whether a packet is an ICMP error, not a query or a reply (RFC 792, RFC 4443)."""
    if packet.later_fragment or packet.protocol not in {ICMP, ICMPV6}:
        return False
    if packet.transport_offset >= len(packet.data):
        return False
    kind = packet.data[packet.transport_offset]
    return kind in _ICMP_ERRORS if packet.protocol == ICMP else kind < 128


def quoted_packet(packet: SuperPacket) -> SuperPacket | None:
    """The packet that an ICMP error is about; None unless this is such an error and quotes enough to identify one.

    Its addresses, protocol and ports are valid; `data` is what the error quotes, possibly only 8 bytes of the payload
    (RFC 792). Redirects and source quenches give None: no host should follow one that came through a tunnel (RFC 6633).
    """
    if packet.fragment or packet.protocol not in {ICMP, ICMPV6}:
        return None
    start = packet.transport_offset
    reports = _REPORTS if packet.protocol == ICMP else _REPORTS_V6
    if packet.data[start] not in reports:
        return None
    quoted = parse_quoted(packet.data[start + _ERROR.size :])
    if quoted is None or quoted.version != packet.version or is_icmp_error(quoted):
        return None
    return quoted


def is_of_a_host(address: bytes) -> bool:
    """Whether an address of 4 or 16 bytes is that of a single host, and not this one's loopback address."""
    if len(address) == 4:
        return 0 < address[0] < 224 and address[0] != 127
    return address[0] != 0xFF and (any(address[:15]) or address[15] > 1)


_U16 = struct.Struct(">H")
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
_ERROR = struct.Struct(">BBHI")
"""type, code, checksum, unused (RFC 792; RFC 4443, 3.1)."""
_UNREACHABLE = 3
_UNREACHABLE_V6 = 1

_TTL = 20  # docs/protocol/data-plane.md, 6.2
_ICMP_ERRORS = frozenset({3, 4, 5, 11, 12})  # unreachable, source quench, redirect, time exceeded, parameter problem
_REPORTS = frozenset({3, 11, 12})
_REPORTS_V6 = frozenset({1, 2, 3, 4})  # unreachable, too big, time exceeded, parameter problem


def _icmpv4_error(packet: SuperPacket, about: memoryview, code: int) -> bytearray:
    """It contains the original's IP header and the next 8 bytes (RFC 792)."""
    embedded = about[: (about[0] & 15) * 4 + 8]
    message = _ERROR.pack(_UNREACHABLE, code, 0, 0) + embedded
    message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    header = bytearray(
        _IPV4.pack(0x45, 0, 20 + len(message), 0, 0x4000, _TTL, ICMP, 0, packet.destination, packet.source)
    )
    _U16.pack_into(header, 10, checksum(header))
    return header + message


def _icmpv6_error(packet: SuperPacket, about: memoryview, code: int) -> bytearray:
    """It contains as much of the original as fits into the tunnel's MTU (RFC 4443, 3.1)."""
    embedded = about[: MAX_PACKET_SIZE - 40 - _ERROR.size]
    message = _ERROR.pack(_UNREACHABLE_V6, code, 0, 0) + embedded
    pseudo_header = packet.destination + packet.source + struct.pack(">II", len(message), ICMPV6)
    message = message[:2] + checksum(pseudo_header + message).to_bytes(2, "big") + message[4:]
    return bytearray(_IPV6.pack(6 << 28, len(message), ICMPV6, _TTL, packet.destination, packet.source) + message)

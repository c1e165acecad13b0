"""TCP resets in answer to segments of connections that can't exist (RFC 9293, 3.5.2 and 3.10.7.1)."""

from __future__ import annotations

import struct

from firezone_tunnel.core.packet.checksum import checksum
from firezone_tunnel.core.packet.icmp import is_of_a_host
from firezone_tunnel.core.packet.superpacket import TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, SuperPacket, parse


def tcp_reset(packet: SuperPacket) -> SuperPacket | None:
    """The reset that a TCP segment, or a run of them, gets from a host that knows no such connection.

    Returns None for resets, for fragments, and for what has a source or destination that is not a single host's.
    """
    if packet.protocol != TCP or packet.fragment or is_reset(packet):
        return None
    if not (is_of_a_host(packet.source) and is_of_a_host(packet.destination)):
        return None
    data, start = packet.data, packet.transport_offset
    sequence, acknowledgement, _, flags = _SEQUENCES.unpack_from(data, start + 4)
    if flags & TCP_ACK:
        numbers = (acknowledgement, 0, TCP_RST)
    else:
        length = len(data) - packet.header_length + bool(flags & TCP_SYN) + bool(flags & TCP_FIN)
        numbers = (0, sequence + length & 0xFFFFFFFF, TCP_RST | TCP_ACK)
    return parse(_ip_header(packet) + _tcp_header(packet, *numbers))


def is_reset(packet: SuperPacket) -> bool:
    """Whether a packet is a TCP reset."""
    if packet.protocol != TCP or packet.fragment:
        return False
    return bool(packet.data[packet.transport_offset + 13] & TCP_RST)


_SEQUENCES = struct.Struct(">IIBB")
"""sequence number, acknowledgement number, data offset, flags."""
_TCP = struct.Struct(">HHIIBBHHH")
"""ports, sequence and acknowledgement numbers, data offset, flags, window, checksum, urgent pointer."""
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
_TTL = 64


def _ip_header(packet: SuperPacket) -> bytearray:
    source, destination = packet.destination, packet.source
    if packet.version == 6:
        return bytearray(_IPV6.pack(6 << 28, _TCP.size, TCP, _TTL, source, destination))
    header = bytearray(_IPV4.pack(0x45, 0, 20 + _TCP.size, 0, 0x4000, _TTL, TCP, 0, source, destination))
    header[10:12] = checksum(header).to_bytes(2, "big")
    return header


def _tcp_header(packet: SuperPacket, sequence: int, acknowledgement: int, flags: int) -> bytearray:
    ports = (packet.destination_port, packet.source_port)
    header = bytearray(_TCP.pack(*ports, sequence, acknowledgement, _TCP.size // 4 << 4, flags, 0, 0, 0))
    pseudo_header = packet.destination + packet.source + struct.pack(">II", _TCP.size, TCP)
    header[16:18] = checksum(pseudo_header + header).to_bytes(2, "big")
    return header

"""IP packets between the TUN device and the tunnel: single packets, or unsegmented runs of TCP or UDP segments."""

from __future__ import annotations

import struct

from firezone_tunnel.core.packet.checksum import checksum, word_sum

MAX_PACKET_SIZE = 1280  # docs/protocol/data-plane.md, 7.1: the MTU of the tunnel
VIRTIO_HEADER_SIZE = 10

ICMP = 1  # protocol numbers: IANA, "Assigned Internet Protocol Numbers"
TCP = 6
UDP = 17
ICMPV6 = 58
ICMP_PROTOCOLS = frozenset({ICMP, ICMPV6})

TCP_FIN = 0x01  # RFC 9293, section 3.1
TCP_SYN = 0x02
TCP_RST = 0x04
TCP_PSH = 0x08
TCP_ACK = 0x10
TCP_CWR = 0x80

CHECKSUM_OFFSET = {TCP: 16, UDP: 6}  # within the L4 header


class SuperPacket:
    """One IP packet, or an unsegmented run of equal segments of one flow: the headers once, then all payload.

    `data` is valid only until the end of the reactor turn. Use `copy()` to keep a packet for longer.
    """

    __slots__ = (
        "checksum_start",
        "data",
        "destination",
        "destination_port",
        "ecn",
        "fragment",
        "header_length",
        "later_fragment",
        "protocol",
        "segment_size",
        "source",
        "source_port",
        "transport_offset",
        "version",
    )

    data: memoryview  # writable; exactly the IP header, the L4 header and the payload
    version: int  # 4 or 6
    protocol: int  # of the last header of the chain: TCP, UDP, ...
    source: bytes  # 4 or 16 bytes
    destination: bytes
    source_port: int  # TCP and UDP: the ports; ICMP echo: the identifier in both fields; otherwise 0
    destination_port: int
    transport_offset: int  # where the L4 header starts
    header_length: int  # where the payload starts; the bytes before it are repeated in each segment
    segment_size: int  # payload bytes of each segment but the last; 0: a lone packet
    checksum_start: int  # start of the L4 header if its checksum is only the pseudo-header's sum; 0: complete
    fragment: bool  # the ports are unknown
    later_fragment: bool  # a fragment other than the first
    ecn: int  # RFC 3168: 0 Not-ECT, 1 ECT(1), 2 ECT(0), 3 CE

    @property
    def segments(self) -> int:
        """The number of packets on the wire."""
        if not self.segment_size:
            return 1
        return -(-(len(self.data) - self.header_length) // self.segment_size)

    def copy(self) -> SuperPacket:
        """The same packet in newly allocated memory."""
        return self.with_data(memoryview(bytearray(self.data)))

    def with_data(self, data: memoryview) -> SuperPacket:
        """A packet with the same fields and other bytes."""
        other = SuperPacket()
        for name in SuperPacket.__slots__:
            setattr(other, name, getattr(self, name))
        other.data = data
        return other

    def complete(self) -> None:
        """Turn the partial checksum of a lone packet into a full one, in place."""
        if not self.checksum_start or self.segment_size:
            return
        complete_checksum(self.data, self.checksum_start, CHECKSUM_OFFSET[self.protocol], udp=self.protocol == UDP)
        self.checksum_start = 0

    def segment(self, index: int) -> SuperPacket:
        """A copy of one segment as a lone packet with complete checksums. Too slow for bulk data."""
        if not self.segment_size:
            segment = self.copy()
        else:
            start = self.header_length + index * self.segment_size
            data = bytearray(self.data[: self.header_length])
            data += self.data[start : start + self.segment_size]
            segment = self.with_data(memoryview(data))
            segment.segment_size = 0
            _number_segment(segment, index, self.segment_size, last=index == self.segments - 1)
            set_lengths(segment)
            set_partial_checksum(segment)
        segment.complete()
        return segment

    def __repr__(self) -> str:
        size = f"{len(self.data)} bytes" + (f" / {self.segment_size}" if self.segment_size else "")
        return f"<SuperPacket IPv{self.version} protocol {self.protocol}, {size}>"


def parse(
    data: memoryview | bytearray | bytes, *, segment_size: int = 0, max_size: int = MAX_PACKET_SIZE
) -> SuperPacket | None:
    """Parse an IPv4 (RFC 791) or IPv6 (RFC 8200) packet; None if it is malformed or does not fit the tunnel.

    Bytes after the packet's own length are cut off. With `segment_size` it may be a run of TCP or UDP segments with
    that many payload bytes each; a segment with its headers must not exceed `max_size`. Checksums are not verified.
    """
    view = data if type(data) is memoryview else memoryview(data)
    if len(view) < 20:
        return None
    packet = SuperPacket()
    version = view[0] >> 4
    if version == 4:
        known = _parse_ipv4(packet, view)
    elif version == 6:
        known = _parse_ipv6(packet, view)
    else:
        return None
    if not known or not _parse_transport(packet):
        return None
    packet.checksum_start = 0
    packet.segment_size = segment_size
    if segment_size and len(packet.data) > packet.header_length + segment_size:
        return packet if _is_run(packet, max_size) else None
    packet.segment_size = 0
    return packet if len(packet.data) <= max_size else None


def parse_quoted(data: memoryview) -> SuperPacket | None:
    """Parse what an ICMP error quotes of a packet: at least its IP header and the 8 bytes after it (RFC 792).

    Returns a lone packet whose `data` is a copy of the quotation, with its length in the IP header. Where ports or
    the type of an ICMP message are missing, it is None.
    """
    quotation = bytearray(data)
    if len(quotation) < _IPV4.size:
        return None
    packet = SuperPacket()
    if quotation[0] >> 4 == 4:
        _U16.pack_into(quotation, 2, min(_U16.unpack_from(quotation, 2)[0], len(quotation)))
        known = _parse_ipv4(packet, memoryview(quotation))
    elif quotation[0] >> 4 == 6 and len(quotation) >= _IPV6.size:
        _U16.pack_into(quotation, 4, min(_U16.unpack_from(quotation, 4)[0], len(quotation) - _IPV6.size))
        known = _parse_ipv6(packet, memoryview(quotation))
    else:
        return None
    if not known:
        return None
    start = packet.header_length = packet.transport_offset
    packet.checksum_start = packet.segment_size = 0
    packet.source_port = packet.destination_port = 0
    if packet.fragment:
        return packet
    if len(packet.data) - start < _QUOTED_PAYLOAD:
        return None
    if packet.protocol in CHECKSUM_OFFSET:
        packet.source_port, packet.destination_port = _PORTS.unpack_from(packet.data, start)
    elif (packet.protocol, packet.data[start]) in _ECHO:
        packet.source_port = packet.destination_port = _U16.unpack_from(packet.data, start + 4)[0]
    return packet


_VIRTIO = struct.Struct("=BBHHHH")
"""virtio 1.2, section 5.1.6: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; native byte order."""
_NEEDS_CSUM = 1
_GSO_ECN = 0x80  # the first segment of a TCP run carries CWR
_GSO_KINDS = {1: (4, TCP), 4: (6, TCP)}
_GSO_UDP_L4 = 5
_NO_OFFLOAD = bytes(VIRTIO_HEADER_SIZE)


def from_virtio(frame: memoryview) -> SuperPacket | None:
    """Parse a frame read from a TUN device with IFF_VNET_HDR: a virtio_net_hdr, then the packet.

    Returns None for malformed frames and for offloads that were not requested from the kernel. `hdr_len` is ignored.
    """
    if len(frame) < VIRTIO_HEADER_SIZE:
        return None
    flags, gso_type, _, gso_size, csum_start, csum_offset = _VIRTIO.unpack_from(frame)
    kind = gso_type & ~_GSO_ECN
    packet = parse(frame[VIRTIO_HEADER_SIZE:], segment_size=gso_size if kind else 0)
    if packet is None or (kind and not _is_of_kind(packet, kind)):
        return None
    if not flags & _NEEDS_CSUM:
        if packet.segment_size:
            set_partial_checksum(packet)
        return packet
    if (
        csum_start == packet.transport_offset
        and csum_offset == CHECKSUM_OFFSET.get(packet.protocol)
        and not packet.fragment
    ):
        packet.checksum_start = csum_start
        return packet
    # The packet carries another tunnel, and the checksum belongs to an inner packet.
    if packet.segment_size or csum_start + csum_offset + 2 > len(packet.data):
        return None
    complete_checksum(packet.data, csum_start, csum_offset, udp=csum_offset == CHECKSUM_OFFSET[UDP])
    return packet


def virtio_header(packet: SuperPacket) -> bytes:
    """The virtio_net_hdr to write before `packet.data` to a TUN device with IFF_VNET_HDR."""
    start = packet.checksum_start
    if not start:
        return _NO_OFFLOAD
    offset = CHECKSUM_OFFSET[packet.protocol]
    size = packet.segment_size
    if not size:
        return _VIRTIO.pack(_NEEDS_CSUM, 0, 0, 0, start, offset)
    if packet.protocol == UDP:
        kind = _GSO_UDP_L4
    else:
        kind = 1 if packet.version == 4 else 4
        if packet.data[start + 13] & TCP_CWR:
            kind |= _GSO_ECN
    return _VIRTIO.pack(_NEEDS_CSUM, kind, packet.header_length, size, start, offset)


def complete_checksum(data: memoryview, start: int, offset: int, *, udp: bool) -> None:
    """Complete the checksum at `start + offset`, which holds the sum of all covered data outside of `data[start:]`."""
    value = checksum(data[start:])
    if udp and not value:
        value = 0xFFFF  # RFC 768: zero means that there is no checksum
    _U16.pack_into(data, start + offset, value)


def set_lengths(packet: SuperPacket) -> None:
    """Write the length of `packet.data` into its IP and UDP headers, and the IPv4 header's checksum."""
    data = packet.data
    if packet.version == 4:
        _U16.pack_into(data, 2, len(data))
        _U16.pack_into(data, 10, 0)
        _U16.pack_into(data, 10, checksum(data[: (data[0] & 15) * 4]))
    else:
        _U16.pack_into(data, 4, len(data) - 40)
    if packet.protocol == UDP:
        _U16.pack_into(data, packet.transport_offset + 4, len(data) - packet.transport_offset)


def set_partial_checksum(packet: SuperPacket) -> None:
    """Write the pseudo-header's sum (RFC 9293, 3.1; RFC 8200, 8.1) to the checksum field of a TCP or UDP packet."""
    start = packet.transport_offset
    total = word_sum(packet.source) + word_sum(packet.destination) + packet.protocol + len(packet.data) - start
    _U16.pack_into(packet.data, start + CHECKSUM_OFFSET[packet.protocol], total % 0xFFFF)
    packet.checksum_start = start


_U16 = struct.Struct(">H")
_PORTS = struct.Struct(">HH")
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
"""version and IHL, DSCP and ECN, total length, identification, flags and offset, TTL, protocol, checksum, addresses."""
_IPV6 = struct.Struct(">IHBB16s16s")
"""version, traffic class and flow label, payload length, next header, hop limit, addresses."""

_FRAGMENT = 44  # IPv6 extension headers, RFC 8200, section 4
_AUTHENTICATION = 51
_EXTENSIONS = frozenset({0, 43, _FRAGMENT, _AUTHENTICATION, 60})  # hop-by-hop, routing, ..., destination options
_MAX_EXTENSIONS = 8
_QUOTED_PAYLOAD = 8  # RFC 792
_ECHO = frozenset({(ICMP, 8), (ICMP, 0), (ICMPV6, 128), (ICMPV6, 129)})  # request and reply


def _parse_ipv4(packet: SuperPacket, view: memoryview) -> bool:
    first, tos, total, _, fragment, _, protocol, _, packet.source, packet.destination = _IPV4.unpack_from(view)
    offset = (first & 15) * 4
    if offset < 20 or not offset <= total <= len(view):
        return False
    packet.data = view if total == len(view) else view[:total]
    packet.version = 4
    packet.ecn = tos & 3
    packet.fragment = bool(fragment & 0x3FFF)  # more fragments, or an offset
    packet.later_fragment = bool(fragment & 0x1FFF)
    if protocol == _AUTHENTICATION and not packet.fragment:
        return _walk(packet, protocol, offset)
    packet.protocol = protocol
    packet.transport_offset = offset
    return bool(protocol != ICMPV6)


def _parse_ipv6(packet: SuperPacket, view: memoryview) -> bool:
    if len(view) < 40:
        return False
    first, length, protocol, _, packet.source, packet.destination = _IPV6.unpack_from(view)
    total = 40 + length
    if total > len(view):
        return False
    packet.data = view if total == len(view) else view[:total]
    packet.version = 6
    packet.ecn = first >> 20 & 3
    packet.fragment = packet.later_fragment = False
    if protocol in _EXTENSIONS:
        return _walk(packet, protocol, 40)
    packet.protocol = protocol
    packet.transport_offset = 40
    return bool(protocol != ICMP)


def _walk(packet: SuperPacket, protocol: int, offset: int) -> bool:
    """Follow the chain of extension headers to the upper-layer header, or to the data of a later fragment."""
    data = packet.data
    walked = 0
    while protocol in _EXTENSIONS if packet.version == 6 else protocol == _AUTHENTICATION:
        walked += 1
        if walked > _MAX_EXTENSIONS or offset + 8 > len(data):
            return False
        following = data[offset]
        if protocol == _FRAGMENT:
            bounds = _U16.unpack_from(data, offset + 2)[0]
            packet.fragment = packet.fragment or bool(bounds & 0xFFF9)
            packet.later_fragment = packet.later_fragment or bool(bounds & 0xFFF8)
            offset += 8
        elif protocol == _AUTHENTICATION:
            offset += (data[offset + 1] + 2) * 4  # RFC 4302, section 2.2
        else:
            offset += (data[offset + 1] + 1) * 8
        protocol = following
        if packet.later_fragment:
            break
    packet.protocol = protocol
    packet.transport_offset = offset
    return offset <= len(data) and protocol != (ICMP if packet.version == 6 else ICMPV6)


def _parse_transport(packet: SuperPacket) -> bool:
    """Fill in ports and header length; False if the L4 header is truncated or contradicts the packet's length."""
    data = packet.data
    protocol = packet.protocol
    offset = packet.header_length = packet.transport_offset
    packet.source_port = packet.destination_port = 0
    if packet.fragment:
        return True
    room = len(data) - offset
    if protocol == TCP:
        if room < 20:
            return False
        length = (data[offset + 12] >> 4) * 4
        packet.header_length = offset + length
        packet.source_port, packet.destination_port = _PORTS.unpack_from(data, offset)
        return 20 <= length <= room
    if protocol == UDP:
        if room < 8:
            return False
        packet.header_length = offset + 8
        packet.source_port, packet.destination_port = _PORTS.unpack_from(data, offset)
        return 8 <= int(_U16.unpack_from(data, offset + 4)[0]) <= room
    if protocol in {ICMP, ICMPV6}:
        if room < 8:
            return False
        packet.header_length = offset + 8
        if (protocol, data[offset]) in _ECHO:
            packet.source_port = packet.destination_port = _U16.unpack_from(data, offset + 4)[0]
    return True


def _is_run(packet: SuperPacket, max_size: int) -> bool:
    if packet.fragment or packet.header_length + packet.segment_size > max_size:
        return False
    if packet.protocol == UDP:
        start = packet.transport_offset
        return int(_U16.unpack_from(packet.data, start + 4)[0]) == len(packet.data) - start
    return packet.protocol == TCP


def _is_of_kind(packet: SuperPacket, kind: int) -> bool:
    if kind == _GSO_UDP_L4:
        return packet.protocol == UDP
    return _GSO_KINDS.get(kind) == (packet.version, packet.protocol)


def _number_segment(segment: SuperPacket, index: int, segment_size: int, *, last: bool) -> None:
    """Set the IPv4 identification, sequence number and flags of one segment. `packet.segmentation` handles batches."""
    data = segment.data
    if segment.version == 4 and not data[6] & 0x40:
        _U16.pack_into(data, 4, (_U16.unpack_from(data, 4)[0] + index) & 0xFFFF)
    if segment.protocol != TCP:
        return
    start = segment.transport_offset
    sequence = int.from_bytes(data[start + 4 : start + 8], "big") + index * segment_size
    data[start + 4 : start + 8] = (sequence & 0xFFFFFFFF).to_bytes(4, "big")
    if not last:
        data[start + 13] &= ~(TCP_FIN | TCP_PSH)
    if index:
        data[start + 13] &= ~TCP_CWR

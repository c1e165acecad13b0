"""Packets for tests, built and verified with scapy as an independent implementation."""

from __future__ import annotations

import struct

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.packet import Packet, Raw

from firezone_tunnel.core.packet.superpacket import SuperPacket, from_virtio

__all__ = [
    "ICMP",
    "IP",
    "TCP",
    "UDP",
    "ICMPv6EchoRequest",
    "IPv6",
    "IPv6ExtHdrFragment",
    "IPv6ExtHdrHopByHop",
    "Packet",
    "Raw",
    "from_virtio",
]

TIMESTAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
GSO_TYPES = {("TCP", 4): 1, ("TCP", 6): 4, ("UDP", 4): 5, ("UDP", 6): 5}


def ip(
    version: int = 4, *, df: bool = True, ttl: int = 64, traffic_class: int = 0, last: int = 2, ident: int = 7
) -> Packet:
    if version == 4:
        flags = "DF" if df else 0
        return IP(src="10.0.0.1", dst=f"10.0.0.{last}", ttl=ttl, tos=traffic_class, flags=flags, id=ident)
    return IPv6(src="fd00::1", dst=f"fd00::{last}", hlim=ttl, tc=traffic_class)


def tcp(
    *, seq: int = 1000, ack: int = 5, flags: str = "A", window: int = 500, options: bool = True, port: int = 80
) -> Packet:
    return TCP(
        sport=40000, dport=port, seq=seq, ack=ack, flags=flags, window=window, options=TIMESTAMPS if options else []
    )


def udp(*, port: int = 53) -> Packet:
    return UDP(sport=40000, dport=port)


def built(*layers: Packet | bytes) -> bytearray:
    """The bytes of a packet with complete lengths and checksums."""
    packet = layers[0]
    for layer in layers[1:]:
        packet = packet / (Raw(layer) if isinstance(layer, bytes) else layer)
    return bytearray(bytes(packet))


def rebuilt(data: bytes | bytearray | memoryview) -> bytes:
    """The same packet with lengths and checksums computed by scapy. It equals `data` if ours are correct."""
    raw = bytes(data)
    packet = IP(raw) if raw[0] >> 4 == 4 else IPv6(raw)
    layer = packet
    while layer:
        for field in ("len", "plen", "chksum", "cksum"):
            if field in layer.fields:
                delattr(layer, field)
        layer = layer.payload
    return bytes(packet)


def frame(data: bytes | bytearray, segment_size: int) -> memoryview:
    """A TCP or UDP super-packet as read from the kernel, with a virtio_net_hdr and a partial checksum."""
    packet = IP(bytes(data)) if data[0] >> 4 == 4 else IPv6(bytes(data))
    kind = "TCP" if TCP in packet else "UDP"
    start = len(data) - len(bytes(packet[kind]))
    offset = 16 if kind == "TCP" else 6
    raw = bytearray(data)
    addresses = raw[12:20] if packet.version == 4 else raw[8:40]
    pseudo = bytes(addresses) + struct.pack(">II", len(raw) - start, 6 if kind == "TCP" else 17)
    raw[start + offset : start + offset + 2] = struct.pack(">H", slow_sum(pseudo))
    gso = GSO_TYPES[kind, packet.version] if segment_size else 0
    # hdr_len is wrong on purpose: the kernel's is not to be relied on.
    return memoryview(bytearray(struct.pack("=BBHHHH", 1, gso, 9, segment_size, start, offset)) + raw)


def super_packet(*layers: Packet | bytes, segment_size: int) -> SuperPacket:
    packet = from_virtio(frame(built(*layers), segment_size))
    assert packet is not None
    return packet


def slow_sum(data: bytes) -> int:
    """The ones'-complement sum, computed as in RFC 1071, section 4.1."""
    total = 0
    for index in range(0, len(data), 2):
        total += int.from_bytes(data[index : index + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pattern(length: int) -> bytes:
    return bytes(index * 7 % 251 for index in range(length))

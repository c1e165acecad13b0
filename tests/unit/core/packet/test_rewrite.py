from __future__ import annotations

import pytest
from scapy.layers.inet6 import ICMPv6DestUnreach

from firezone_tunnel.core.packet.rewrite import icmp_error, is_icmp_error, mark_congestion
from firezone_tunnel.core.packet.superpacket import from_virtio, parse
from tests.unit.core.packet.packets import (
    ICMP,
    IP,
    UDP,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrFragment,
    built,
    frame,
    ip,
    pattern,
    super_packet,
    tcp,
    udp,
)


def test_a_refused_ipv4_packet_is_answered_from_its_destination() -> None:
    original = built(IP(src="10.0.0.1", dst="10.0.0.2", options=b"\x01" * 4), udp(), pattern(50))
    packet = parse(original)
    assert packet is not None

    answer = icmp_error(packet)

    assert answer is not None
    seen = IP(bytes(answer.data))
    assert (seen.src, seen.dst, seen.ttl, seen[ICMP].type, seen[ICMP].code) == ("10.0.0.2", "10.0.0.1", 20, 3, 13)
    assert bytes(answer.data[28:]) == original[: 24 + 8]
    header = IP(bytes(answer.data))
    del header.chksum, header[ICMP].chksum
    assert bytes(header)[:28] == bytes(answer.data[:28])


@pytest.mark.parametrize("length", [50, 1200, 1232])
def test_a_refused_ipv6_packet_is_answered_with_as_much_as_fits(length: int) -> None:
    original = built(ip(6), udp(), pattern(length))
    packet = parse(original)
    assert packet is not None

    answer = icmp_error(packet)

    assert answer is not None
    seen = IPv6(bytes(answer.data))
    assert (seen.src, seen.dst, seen.hlim, seen[ICMPv6DestUnreach].code) == ("fd00::2", "fd00::1", 20, 1)
    assert bytes(answer.data[48:]) == original[:1232]
    assert len(answer.data) <= 1280
    checksum = seen[ICMPv6DestUnreach].cksum
    del seen[ICMPv6DestUnreach].cksum
    assert IPv6(bytes(seen))[ICMPv6DestUnreach].cksum == checksum


@pytest.mark.parametrize("version", [4, 6])
def test_an_error_about_a_super_packet_shows_its_first_segment(version: int) -> None:
    packet = super_packet(ip(version), tcp(), pattern(1000), segment_size=300)

    answer = icmp_error(packet)

    assert answer is not None
    embedded = bytes(answer.data[28 if version == 4 else 48 :])
    assert embedded == bytes(packet.segment(0).data)[: len(embedded)]
    assert len(embedded) == (28 if version == 4 else 40 + 32 + 300)


def test_an_error_about_a_partial_checksum_shows_it_complete_and_leaves_the_packet_alone() -> None:
    original = built(ip(6), udp(), pattern(50))
    packet = from_virtio(frame(original, 0))
    assert packet is not None

    answer = icmp_error(packet)

    assert answer is not None
    assert bytes(answer.data[48:]) == original
    assert packet.checksum_start == 40


@pytest.mark.parametrize(
    "data",
    [
        built(ip(4), ICMP(type=3, code=1), bytes(28)),
        built(ip(4), ICMP(type=11), bytes(28)),
        built(ip(6), ICMPv6DestUnreach(), bytes(48)),
        built(IP(src="10.0.0.1", dst="10.0.0.2", frag=1, proto=17), bytes(20)),
        built(ip(6), IPv6ExtHdrFragment(offset=1, nh=58), bytes(20)),
        built(IP(src="10.0.0.1", dst="224.0.0.1"), udp()),
        built(IP(src="0.0.0.0", dst="255.255.255.255"), udp()),
        built(IPv6(src="fd00::1", dst="ff02::1"), udp()),
        built(IPv6(src="::", dst="::", nh=255), b"control"),
    ],
)
def test_some_packets_are_never_answered(data: bytearray) -> None:
    packet = parse(data)

    assert packet is not None
    assert icmp_error(packet) is None


@pytest.mark.parametrize(
    "data",
    [
        built(ip(4), ICMP(type=8)),
        built(ip(6), ICMPv6EchoRequest()),
        built(ip(4), udp()),
        built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), UDP(), bytes(16)),
    ],
)
def test_queries_and_first_fragments_are_answered(data: bytearray) -> None:
    packet = parse(data)

    assert packet is not None
    assert not is_icmp_error(packet)
    assert icmp_error(packet) is not None


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("inner", "expected"), [(0, 0), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("dscp", [0, 0xB8, 0xFC])
def test_a_congestion_mark_is_set_on_ecn_capable_packets(version: int, inner: int, expected: int, dscp: int) -> None:
    packet = parse(built(ip(version, traffic_class=dscp | inner), tcp(), b"data"))
    assert packet is not None

    mark_congestion(packet)

    assert bytes(packet.data) == built(ip(version, traffic_class=dscp | expected), tcp(), b"data")
    assert packet.ecn == expected

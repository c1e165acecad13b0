from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6ParamProblem, ICMPv6TimeExceeded

from firezone_tunnel.core.packet.icmp import SOURCE_REFUSED, icmp_error, is_icmp_error, quoted_packet
from firezone_tunnel.core.packet.superpacket import from_virtio, parse
from tests.unit.core.packet.packets import (
    ICMP,
    IP,
    UDP,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    Packet,
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


@pytest.mark.parametrize(("version", "expected"), [(4, (3, 13)), (6, (1, 5))])
def test_the_reason_decides_the_code(version: int, expected: tuple[int, int]) -> None:
    packet = parse(built(ip(version), udp(), b"data"))
    assert packet is not None

    answer = icmp_error(packet, SOURCE_REFUSED)

    assert answer is not None
    assert tuple(answer.data[answer.transport_offset :][:2]) == expected


# The packet that an error quotes

V4_REPORTS = [ICMP(type=3, code=1), ICMP(type=3, code=4, nexthopmtu=1000), ICMP(type=11), ICMP(type=12)]
V6_REPORTS = [ICMPv6DestUnreach(), ICMPv6PacketTooBig(mtu=1280), ICMPv6TimeExceeded(), ICMPv6ParamProblem()]
REPORTS = [(4, report) for report in V4_REPORTS] + [(6, report) for report in V6_REPORTS]


@pytest.mark.parametrize(("version", "report"), REPORTS)
@pytest.mark.parametrize("length", [8, 20, 300])
@pytest.mark.parametrize("layer", [tcp(), udp()])
def test_an_error_names_the_packet_that_it_quotes(version: int, report: Packet, length: int, layer: Packet) -> None:
    original = built(ip(version), layer, pattern(1000))
    header = 20 if version == 4 else 40
    error = parse(built(ip(version, last=9), report, bytes(original[: header + length])))
    assert error is not None

    quoted = quoted_packet(error)

    sent = parse(original)
    assert quoted is not None
    assert sent is not None
    for name in ("version", "protocol", "source", "destination", "source_port", "destination_port", "fragment"):
        assert getattr(quoted, name) == getattr(sent, name)
    assert bytes(quoted.data[header:]) == original[header : header + length]


@pytest.mark.parametrize("version", [4, 6])
def test_a_quoted_echo_request_is_known_by_its_identifier(version: int) -> None:
    echo = ICMP(id=77) if version == 4 else ICMPv6EchoRequest(id=77)
    error = parse(built(ip(version), REPORTS[0 if version == 4 else 4][1], bytes(built(ip(version), echo, b"ping"))))
    assert error is not None

    quoted = quoted_packet(error)

    assert quoted is not None
    assert quoted.destination_port == 77


def test_a_quoted_packet_may_have_options_and_extension_headers() -> None:
    with_options = built(IP(src="10.0.0.1", dst="10.0.0.2", options=b"\x01" * 8), udp(port=99), b"data")
    extended = built(ip(6), IPv6ExtHdrHopByHop(), udp(port=99), b"data")

    for version, original in ((4, with_options), (6, extended)):
        error = parse(built(ip(version), REPORTS[0 if version == 4 else 4][1], bytes(original)))
        assert error is not None
        quoted = quoted_packet(error)
        assert quoted is not None
        assert quoted.destination_port == 99


QUOTE = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / b"data")
QUOTE_V6 = bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1, dport=2) / b"data")


@pytest.mark.parametrize(
    "data",
    [
        built(ip(4), ICMP(type=8), QUOTE),
        built(ip(4), ICMP(type=4), QUOTE),
        built(ip(4), ICMP(type=5), QUOTE),
        built(ip(6), ICMPv6EchoRequest(), QUOTE_V6),
        built(ip(6), ICMPv6DestUnreach(type=137), QUOTE_V6),
        built(ip(4), udp(), QUOTE),
        built(ip(4), ICMP(type=3)),
        built(ip(4), ICMP(type=3), QUOTE[:19]),
        built(ip(4), ICMP(type=3), QUOTE[:27]),
        built(ip(6), ICMPv6DestUnreach(), QUOTE_V6[:39]),
        built(ip(6), ICMPv6DestUnreach(), QUOTE_V6[:47]),
        built(ip(6), ICMPv6DestUnreach(), QUOTE),
        built(ip(4), ICMP(type=3), QUOTE_V6),
        built(ip(4), ICMP(type=3), b"\x4f" + QUOTE[1:]),
        built(ip(4), ICMP(type=3), b"\x00" + QUOTE[1:]),
        built(ip(4), ICMP(type=3), bytes(IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=3) / QUOTE)),
        built(ip(6), ICMPv6DestUnreach(), bytes(ip(6) / ICMPv6DestUnreach() / QUOTE_V6)),
        built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), ICMP(type=3), QUOTE),
    ],
)
def test_what_reports_no_packet_quotes_none(data: bytearray) -> None:
    packet = parse(data)

    assert packet is not None
    assert quoted_packet(packet) is None


@given(st.binary(max_size=120), st.booleans())
def test_any_quotation_is_read_or_refused(quotation: bytes, is_ipv6: bool) -> None:
    error = parse(built(ip(6), ICMPv6DestUnreach(), quotation) if is_ipv6 else built(ip(4), ICMP(type=3), quotation))
    assert error is not None

    quoted = quoted_packet(error)

    assert quoted is None or len(quoted.source) == len(quoted.destination) == (16 if is_ipv6 else 4)

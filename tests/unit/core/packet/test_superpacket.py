from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.packet.superpacket import SuperPacket, from_virtio, parse, virtio_header
from tests.hypothesis_profiles import examples
from tests.unit.core.packet.packets import (
    ICMP,
    IP,
    TCP,
    UDP,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    built,
    frame,
    ip,
    pattern,
    rebuilt,
    super_packet,
    tcp,
    udp,
)

VERSIONS = pytest.mark.parametrize("version", [4, 6])
LAYERS = {"tcp": tcp, "udp": udp}


@VERSIONS
def test_a_tcp_packet_shows_the_fields_for_routing_and_filters(version: int) -> None:
    packet = parse(built(ip(version, traffic_class=3), tcp(), b"hello"))

    assert packet is not None
    assert (packet.version, packet.protocol, packet.ecn) == (version, 6, 3)
    assert (packet.source_port, packet.destination_port) == (40000, 80)
    assert (len(packet.source), len(packet.destination)) == ((4, 4) if version == 4 else (16, 16))
    assert packet.source[-1], packet.destination[-1] == (1, 2)
    assert bytes(packet.data[packet.header_length :]) == b"hello"
    assert (packet.segments, packet.segment_size, packet.checksum_start, packet.fragment) == (1, 0, 0, False)


@pytest.mark.parametrize(
    "echo", [ip(4) / ICMP(type=8, id=77), ip(4) / ICMP(type=0, id=77), ip(6) / ICMPv6EchoRequest(id=77)]
)
def test_an_echo_has_its_identifier_for_both_ports(echo: IP) -> None:
    packet = parse(built(echo))

    assert packet is not None
    assert (packet.source_port, packet.destination_port) == (77, 77)


def test_other_icmp_has_no_ports() -> None:
    packet = parse(built(ip(4) / ICMP(type=3, code=1) / bytes(28)))

    assert packet is not None
    assert (packet.protocol, packet.source_port, packet.destination_port) == (1, 0, 0)


def test_ipv4_options_belong_to_the_header() -> None:
    packet = parse(built(IP(src="10.0.0.1", dst="10.0.0.2", options=b"\x01" * 8), udp(), b"abc"))

    assert packet is not None
    assert (packet.transport_offset, packet.header_length, packet.destination_port) == (28, 36, 53)


def test_an_authentication_header_is_walked_over() -> None:
    authentication = bytes([17, 4]) + bytes(22)
    packet = parse(built(IP(src="10.0.0.1", dst="10.0.0.2", proto=51), authentication + bytes(udp() / b"abc")))

    assert packet is not None
    assert (packet.protocol, packet.transport_offset, packet.destination_port) == (17, 44, 53)


def test_ipv6_extension_headers_are_walked_over() -> None:
    packet = parse(built(ip(6), IPv6ExtHdrHopByHop(), IPv6ExtHdrHopByHop(), udp(), b"abc"))

    assert packet is not None
    assert (packet.protocol, packet.transport_offset, packet.destination_port) == (17, 56, 53)


def test_a_chain_of_extension_headers_has_an_end() -> None:
    assert parse(built(ip(6), *[IPv6ExtHdrHopByHop() for _ in range(9)], udp())) is None


def test_any_other_protocol_is_opaque() -> None:
    packet = parse(built(IPv6(src="::", dst="::", nh=255), b"control"))

    assert packet is not None
    assert (packet.protocol, packet.header_length, packet.source_port) == (255, 40, 0)


@pytest.mark.parametrize(
    ("data", "later"),
    [
        (built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), udp(), b"abcd"), False),
        (built(IP(src="10.0.0.1", dst="10.0.0.2", frag=9, proto=17), b"abcd"), True),
        (built(ip(6), IPv6ExtHdrFragment(m=1), udp(), b"abcd"), False),
        (built(ip(6), IPv6ExtHdrFragment(offset=9, nh=17), b"abcd"), True),
    ],
)
def test_a_fragment_has_no_ports(data: bytearray, later: bool) -> None:
    packet = parse(data)

    assert packet is not None
    assert (packet.protocol, packet.fragment, packet.later_fragment) == (17, True, later)
    assert (packet.source_port, packet.destination_port) == (0, 0)


@VERSIONS
def test_bytes_after_the_packet_are_cut_off(version: int) -> None:
    data = built(ip(version), udp(), b"abc")

    packet = parse(data + bytes(9))

    assert packet is not None
    assert bytes(packet.data) == data


@VERSIONS
@pytest.mark.parametrize("layer", [tcp(), udp(), ICMP(), ICMPv6EchoRequest()], ids=["tcp", "udp", "icmp", "icmpv6"])
def test_a_truncated_packet_is_rejected_wherever_it_ends(version: int, layer: object) -> None:
    data = built(ip(version), layer)

    assert all(parse(data[:length]) is None for length in range(len(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        built(IP(proto=58), bytes(ICMPv6EchoRequest())),
        built(IPv6(src="::1", dst="::2", nh=1), bytes(ICMP())),
        b"\x55" + built(ip(4), udp())[1:],
        b"\x44" + built(ip(4), udp())[1:],
        built(IP(len=19), udp()),
        built(ip(4), TCP(dataofs=4)),
        built(ip(4), TCP(dataofs=15)),
        built(ip(4), UDP(len=7)),
        built(ip(4), UDP(len=9)),
        built(IP(len=20, proto=17), udp()),
    ],
)
def test_a_malformed_packet_is_rejected(data: bytes) -> None:
    assert parse(data) is None


@VERSIONS
def test_a_lone_packet_is_at_most_1280_bytes(version: int) -> None:
    header = len(built(ip(version), udp()))

    assert parse(built(ip(version), udp(), bytes(1280 - header))) is not None
    assert parse(built(ip(version), udp(), bytes(1281 - header))) is None
    assert parse(built(ip(version), udp(), bytes(1281 - header)), max_size=1500) is not None


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
def test_a_frame_of_many_segments_stays_whole(version: int, layer: str) -> None:
    packet = super_packet(ip(version), LAYERS[layer](), pattern(3300), segment_size=1000)

    assert (packet.segments, packet.segment_size) == (4, 1000)
    assert packet.checksum_start == packet.transport_offset == (20 if version == 4 else 40)
    assert bytes(packet.data[packet.header_length :]) == pattern(3300)


def test_a_segment_is_at_most_1280_bytes() -> None:
    data = built(ip(), tcp(), bytes(5000))

    assert from_virtio(frame(data, 1228)) is not None
    assert from_virtio(frame(data, 1229)) is None


def test_a_frame_whose_kind_contradicts_its_packet_is_rejected() -> None:
    data = frame(built(ip(4), tcp(), bytes(3000)), 1000)
    for kind in (2, 3, 4, 5, 6, 127):
        data[1] = kind
        assert from_virtio(data) is None


def test_one_segment_marked_as_a_run_is_a_lone_packet() -> None:
    packet = from_virtio(frame(built(ip(4), tcp(), b"abc"), 1000))

    assert packet is not None
    assert (packet.segment_size, packet.segments) == (0, 1)
    packet.complete()
    assert rebuilt(packet.data) == bytes(packet.data)


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("length", [0, 1, 100, 1001])
def test_a_partial_checksum_is_completed(version: int, layer: str, length: int) -> None:
    data = built(ip(version), LAYERS[layer](), pattern(length))
    packet = from_virtio(frame(data, 0))
    assert packet is not None
    assert packet.checksum_start

    packet.complete()

    assert bytes(packet.data) == data
    assert packet.checksum_start == 0


def test_the_partial_checksum_of_a_packet_within_a_packet_is_completed() -> None:
    inner = built(ip(4), udp(), b"inner")
    partial = frame(inner, 0)
    outer = built(IP(src="10.0.0.1", dst="10.0.0.2", proto=4), bytes(partial[10:]))
    data = memoryview(bytearray(partial[:10]) + outer)
    data[6] += 20

    packet = from_virtio(data)

    assert packet is not None
    assert bytes(packet.data[20:]) == inner
    assert packet.checksum_start == 0


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("segment_size", [0, 400])
def test_packets_written_to_the_device_read_back_the_same(version: int, layer: str, segment_size: int) -> None:
    packet = from_virtio(frame(built(ip(version), LAYERS[layer](), pattern(1000)), segment_size))
    assert packet is not None

    again = from_virtio(memoryview(bytearray(virtio_header(packet) + packet.data)))

    assert again is not None
    assert fields(again) == fields(packet)


def test_a_complete_packet_needs_no_work_by_the_device() -> None:
    packet = parse(built(ip(4), udp()))

    assert packet is not None
    assert virtio_header(packet) == bytes(10)


def test_congestion_window_reduced_is_announced_to_the_device() -> None:
    packet = super_packet(ip(4), tcp(flags="AC"), bytes(2000), segment_size=1000)

    assert virtio_header(packet)[1] == 1 | 0x80


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("df", [True, False])
def test_each_segment_alone_is_a_correct_packet(version: int, layer: str, df: bool) -> None:
    packet = super_packet(ip(version, df=df, ident=65535), LAYERS[layer](), pattern(2501), segment_size=1001)

    segments = [packet.segment(index) for index in range(packet.segments)]

    assert all(rebuilt(segment.data) == bytes(segment.data) for segment in segments)
    assert b"".join(bytes(segment.data[segment.header_length :]) for segment in segments) == pattern(2501)
    if version == 4:
        assert [IP(bytes(segment.data)).id for segment in segments] == ([65535] * 3 if df else [65535, 0, 1])


def test_only_the_first_segment_has_cwr_and_only_the_last_fin_and_psh() -> None:
    packet = super_packet(ip(4), tcp(flags="FPAC", seq=0xFFFFFF00), bytes(2500), segment_size=1000)

    headers = [TCP(bytes(packet.segment(index).data[20:])) for index in range(3)]

    assert [str(header.flags) for header in headers] == ["AC", "A", "FPA"]
    assert [header.seq for header in headers] == [0xFFFFFF00, 0x2E8, 0x6D0]


def test_a_copy_has_memory_of_its_own() -> None:
    data = built(ip(4), udp(), b"abc")
    packet = parse(data)
    assert packet is not None

    copy = packet.copy()
    data[-1] = 0

    assert bytes(copy.data[-3:]) == b"abc"
    assert fields(copy)[1:] == fields(packet)[1:]


VALID = [
    bytes(frame(built(ip(4), tcp(), pattern(300)), 100)),
    bytes(frame(built(ip(6), udp(), pattern(300)), 100)),
    bytes(10) + bytes(built(ip(6), IPv6ExtHdrHopByHop(), IPv6ExtHdrFragment(m=1), udp())),
    bytes(10) + bytes(built(IP(options=b"\x01" * 8), ICMP(), b"abc")),
]


@settings(max_examples=examples(300))
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
def test_a_frame_with_arbitrary_bytes_is_parsed_or_rejected(
    data: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(changed)] = value

    packet = from_virtio(memoryview(changed[:length]))

    if packet is not None:
        assert_consistent(packet)


@given(st.binary(max_size=120))
@example(b"\x60" + bytes(39))
def test_arbitrary_bytes_are_parsed_or_rejected(data: bytes) -> None:
    from_virtio(memoryview(bytearray(data)))
    packet = parse(data)

    if packet is not None:
        assert len(packet.data) <= len(data)


def assert_consistent(packet: SuperPacket) -> None:
    """All operations work on a packet that was accepted."""
    assert packet.transport_offset <= packet.header_length <= len(packet.data)
    assert packet.segments >= 1
    assert len(virtio_header(packet)) == 10
    last = packet.segment(packet.segments - 1)
    assert len(last.data) <= 1280
    packet.complete()


def fields(packet: SuperPacket) -> list[object]:
    return [
        bytes(getattr(packet, name)) if name == "data" else getattr(packet, name)
        for name in ["data", *(name for name in SuperPacket.__slots__ if name != "data")]
    ]

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.packet.coalesce import Arena, coalesce, coalesce_lone
from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.packet.superpacket import SuperPacket, from_virtio, parse
from tests.hypothesis_profiles import examples
from tests.unit.core.packet.packets import (
    ICMP,
    IP,
    UDP,
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
GAP = 32


def merged(datagrams: Sequence[bytes | bytearray], arena: Arena | None = None, **options: object) -> list[SuperPacket]:
    """Coalesce the packets of one batch. All but the last have the same size."""
    size = len(datagrams[0])
    assert all(len(data) == size for data in datagrams[:-1])
    memory = memoryview(bytearray(65_536))
    for row, data in enumerate(datagrams):
        start = 16 + row * (size + GAP)
        memory[start : start + len(data)] = data
    rows = Rows(memory, 16, size + GAP, size, len(datagrams), len(datagrams[-1]))
    return coalesce(rows, arena=arena or Arena(), **options)


def cut(packet: SuperPacket) -> list[bytes]:
    return [bytes(packet.segment(index).data) for index in range(packet.segments)]


def segments_of(packets: Sequence[SuperPacket]) -> list[bytes]:
    return [data for packet in packets for data in cut(packet)]


def stream(count: int, *, size: int = 100, first: int = 1000, **fields: object) -> list[bytearray]:
    """Consecutive packets of a TCP stream with `size` payload bytes each."""
    payload = pattern(size)
    return [built(ip(), tcp(seq=(first + row * size) % 2**32, **fields), payload) for row in range(count)]


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("length", [40 * 100, 40 * 100 - 1, 39 * 100 + 1, 4 * 100, 200, 101])
def test_the_segments_of_a_super_packet_are_merged_again(version: int, layer: str, length: int) -> None:
    original = super_packet(ip(version), LAYERS[layer](), pattern(length), segment_size=100)

    packets = merged(cut(original))

    assert len(packets) == 1
    assert bytes(packets[0].data) == bytes(original.data)
    assert packets[0].segment_size == 100
    assert packets[0].checksum_start == original.checksum_start


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 98, 99, 101])
def test_segments_may_have_any_size(version: int, layer: str, size: int) -> None:
    original = super_packet(ip(version), LAYERS[layer](), pattern(12 * size), segment_size=size)

    packets = merged(cut(original))

    assert [bytes(packet.data) for packet in packets] == [bytes(original.data)]


def test_a_push_on_the_last_segment_is_kept() -> None:
    original = super_packet(ip(), tcp(flags="PA"), pattern(950), segment_size=100)

    assert [bytes(packet.data) for packet in merged(cut(original))] == [bytes(original.data)]


def test_a_push_ends_a_run() -> None:
    packets = stream(20)
    packets[9] = built(ip(), tcp(seq=1900, flags="PA"), pattern(100))

    assert [packet.segments for packet in merged(packets)] == [10, 10]


def test_identifications_may_count_up() -> None:
    packets = [built(ip(df=False, ident=7 + row), tcp(seq=row * 100), pattern(100)) for row in range(8)]

    (packet,) = merged(packets)

    assert cut(packet) == packets


def test_sequence_numbers_wrap() -> None:
    (packet,) = merged(stream(5, first=0xFFFFFF00 + 56))

    assert cut(packet) == stream(5, first=0xFFFFFF00 + 56)


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize(
    "following",
    [
        built(ip(), tcp(seq=1000 + 1100, ack=6), pattern(100)),
        built(ip(), tcp(seq=1000 + 1100, window=501), pattern(100)),
        built(ip(), tcp(seq=1000 + 1100, flags="FA"), pattern(100)),
        built(ip(), tcp(seq=1000 + 1100, flags="AE"), pattern(100)),
        built(ip(), tcp(seq=1000 + 1100, flags="AU"), pattern(100)),
        built(ip(), tcp(seq=1000 + 1100, port=81), pattern(100)),
        built(ip(), tcp(seq=1000 + 1099), pattern(100)),
        built(ip(), tcp(seq=1000 + 1101), pattern(100)),
        built(ip(ttl=63), tcp(seq=1000 + 1100), pattern(100)),
        built(ip(traffic_class=3), tcp(seq=1000 + 1100), pattern(100)),
        built(ip(df=False), tcp(seq=1000 + 1100), pattern(100)),
        built(ip(last=3), tcp(seq=1000 + 1100), pattern(100)),
        built(ip(), tcp(seq=1000 + 1100, options=False), pattern(112)),
        built(
            IP(src="10.0.0.1", dst="10.0.0.2", flags="DF", options=b"\x01" * 12),
            tcp(seq=2100, options=False),
            pattern(100),
        ),
    ],
    ids=[
        "ack",
        "window",
        "fin",
        "ece",
        "urg",
        "port",
        "overlap",
        "gap",
        "ttl",
        "ecn",
        "df",
        "address",
        "options",
        "ip-options",
    ],
)
def test_packets_that_the_kernel_would_not_merge_stay_apart(following: bytearray, rows: int) -> None:
    before = stream(12)[12 - rows :]

    packets = merged([*before, following])

    assert [packet.segments for packet in packets] == [rows, 1]
    assert bytes(packets[1].data) == following


@pytest.mark.parametrize(
    "packet",
    [
        built(ip(), tcp(flags="S"), pattern(100)),
        built(ip(), tcp()),
        built(ip(), udp()),
        built(ip(), ICMP(), pattern(100)),
        built(ip(), UDP(sport=1, dport=2, chksum=0), pattern(100)),
        built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), udp(), pattern(96)),
        built(IP(src="10.0.0.1", dst="10.0.0.2", options=b"\x01" * 4), udp(), pattern(100)),
        built(ip(6), IPv6ExtHdrHopByHop(), udp(), pattern(100)),
        built(ip(), UDP(sport=1, dport=2, len=20), pattern(100)),
    ],
    ids=["syn", "ack", "empty", "icmp", "no-checksum", "fragment", "ip-options", "extension", "udp-length"],
)
@pytest.mark.parametrize("count", [2, 8])
def test_packets_that_are_never_merged_pass_unchanged(packet: bytearray, count: int) -> None:
    assert [bytes(each.data) for each in merged([packet] * count)] == [bytes(packet)] * count


def test_a_udp_super_packet_has_at_most_64_segments() -> None:
    packets = merged([built(ip(), udp(), pattern(100))] * 150)

    assert [packet.segments for packet in packets] == [64, 64, 22]


def test_a_super_packet_is_at_most_65535_bytes() -> None:
    datagrams = stream(49, size=1228)
    arena = Arena()
    first = merged(datagrams, arena)
    second = merged(stream(10, size=1228, first=1000 + 49 * 1228), arena)

    packets = coalesce_lone(
        [packet for data in [*datagrams, *stream(10, size=1228, first=1000 + 49 * 1228)] if (packet := parse(data))],
        Arena(),
    )

    assert [packet.segments for packet in (*first, *second)] == [49, 10]
    assert [packet.segments for packet in packets] == [53, 6]


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("rows", [2, 3, 20])
@pytest.mark.parametrize("wrong", [0, 1, -1])
def test_a_packet_with_a_wrong_checksum_goes_through_alone_and_unchanged(
    version: int, layer: str, rows: int, wrong: int
) -> None:
    datagrams = cut(super_packet(ip(version), LAYERS[layer](), pattern(100 * rows - 1), segment_size=100))
    corrupted = bytearray(datagrams[wrong])
    corrupted[-3] ^= 4
    datagrams[wrong] = bytes(corrupted)

    packets = merged(datagrams)

    alone = [packet for packet in packets if bytes(packet.data) == corrupted]
    assert [packet.segments for packet in alone] == [1]
    assert segments_of(packets) == datagrams


def test_a_packet_with_a_wrong_ip_checksum_goes_through_alone_and_unchanged() -> None:
    datagrams = stream(20)
    datagrams[7][11] ^= 1

    packets = merged(datagrams)

    assert [packet.segments for packet in packets] == [7, 1, 12]
    assert segments_of(packets) == datagrams


def test_ip_checksums_that_are_all_equally_wrong_are_not_repaired() -> None:
    datagrams = stream(20)
    for data in datagrams:
        data[11] ^= 1

    assert [bytes(packet.data) for packet in merged(datagrams)] == datagrams


def test_each_of_interleaved_flows_is_merged() -> None:
    first, second = stream(10), stream(10, port=443)

    packets = merged([data for pair in zip(first, second, strict=True) for data in pair])

    assert [(packet.destination_port, packet.segments) for packet in packets] == [(80, 10), (443, 10)]
    assert cut(packets[0]) == first


def test_a_packet_never_overtakes_another_of_its_flow() -> None:
    data = built(ip(), udp(), pattern(100))
    fragment = built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), udp(), pattern(100))
    other = built(ip(ttl=1), udp(), pattern(100))

    packets = merged([data, other, data, data, fragment, data])

    assert segments_of(packets) == [data, other, data, data, fragment, data]
    assert [packet.segments for packet in packets] == [1, 1, 2, 1, 1]


def test_padding_after_a_packet_is_cut_off() -> None:
    packets = merged([data + bytes(12) for data in stream(8)])

    assert [packet.segments for packet in packets] == [8]
    assert segments_of(packets) == stream(8)


def test_keepalives_and_malformed_packets_are_left_out() -> None:
    arena = Arena()

    assert merged([b"", b"", b"", b""], arena) == []
    assert arena.rejected == 0
    assert segments_of(merged([*stream(4), b"\x45"], arena)) == stream(4)
    assert merged([b"\0" * 40] * 6, arena) == []
    assert arena.rejected == 7


def test_malformed_packets_between_others_are_counted_once() -> None:
    arena = Arena()
    datagrams: list[bytes | bytearray] = list(stream(20))
    datagrams[5] = b"\0" + datagrams[5][1:]

    assert [packet.segments for packet in merged(datagrams, arena)] == [5, 14]
    assert arena.rejected == 1


def test_packets_outside_the_selection_are_left_out() -> None:
    keep = np.array([True] * 4 + [False] + [True] * 5)

    packets = merged(stream(10), keep=keep)

    assert [packet.segments for packet in packets] == [4, 5]
    assert [packet.segments for packet in merged(stream(10), keep=np.ones(10, np.bool_))] == [10]


def test_packets_stay_alone_without_memory_to_merge_them() -> None:
    arena = Arena(1000)

    assert [bytes(packet.data) for packet in merged(stream(10), arena)] == stream(10)
    assert [packet.segments for packet in merged(stream(5), arena)] == [5]
    shorter = built(ip(), tcp(seq=1500), pattern(99))
    assert [bytes(packet.data) for packet in merged([*stream(5), shorter], arena)] == [*stream(5), shorter]
    arena.reset()
    assert [packet.segments for packet in merged(stream(5), arena)] == [5]


def test_batches_in_different_memory_do_not_get_mixed_up() -> None:
    arena = Arena()
    kept = []
    for port in range(1, 40):
        kept.append((port, merged(stream(4, size=20 + port, port=port), arena)))
    assert all([packet.destination_port for packet in packets] == [port] for port, packets in kept)


@VERSIONS
@pytest.mark.parametrize("layer", ["tcp", "udp"])
def test_lone_frames_with_partial_checksums_are_merged(version: int, layer: str) -> None:
    original = super_packet(ip(version), LAYERS[layer](), pattern(1950), segment_size=100)
    lone = [packet for data in cut(original) if (packet := from_virtio(frame(data, 0)))]

    (packet,) = coalesce_lone(lone, Arena())

    assert bytes(packet.data) == bytes(original.data)


def test_lone_frames_stay_in_order_around_super_packets() -> None:
    run = super_packet(ip(), tcp(seq=1200), pattern(500), segment_size=100)
    before, after = stream(2), stream(2, first=1700)
    lone = [parse(data) for data in (*before, *after)]

    packets = coalesce_lone([packet for packet in (*lone[:2], run, *lone[2:]) if packet], Arena())

    assert [packet.segments for packet in packets] == [2, 5, 2]
    assert segments_of(packets) == [*before, *cut(run), *after]


@st.composite
def packet_lists(draw: st.DrawFn) -> list[bytes]:
    """Packets of equal size from a few flows, mostly consecutive, some of them unusual."""
    size = draw(st.sampled_from([1, 60, 101]))
    version = draw(st.sampled_from([4, 6]))
    positions: dict[int, int] = defaultdict(int)
    packets = []
    for _ in range(draw(st.integers(1, 14))):
        port = draw(st.sampled_from([1, 1, 1, 2, 3]))
        oddity = draw(st.sampled_from([None] * 6 + ["PA", "FA", "ack", "ttl", "gap", "corrupt"]))
        layers = ip(version, ttl=9 if oddity == "ttl" else 64)
        if port == 3:
            data = built(layers, udp(port=3), pattern(size))
        else:
            positions[port] += size + (oddity == "gap")
            fields = {"flags": oddity if oddity in {"PA", "FA"} else "A", "ack": 9 if oddity == "ack" else 5}
            data = built(layers, tcp(port=port, seq=positions[port], **fields), pattern(size))
        if oddity == "corrupt":
            data[-1] ^= 1
        packets.append(bytes(data))
    if draw(st.booleans()):
        size_of_last = draw(st.integers(1, size))
        packets.append(bytes(built(ip(version), tcp(port=1, seq=positions[1] + size), pattern(size_of_last))))
        if len(packets[-1]) > len(packets[0]):
            packets.pop()
    width = min(len(packet) for packet in packets[:-1]) if len(packets) > 1 else len(packets[0])
    return [packet for packet in packets[:-1] if len(packet) == width] + packets[-1:]


@settings(max_examples=examples(60))
@given(packet_lists().filter(lambda packets: all(len(packet) <= len(packets[0]) for packet in packets)))
def test_cutting_merged_packets_gives_back_each_flow(datagrams: list[bytes]) -> None:
    arena = Arena()

    packets = merged(datagrams, arena)

    assert by_flow(segments_of(packets)) == by_flow(datagrams)
    for packet in packets:
        if packet.segment_size:
            assert all(rebuilt(data) == data for data in cut(packet))


@settings(max_examples=examples(60))
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 80), st.integers(0, 255)), max_size=8), st.booleans())
def test_corrupted_packets_are_neither_lost_nor_repaired(changes: list[tuple[int, int, int]], short_last: bool) -> None:
    datagrams = [bytearray(data) for data in stream(12, size=30)]
    if short_last:
        datagrams[-1] = bytearray(built(ip(), tcp(seq=1000 + 11 * 30), pattern(7)))
    for row, at, value in changes:
        datagrams[row][at % len(datagrams[row])] = value
    valid = [bytes(packet.data) for data in datagrams if (packet := parse(bytes(data)))]

    packets = merged(datagrams)

    assert sorted(segments_of(packets)) == sorted(valid)


@settings(max_examples=examples(100))
@given(st.binary(max_size=2000), st.integers(0, 90), st.integers(1, 90), st.integers(0, 90))
def test_arbitrary_bytes_never_fail(data: bytes, size: int, gap: int, last_size: int) -> None:
    memory = memoryview(bytearray(data + bytes(200)))
    count = 1 + len(data) // (size + gap)

    rows = Rows(memory, 0, size + gap, size, count, min(size, last_size))
    packets = coalesce(rows, arena=Arena())

    assert sum(packet.segments for packet in packets) <= count


def by_flow(packets: Sequence[bytes]) -> dict[bytes, list[bytes]]:
    flows: dict[bytes, list[bytes]] = defaultdict(list)
    for data in packets:
        start = 20 if data[0] >> 4 == 4 else 40
        flows[data[start : start + 4]].append(bytes(data))
    return flows

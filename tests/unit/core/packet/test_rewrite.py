from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.packet.rewrite import MAX_SEGMENT, clamp_segment_size, mark_congestion
from firezone_tunnel.core.packet.superpacket import from_virtio, parse
from tests.unit.core.packet.packets import IP, TCP, built, frame, ip, slow_sum, tcp


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("inner", "expected"), [(0, 0), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("dscp", [0, 0xB8, 0xFC])
def test_a_congestion_mark_is_set_on_ecn_capable_packets(version: int, inner: int, expected: int, dscp: int) -> None:
    packet = parse(built(ip(version, traffic_class=dscp | inner), tcp(), b"data"))
    assert packet is not None

    mark_congestion(packet)

    assert bytes(packet.data) == built(ip(version, traffic_class=dscp | expected), tcp(), b"data")
    assert packet.ecn == expected


# The maximum segment size

NOP, END = b"\x01", b"\x00"


def mss(size: int) -> bytes:
    return b"\x02\x04" + size.to_bytes(2, "big")


def syn(version: int, options: bytes, *, flags: str = "S") -> bytearray:
    """A TCP packet with these options, padded, and a correct checksum."""
    padded = options.ljust(-(-len(options) // 4) * 4, NOP)
    header = ip(version)
    setattr(header, "proto" if version == 4 else "nh", 6)
    segment = bytes(TCP(sport=40000, dport=80, flags=flags, dataofs=5 + len(padded) // 4, chksum=0))[:20] + padded
    data = built(header, segment)
    start = len(data) - len(segment)
    data[start + 16 : start + 18] = (0xFFFF - tcp_sum(data)).to_bytes(2, "big")
    return data


def tcp_sum(data: bytes | bytearray | memoryview) -> int:
    """The sum over the TCP header and the pseudo-header: 0xFFFF if the checksum is correct."""
    raw = bytes(data)
    addresses, start = (raw[12:20], 20) if raw[0] >> 4 == 4 else (raw[8:40], 40)
    return slow_sum(addresses + (len(raw) - start).to_bytes(4, "big") + (6).to_bytes(4, "big") + raw[start:])


def clamped(data: bytearray) -> bytes:
    """What becomes of a packet; its checksum is verified."""
    packet = parse(bytearray(data))
    assert packet is not None
    clamp_segment_size(packet)
    assert tcp_sum(packet.data) == 0xFFFF
    return bytes(packet.data)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", ["S", "SA", "SEC"])
@pytest.mark.parametrize("before", [b"", NOP, NOP * 2, NOP * 3, b"\x04\x02", b"\x03\x03\x07", b"\xfd\x05\1\2\3"])
@pytest.mark.parametrize("size", [1221, 1241, 1460, 8960, 65535])
def test_a_segment_size_beyond_the_tunnels_is_lowered(version: int, flags: str, before: bytes, size: int) -> None:
    most = MAX_SEGMENT[version]

    assert clamped(syn(version, before + mss(size), flags=flags)) == syn(
        version, before + mss(min(size, most)), flags=flags
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 536, 1220])
def test_a_smaller_one_is_never_raised(version: int, size: int) -> None:
    assert clamped(syn(version, mss(size))) == syn(version, mss(size))


@pytest.mark.parametrize("version", [4, 6])
def test_repeated_options_are_all_lowered(version: int) -> None:
    most = MAX_SEGMENT[version]

    assert clamped(syn(version, mss(1460) + NOP + mss(9000))) == syn(version, mss(most) + NOP + mss(most))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    "options",
    [
        b"",
        NOP * 8,
        END + NOP * 3 + mss(1460),
        NOP * 3 + b"\x02",
        NOP * 2 + b"\x02\x04",
        NOP + b"\x02\x04\x05",
        b"\x02\x00\x05\xb4",
        b"\x02\x01\x05\xb4",
        b"\x02\x03\x05\xb4",
        b"\x02\x05\x05\xb4\x00" + NOP * 3,
        b"\x08\x00" + mss(1460),
        b"\x08\x28" + mss(1460),
    ],
)
def test_without_a_proper_option_a_syn_is_left_alone(version: int, options: bytes) -> None:
    assert clamped(syn(version, options)) == syn(version, options)


@pytest.mark.parametrize("flags", ["A", "PA", "FA", "R"])
def test_other_segments_are_left_alone(flags: str) -> None:
    assert clamped(syn(4, mss(1460), flags=flags)) == syn(4, mss(1460), flags=flags)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("before", [b"", NOP])
def test_a_partial_checksum_is_completed_over_the_new_size(version: int, before: bytes) -> None:
    packet = from_virtio(frame(syn(version, before + mss(1460)), 0))
    assert packet is not None

    clamp_segment_size(packet)
    packet.complete()

    assert bytes(packet.data) == syn(version, before + mss(MAX_SEGMENT[version]))


def test_a_fragment_of_a_syn_is_left_alone() -> None:
    data = built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), TCP(flags="S", options=[("MSS", 1460)]), bytes(16))
    packet = parse(bytearray(data))
    assert packet is not None

    clamp_segment_size(packet)

    assert bytes(packet.data) == data


@given(st.sampled_from([4, 6]), st.binary(max_size=40))
def test_any_options_keep_a_correct_checksum(version: int, options: bytes) -> None:
    clamped(syn(version, options))

from __future__ import annotations

from typing import Any

import pytest

from firezone_tunnel.core.packet.reset import tcp_reset
from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from tests.unit.core.packet.packets import (
    IP,
    TCP,
    IPv6,
    IPv6ExtHdrHopByHop,
    built,
    ip,
    pattern,
    rebuilt,
    super_packet,
    tcp,
    udp,
)


def reset_of(packet: SuperPacket) -> Any:
    """The reset, verified and parsed by scapy."""
    answer = tcp_reset(packet)
    assert answer is not None
    data = bytes(answer.data)
    assert data == rebuilt(data)
    return IP(data) if packet.version == 4 else IPv6(data)


def packet_of(*layers: Any) -> SuperPacket:
    packet = parse(built(*layers))
    assert packet is not None
    return packet


@pytest.mark.parametrize("version", [4, 6])
def test_a_segment_with_an_acknowledgement_is_reset_where_the_sender_expects_data(version: int) -> None:
    seen = reset_of(packet_of(ip(version), tcp(seq=1000, ack=77), b"data"))

    assert (seen[TCP].flags, seen[TCP].seq, seen[TCP].ack) == ("R", 77, 0)
    assert (seen[TCP].sport, seen[TCP].dport) == (80, 40000)
    assert (seen.src, seen.dst) == (("10.0.0.2", "10.0.0.1") if version == 4 else ("fd00::2", "fd00::1"))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("flags", "payload", "length"), [("S", b"", 1), ("S", b"early", 6), ("F", b"", 1), ("P", b"data", 4), ("", b"", 0)]
)
def test_without_one_everything_in_the_segment_is_acknowledged(
    version: int, flags: str, payload: bytes, length: int
) -> None:
    seen = reset_of(packet_of(ip(version), tcp(seq=1000, flags=flags), payload))

    assert (seen[TCP].flags, seen[TCP].seq, seen[TCP].ack) == ("RA", 0, 1000 + length)


def test_sequence_numbers_wrap_around() -> None:
    assert reset_of(packet_of(ip(), tcp(seq=0xFFFFFFFF, flags="S")))[TCP].ack == 0


def test_a_run_of_segments_gets_one_reset() -> None:
    assert reset_of(super_packet(ip(), tcp(ack=9), pattern(4000), segment_size=1000))[TCP].seq == 9


def test_extension_headers_are_skipped() -> None:
    assert reset_of(packet_of(ip(6), IPv6ExtHdrHopByHop(), tcp(ack=9), b"data"))[TCP].seq == 9


@pytest.mark.parametrize(
    "data",
    [
        built(ip(4), tcp(flags="R")),
        built(ip(6), tcp(flags="RA")),
        built(ip(4), udp()),
        built(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF"), tcp(), bytes(16)),
        built(IP(src="10.0.0.1", dst="224.0.0.1"), tcp()),
        built(IP(src="10.0.0.1", dst="255.255.255.255"), tcp()),
        built(IP(src="127.0.0.1", dst="10.0.0.2"), tcp()),
        built(IPv6(src="::", dst="fd00::1"), tcp()),
        built(IPv6(src="::1", dst="fd00::1"), tcp()),
        built(IPv6(src="fd00::1", dst="ff02::1"), tcp()),
    ],
)
def test_resets_other_protocols_and_other_addresses_get_none(data: bytearray) -> None:
    packet = parse(data)

    assert packet is not None
    assert tcp_reset(packet) is None

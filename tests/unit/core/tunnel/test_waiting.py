"""Waiting packets: bounded, in order, without duplicates, and with only the latest attempt of a TCP connection."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from firezone_tunnel.core.tunnel.waiting import CAPACITY, WaitingPackets
from tests.unit.core.packet.packets import IP, TCP, IPv6, built, udp


def test_packets_are_taken_once_in_their_order() -> None:
    waiting = WaitingPackets()
    for number in range(10):
        waiting.add(_datagram(number))

    assert len(waiting) == 10
    assert [_number(packet) for packet in waiting.take()] == list(range(10))
    assert waiting.take() == []
    assert len(waiting) == 0


def test_of_more_than_128_packets_the_oldest_are_dropped() -> None:
    waiting = WaitingPackets()
    gone = [waiting.add(_datagram(number)) for number in range(CAPACITY + 5)]

    assert gone[:CAPACITY] == [None] * CAPACITY
    assert [_number(packet) for packet in gone[CAPACITY:] if packet is not None] == list(range(5))
    assert [_number(packet) for packet in waiting.take()] == list(range(5, CAPACITY + 5))


def test_a_duplicate_is_not_stored() -> None:
    waiting = WaitingPackets()
    for number in (1, 2, 1, 1, 3, 2):
        waiting.add(_datagram(number))

    assert [_number(packet) for packet in waiting.take()] == [1, 2, 3]


def test_duplicates_drop_nothing_when_the_queue_is_full() -> None:
    waiting = WaitingPackets()
    gone = [waiting.add(_datagram(number)) for number in [*range(CAPACITY), *range(CAPACITY)]]

    assert gone == [None] * 2 * CAPACITY
    assert len(waiting) == CAPACITY


def test_a_taken_packet_may_wait_again() -> None:
    waiting = WaitingPackets()
    waiting.add(_datagram(1))
    waiting.take()
    waiting.add(_datagram(1))

    assert len(waiting) == 1


def test_a_packet_is_kept_although_its_memory_is_reused() -> None:
    waiting = WaitingPackets()
    packet = _datagram(7)
    waiting.add(packet)
    packet.data[:] = bytes(len(packet.data))

    assert [_number(kept) for kept in waiting.take()] == [7]


@pytest.mark.parametrize("version", [4, 6])
def test_a_repeated_syn_replaces_the_earlier_one(version: int) -> None:
    waiting = WaitingPackets()
    waiting.add(_tcp(version, timestamp=1))
    waiting.add(_datagram(1))
    waiting.add(_tcp(version, timestamp=2))

    first, second = waiting.take()
    assert bytes(first.data) == bytes(_tcp(version, timestamp=2).data)
    assert _number(second) == 1


@pytest.mark.parametrize(
    "other",
    [{"seq": 2}, {"sport": 40001}, {"dport": 81}, {"flags": "SA"}, {"flags": "A"}, {"last": 9}],
)
def test_another_packet_of_the_connection_waits_beside_the_syn(other: dict[str, Any]) -> None:
    waiting = WaitingPackets()
    waiting.add(_tcp(timestamp=1))
    waiting.add(_tcp(timestamp=2, **other))

    assert len(waiting) == 2


def test_acknowledgements_do_not_replace_each_other() -> None:
    waiting = WaitingPackets()
    waiting.add(_tcp(flags="SA", timestamp=1))
    waiting.add(_tcp(flags="SA", timestamp=2))
    waiting.add(_tcp(flags="A", timestamp=1))
    waiting.add(_tcp(flags="A", timestamp=2))

    assert len(waiting) == 4


@given(st.lists(st.integers(0, 200), max_size=400))
def test_the_latest_distinct_packets_are_kept(numbers: list[int]) -> None:
    waiting = WaitingPackets()
    expected: list[int] = []
    for number in numbers:
        waiting.add(_DATAGRAMS[number])
        if number not in expected:
            expected = [*expected, number][-CAPACITY:]

    assert [_number(packet) for packet in waiting.take()] == expected


def _parsed(raw: bytes | bytearray) -> SuperPacket:
    packet = parse(bytearray(raw))
    assert packet is not None
    return packet


def _datagram(number: int) -> SuperPacket:
    return _parsed(built(IP(src="10.0.0.1", dst="10.0.0.2"), udp(), number.to_bytes(4, "big")))


def _number(packet: SuperPacket) -> int:
    return int.from_bytes(packet.data[28:32], "big")


def _tcp(
    version: int = 4,
    *,
    flags: str = "S",
    seq: int = 1,
    sport: int = 40000,
    dport: int = 80,
    timestamp: int = 1,
    last: int = 2,
) -> SuperPacket:
    """A TCP segment; retransmissions differ in their timestamp option."""
    header = IP(src="10.0.0.1", dst=f"10.0.0.{last}") if version == 4 else IPv6(src="fd00::1", dst=f"fd00::{last}")
    options = [("MSS", 1240), ("Timestamp", (timestamp, 0))]
    return _parsed(built(header, TCP(sport=sport, dport=dport, seq=seq, flags=flags, options=options)))


_DATAGRAMS = [_datagram(number) for number in range(201)]

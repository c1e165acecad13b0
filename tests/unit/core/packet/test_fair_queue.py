from __future__ import annotations

import pytest

from firezone_tunnel.core.packet.fair_queue import INTERVAL, MAX_BYTES, MAX_PACKETS, TARGET, FairQueue
from firezone_tunnel.core.packet.superpacket import SuperPacket
from tests.unit.core.packet.packets import ip, pattern, super_packet, tcp, udp

RUN = 60_000  # payload of a super-packet


def datagram(port: int = 53, size: int = 1000) -> SuperPacket:
    return super_packet(ip(), udp(port=port), pattern(size), segment_size=0)


def run(port: int = 80, version: int = 4) -> SuperPacket:
    return super_packet(ip(version), tcp(port=port), pattern(RUN), segment_size=1000)


def drain(queue: FairQueue, now: float) -> list[SuperPacket]:
    taken = []
    while (packet := queue.take(now)) is not None:
        taken.append(packet)
    return taken


def test_packets_of_a_flow_keep_their_order() -> None:
    queue = FairQueue()
    packets = [datagram() for _ in range(200)]
    for packet in packets:
        queue.add(packet, 0.0)

    assert drain(queue, 0.0) == packets
    assert len(queue) == 0


def test_a_flow_that_sends_little_does_not_wait_behind_one_that_sends_a_lot() -> None:
    queue = FairQueue()
    for _ in range(20):
        queue.add(run(), 0.0)
    for _ in range(3):
        queue.take(0.0)
    ping = datagram(size=50)

    queue.add(ping, 0.0)

    assert ping in [queue.take(0.0) for _ in range(2)]


def test_flows_take_turns_by_bytes() -> None:
    queue = FairQueue()
    for _ in range(5):
        queue.add(run(80), 0.0)
    for _ in range(300):
        queue.add(datagram(), 0.0)

    taken = [queue.take(0.0) for _ in range(130)]

    sizes = {port: sum(len(one.data) for one in taken if one and one.destination_port == port) for port in (53, 80)}
    assert abs(sizes[53] - sizes[80]) <= 2 * RUN


@pytest.mark.parametrize("count", [500, 1000])
@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1])
def test_a_burst_loses_nothing(count: int, seconds: float) -> None:
    queue = FairQueue()
    for _ in range(count):
        queue.add(datagram(size=1200), 0.0)

    taken = [queue.take(seconds * (index + 1) / count) for index in range(count)]

    assert None not in taken
    assert queue.dropped == 0


def test_a_flow_that_keeps_packets_waiting_loses_ever_more_of_them() -> None:
    queue = FairQueue()
    lost = [_load(queue, began=float(second)) for second in range(4)]

    assert 0 < lost[0] < lost[1] < lost[2] < lost[3]


def test_a_flow_that_has_slowed_down_loses_no_more() -> None:
    queue = FairQueue()
    _load(queue, began=0.0)
    drain(queue, 1.0)
    before = queue.dropped

    for index in range(100):
        queue.add(run(), 2.0 + index / 100)
        queue.take(2.0 + index / 100 + TARGET / 2)

    assert queue.dropped == before


def test_a_single_packet_is_never_dropped_however_long_it_waited() -> None:
    queue = FairQueue()
    for index in range(10):
        queue.add(run(), float(index))

        assert queue.take(index + 10 * INTERVAL) is not None


def test_other_flows_lose_nothing_to_one_that_is_late() -> None:
    queue = FairQueue()
    pings = 0
    for index in range(300):
        now = index / 100
        for packet in (run(), run(), datagram(size=50)):
            queue.add(packet, now)
        taken = [queue.take(now) for _ in range(2)]
        pings += sum(packet is not None and packet.destination_port == 53 for packet in taken)

    assert queue.dropped > 0
    assert pings == 300


def test_dropped_segments_are_counted() -> None:
    queue = FairQueue()
    _load(queue, began=0.0)

    assert queue.dropped % 60 == 0


@pytest.mark.parametrize(("size", "count"), [(RUN, MAX_BYTES // (RUN + 52) + 1), (50, MAX_PACKETS)])
def test_it_is_full_by_bytes_or_by_packets(size: int, count: int) -> None:
    queue = FairQueue()
    for index in range(count):
        assert not queue.is_full
        queue.add(run() if size == RUN else datagram(index, size), 0.0)

    assert queue.is_full
    drain(queue, 0.0)
    assert not queue.is_full


def test_flows_of_both_families_are_apart() -> None:
    queue = FairQueue()
    for _ in range(4):
        queue.add(run(), 0.0)
    queue.add(run(version=6), 0.0)

    assert [queue.take(0.0).version for _ in range(3)].count(6) == 1  # type: ignore[union-attr]


def test_cleared_it_is_empty() -> None:
    queue = FairQueue()
    queue.add(run(), 0.0)

    queue.clear()

    assert (len(queue), queue.take(0.0), queue.is_full) == (0, None, False)


def _load(queue: FairQueue, *, began: float) -> int:
    """A second of a flow that sends twice what is taken. Returns how many segments it lost."""
    before = queue.dropped
    for index in range(100):
        now = began + index / 100
        queue.add(run(), now)
        queue.add(run(), now)
        queue.take(now)
    return queue.dropped - before

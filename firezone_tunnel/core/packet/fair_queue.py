"""A queue of packets that is limited by time: FlowQueue-CoDel (RFC 8290).

A count does not limit the delay: a super-packet of 64 KiB takes as long as fifty datagrams. Here flows take turns, so
a flow that sends little does not wait behind one that sends a lot, and a flow whose packets have waited too long for a
while loses some, which slows a TCP sender down. A burst loses none.
"""

from __future__ import annotations

from collections import deque
from math import sqrt

from firezone_tunnel.core.packet.superpacket import SuperPacket

TARGET = 0.005  # seconds, RFC 8289, section 4.4: a wait that is too long if it lasts
INTERVAL = 0.1  # for as long as this: about a round trip through the internet
QUANTUM = 65_536  # bytes of a flow's turn: one super-packet
MAX_BYTES = 4 << 20
MAX_PACKETS = 4096


class FairQueue:
    """Packets by flow. Their data must stay valid until they are taken."""

    def __init__(self) -> None:
        self.dropped = 0
        """Packets on the wire that were dropped since the start, as they had waited too long."""
        self._bytes = 0
        self._packets = 0
        self._flows: dict[tuple[int, bytes, bytes, int, int], _Flow] = {}
        self._new: deque[_Flow] = deque()  # which have not had a turn since they were empty
        self._old: deque[_Flow] = deque()

    def __len__(self) -> int:
        return self._packets

    @property
    def is_full(self) -> bool:
        return self._bytes >= MAX_BYTES or self._packets >= MAX_PACKETS

    def add(self, packet: SuperPacket, now: float) -> None:
        """Add a packet even if the queue is full: that is the caller's to prevent."""
        key = (packet.protocol, packet.source, packet.destination, packet.source_port, packet.destination_port)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(key)
            self._new.append(flow)
        size = len(packet.data)
        flow.packets.append((packet, now))
        flow.size += size
        self._bytes += size
        self._packets += 1

    def take(self, now: float) -> SuperPacket | None:
        """The next packet; None if there is none."""
        while True:
            turns = self._new or self._old
            if not turns:
                return None
            flow = turns[0]
            if flow.deficit <= 0:
                flow.deficit += QUANTUM
                turns.popleft()
                self._old.append(flow)
                continue
            packet = self._next_of(flow, now)
            if packet is not None:
                flow.deficit -= len(packet.data)
                return packet
            turns.popleft()
            if turns is self._new and self._old:  # it may not come back as a new one at once (RFC 8290, 4.2)
                self._old.append(flow)
            else:
                del self._flows[flow.key]

    def clear(self) -> None:
        self._flows.clear()
        self._new.clear()
        self._old.clear()
        self._bytes = self._packets = 0

    def _next_of(self, flow: _Flow, now: float) -> SuperPacket | None:
        """The first packet of a flow that is not to be dropped (RFC 8289, section 5)."""
        packet = self._pop(flow, now)
        if not flow.is_late:
            flow.is_dropping = False
            return packet
        if not flow.is_dropping:
            self._drop(packet)
            packet = self._pop(flow, now)
            flow.is_dropping = True
            # Soon after the last time, go on with the rate that was enough then.
            needed = flow.drops - flow.drops_before
            flow.drops = needed if needed > 1 and now - flow.drop_next < 16 * INTERVAL else 1
            flow.drops_before = flow.drops
            flow.drop_next = now + INTERVAL / sqrt(flow.drops)
            return packet
        while flow.is_dropping and now >= flow.drop_next:
            self._drop(packet)
            flow.drops += 1
            packet = self._pop(flow, now)
            if flow.is_late:
                flow.drop_next += INTERVAL / sqrt(flow.drops)
            else:
                flow.is_dropping = False
        return packet

    def _pop(self, flow: _Flow, now: float) -> SuperPacket | None:
        """The first packet of a flow. Notes whether packets have been late for a whole interval."""
        if not flow.packets:
            flow.late_at = 0.0
            flow.is_late = False
            return None
        packet, added_at = flow.packets.popleft()
        size = len(packet.data)
        flow.size -= size
        self._bytes -= size
        self._packets -= 1
        if now - added_at < TARGET or flow.size <= QUANTUM:  # less than a super-packet behind it keeps nobody waiting
            flow.late_at = 0.0
            flow.is_late = False
        elif not flow.late_at:
            flow.late_at = now + INTERVAL
        else:
            flow.is_late = now >= flow.late_at
        return packet

    def _drop(self, packet: SuperPacket | None) -> None:
        if packet is not None:
            self.dropped += packet.segments


class _Flow:
    """One flow's packets, and the state of its CoDel."""

    __slots__ = (
        "deficit",
        "drop_next",
        "drops",
        "drops_before",
        "is_dropping",
        "is_late",
        "key",
        "late_at",
        "packets",
        "size",
    )

    def __init__(self, key: tuple[int, bytes, bytes, int, int]) -> None:
        self.key = key
        self.packets: deque[tuple[SuperPacket, float]] = deque()  # and when they were added
        self.size = 0
        self.deficit = QUANTUM
        self.late_at = 0.0  # when packets that are late now have been so for an interval; 0: they aren't
        self.is_late = False
        self.is_dropping = False
        self.drop_next = 0.0
        self.drops = 0
        self.drops_before = 0

"""Packets that wait for a way to their resource (docs/protocol/data-plane.md, 4.4)."""

from __future__ import annotations

from firezone_tunnel.core.packet.superpacket import TCP, SuperPacket

CAPACITY = 128  # docs/protocol/data-plane.md, 4.4
_SYN, _ACK = 0x02, 0x10


class WaitingPackets:
    """At most 128 packets, in order, copied; the oldest go first when there are more.

    A packet that waits already is not stored again, and a repeated TCP SYN replaces the earlier one: an application
    that tries again must not be answered twice.
    """

    __slots__ = ("_packets",)

    def __init__(self) -> None:
        self._packets: list[SuperPacket] = []

    def add(self, packet: SuperPacket) -> SuperPacket | None:
        """Returns the packet that had to go for it, if one had to."""
        syn = _syn(packet)
        for index, waiting in enumerate(self._packets):
            if waiting.data == packet.data:
                return None
            if syn is not None and syn == _syn(waiting):
                self._packets[index] = packet.copy()
                return None
        oldest = self._packets.pop(0) if len(self._packets) == CAPACITY else None
        self._packets.append(packet.copy())
        return oldest

    def take(self) -> list[SuperPacket]:
        """All of them, the oldest first; none are left."""
        packets, self._packets = self._packets, []
        return packets

    def __len__(self) -> int:
        return len(self._packets)


def _syn(packet: SuperPacket) -> tuple[bytes, bytes, int, int, bytes] | None:
    """The key that a TCP SYN and its retransmissions share; None for every other packet."""
    if packet.protocol != TCP or packet.fragment:
        return None
    start = packet.transport_offset
    if packet.data[start + 13] & (_SYN | _ACK) != _SYN:
        return None
    sequence = bytes(packet.data[start + 4 : start + 8])
    return packet.source, packet.destination, packet.source_port, packet.destination_port, sequence

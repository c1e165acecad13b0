"""The rehearsal of a packet's way."""

from __future__ import annotations

from firezone_tunnel.packet.checksum import checksum
from firezone_tunnel.packet.superpacket import ICMP, from_virtio
from firezone_tunnel.runtime import rehearsal


def test_an_ordinary_ping_goes_all_the_way() -> None:
    packet = from_virtio(rehearsal._FRAME)
    assert packet is not None
    assert (packet.protocol, len(packet.data)) == (ICMP, 84)
    assert checksum(packet.data[:20]) == 0
    assert checksum(packet.data[20:]) == 0

    rehearsal.rehearse()
    rehearsal.rehearse()
    assert rehearsal._BUFFER.view[16:100] == packet.data  # what was sealed was opened

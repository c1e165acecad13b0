"""Change fields of packets in place: congestion marks."""

from __future__ import annotations

import struct

from firezone_tunnel.core.packet.checksum import update
from firezone_tunnel.core.packet.superpacket import SuperPacket

ECT_1 = 1  # RFC 3168, section 5
ECT_0 = 2
CE = 3


def mark_congestion(packet: SuperPacket) -> None:
    """Copy a congestion mark (CE) from the outer packet to the inner packet, in place (RFC 6040).

    Packets that are not ECN-capable are left unchanged (docs/protocol/data-plane.md, 7.3).
    """
    if packet.ecn not in {ECT_0, ECT_1}:
        return
    data = packet.data
    if packet.version == 6:
        data[1] |= CE << 4
    else:
        old = _U16.unpack_from(data, 0)[0]
        data[1] |= CE
        _U16.pack_into(data, 10, update(_U16.unpack_from(data, 10)[0], old, old | CE))
    packet.ecn = CE


_U16 = struct.Struct(">H")

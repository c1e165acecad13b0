from __future__ import annotations

import pytest

from firezone_tunnel.core.packet.rewrite import mark_congestion
from firezone_tunnel.core.packet.superpacket import parse
from tests.unit.core.packet.packets import built, ip, tcp


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("inner", "expected"), [(0, 0), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("dscp", [0, 0xB8, 0xFC])
def test_a_congestion_mark_is_set_on_ecn_capable_packets(version: int, inner: int, expected: int, dscp: int) -> None:
    packet = parse(built(ip(version, traffic_class=dscp | inner), tcp(), b"data"))
    assert packet is not None

    mark_congestion(packet)

    assert bytes(packet.data) == built(ip(version, traffic_class=dscp | expected), tcp(), b"data")
    assert packet.ecn == expected

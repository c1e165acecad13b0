"""Which gateway an address belongs to, however the portal gives addresses away."""

from __future__ import annotations

import ipaddress

from firezone_tunnel.core.tunnel.gateways import Gateways


def test_a_gateway_that_gets_another_address_does_not_take_its_old_one_from_who_has_it_now() -> None:
    gateways = Gateways()
    gateways.upsert("first", "site", "100.64.0.1", "fd00:2021:1111::1")
    second = gateways.upsert("second", "site", "100.64.0.1", "fd00:2021:1111::1")

    first = gateways.upsert("first", "site", "100.64.0.2", "fd00:2021:1111::2")

    assert gateways.at(packed("100.64.0.1")) is gateways.at(packed("fd00:2021:1111::1")) is second
    assert gateways.at(packed("100.64.0.2")) is first


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed

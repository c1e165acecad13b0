"""Addresses of gateways that the portal reassigns."""

from __future__ import annotations

import ipaddress

from firezone_tunnel.core.tunnel.gateways import Gateways


def test_a_gateway_that_changes_its_address_leaves_its_former_address_to_the_new_owner() -> None:
    gateways = Gateways()
    gateways.upsert("first", "site", "100.64.0.1", "fd00:2021:1111::1")
    second = gateways.upsert("second", "site", "100.64.0.1", "fd00:2021:1111::1")

    first = gateways.upsert("first", "site", "100.64.0.2", "fd00:2021:1111::2")

    assert gateways.at(packed("100.64.0.1")) is gateways.at(packed("fd00:2021:1111::1")) is second
    assert gateways.at(packed("100.64.0.2")) is first


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed

"""The resource of an address, connections that a change voids, and the resources as a front end shows them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.client import CidrResource, DnsResource, InternetResource
from firezone_tunnel.core.messages.common import Filter, Site
from firezone_tunnel.core.sansio import Timeout
from firezone_tunnel.core.tunnel.filter import PERMIT_ALL, Rules
from firezone_tunnel.core.tunnel.resources import (
    MAX_CACHED_DESTINATIONS,
    OFFLINE_FOR,
    ResourceTable,
    SiteStatuses,
    Status,
)

_HQ, _LAB = Site(id="hq", name="HQ"), Site(id="lab", name="Lab")

_networks = st.builds(
    lambda number, bits: str(ipaddress.IPv4Network((number & 0x0A03_0303, bits), strict=False)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
_ids = st.sampled_from("abcdef")


@given(
    st.lists(st.tuples(_ids, _networks), max_size=10),
    st.sets(_ids),
    st.integers(0, 2**32 - 1).map(lambda number: number & 0x0A03_0303),
)
def test_an_address_belongs_to_the_most_specific_resource(
    entries: list[tuple[str, str]], connected: set[str], number: int
) -> None:
    table = ResourceTable(is_connected=connected.__contains__)
    table.set(_cidr(resource_id, network) for resource_id, network in entries)
    latest = dict(entries)
    address = ipaddress.IPv4Address(number)

    found = table.lookup(address.packed)

    holding = sorted(
        (ipaddress.ip_network(network).prefixlen, resource_id)
        for resource_id, network in latest.items()
        if address in ipaddress.ip_network(network)
    )
    if not holding:
        assert found is None
        return
    rivals = [resource_id for length, resource_id in holding if length == holding[-1][0]]  # by id
    in_use = [resource_id for resource_id in rivals if resource_id in connected]
    assert found is not None
    assert found.id == (in_use[0] if in_use else rivals[-1])


def test_of_resources_with_the_same_network_one_in_use_is_not_displaced() -> None:
    connected: set[str] = set()
    table = ResourceTable(is_connected=connected.__contains__)
    table.add(_cidr("b", "10.0.0.0/8"))
    connected.add("b")
    table.add(_cidr("c", "10.0.0.0/8"))
    assert _found(table, "10.0.0.1") == "b"
    table.add(_cidr("a", "10.0.0.0/8"))
    assert _found(table, "10.0.0.1") == "b"

    table.remove("b")

    assert _found(table, "10.0.0.1") == "c"


def test_when_the_occupant_is_no_longer_connected_the_later_id_takes_over_with_the_next_change() -> None:
    connected = {"a"}
    table = ResourceTable(is_connected=connected.__contains__)
    table.set([_cidr("a", "10.0.0.0/8"), _cidr("b", "10.0.0.0/8")])
    assert _found(table, "10.0.0.1") == "a"

    connected.clear()
    table.add(_cidr("c", "192.168.0.0/16"))

    assert _found(table, "10.0.0.1") == "b"


@pytest.mark.parametrize(
    "address", ["100.64.0.7", "fd00:2021:1111::7", "224.0.0.22", "255.255.255.255", "ff02::2", "239.1.1.1"]
)
def test_the_tunnels_own_addresses_and_multicast_belong_to_no_resource(address: str) -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.set([_cidr("a", "0.0.0.0/0"), _cidr("b", "::/0")])

    assert table.lookup(ipaddress.ip_address(address).packed) is None
    assert _found(table, "192.0.2.1") == "a"
    assert _found(table, "2001:db8::1") == "b"


def test_a_cached_result_is_dropped_when_resources_change() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_cidr("a", "10.0.0.0/8"))
    assert _found(table, "10.0.0.1") == "a"
    table.add(_cidr("b", "10.0.0.0/24"))
    assert _found(table, "10.0.0.1") == "b"
    table.remove("b")
    assert _found(table, "10.0.0.1") == "a"
    table.set([])
    assert _found(table, "10.0.0.1") is None


def test_the_cache_of_destinations_is_bounded() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_cidr("a", "10.0.0.0/8"))
    for number in range(3 * MAX_CACHED_DESTINATIONS):
        table.lookup(b"\x0a" + number.to_bytes(3, "big"))

    assert table.lookup.cache_info().currsize == MAX_CACHED_DESTINATIONS


def test_a_resource_without_a_valid_network_is_not_routed_but_shown() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.set([_cidr("a", "10.0.0.1/8"), _dns("b", "*.example.com"), _internet("c")])

    assert table.networks() == []
    assert len(table.views(SiteStatuses())) == 3


# Void connections


def test_a_list_replaces_all_resources_and_voids_only_those_gone_or_moved() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.set([_cidr("a", "10.0.0.0/8"), _cidr("b", "10.1.0.0/16"), _cidr("c", "10.2.0.0/16")])

    void = table.set([_cidr("a", "10.0.0.0/8", name="renamed"), _cidr("c", "10.3.0.0/16"), _cidr("d", "10.4.0.0/16")])

    assert void == ["b", "c"]
    assert [entry.id for entry in table.entries()] == ["a", "c", "d"]
    entry = table.get("a")
    assert entry is not None
    assert entry.resource.name == "renamed"


@pytest.mark.parametrize(
    ("before", "after", "is_void"),
    [
        ({"address": "10.0.0.0/8"}, {"address": "10.0.0.0/8"}, False),
        ({"address": "10.0.0.0/8"}, {"address": "10.0.0.0/9"}, True),
        ({"name": "one"}, {"name": "two"}, False),
        ({"address_description": None}, {"address_description": "text"}, False),
        ({"filters": []}, {"filters": [Filter(protocol="icmp")]}, False),
        ({"gateway_groups": [_HQ]}, {"gateway_groups": [_LAB]}, True),
        ({"gateway_groups": [_HQ, _LAB]}, {"gateway_groups": [_LAB, _HQ]}, False),
        ({"gateway_groups": [_HQ]}, {"gateway_groups": [Site(id="hq", name="Headquarters")]}, False),
    ],
)
def test_only_another_address_or_site_voids_a_connection(
    before: dict[str, Any], after: dict[str, Any], is_void: bool
) -> None:
    table = ResourceTable(is_connected=lambda _: False)
    assert not table.add(_cidr("a", **before))

    assert table.add(_cidr("a", **after)) == is_void


def test_another_ip_stack_or_type_voids_a_connection() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_dns("a", "example.com"))

    assert not table.add(_dns("a", "example.com"))
    assert table.add(_dns("a", "example.com", ip_stack="ipv4_only"))
    assert table.add(_cidr("a", "10.0.0.0/8"))


def test_an_updated_resource_keeps_the_time_of_its_last_use() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_cidr("a", "10.0.0.0/8"))
    entry = table.get("a")
    assert entry is not None
    entry.used_at = 42.0

    table.add(_cidr("a", "10.0.0.0/8", name="renamed"))

    again = table.get("a")
    assert again is not None
    assert again.used_at == 42.0


def test_remove_returns_whether_the_resource_was_present() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_cidr("a", "10.0.0.0/8"))

    assert table.remove("a")
    assert not table.remove("a")
    assert table.get("a") is None


def test_routes_are_sorted_and_distinct() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.set(
        _cidr(str(number), network)
        for number, network in enumerate(
            ["::/0", "10.0.0.0/9", "10.0.0.0/8", "10.0.0.0/8", "2001:db8::/32", "9.0.0.0/8"]
        )
    )

    assert [str(network) for network in table.networks()] == [
        "9.0.0.0/8",
        "10.0.0.0/8",
        "10.0.0.0/9",
        "::/0",
        "2001:db8::/32",
    ]


def test_a_resource_has_the_rules_of_all_resources_that_contain_it() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    web, icmp = Filter(protocol="tcp", port_range_start=80, port_range_end=80), Filter(protocol="icmp")
    table.set([_cidr("inner", "10.1.0.0/16", filters=[web]), _cidr("outer", "10.0.0.0/8", filters=[icmp])])
    inner, outer = table.get("inner"), table.get("outer")
    assert inner is not None and outer is not None

    assert inner.rules == Rules(tcp=((80, 80),), icmp=True)
    assert outer.rules == Rules(icmp=True)
    table.add(_cidr("outer", "10.0.0.0/8", filters=[]))
    assert inner.rules == PERMIT_ALL


# Views


def test_resources_are_sorted_as_upstream_sorts_them() -> None:
    names = [
        "😀",
        "ifconfig.net",
        "Metabase",
        "Example",
        "9",
        "*.test.net",
        "Metabase",
        "10",
        "Fast.com",
        "Cloudflare DNS",
    ]
    table = ResourceTable(is_connected=lambda _: False)
    table.set(
        [
            *(_dns(f"{9 - number}", "example.com", name=name) for number, name in enumerate(names)),
            _internet("zzz"),
        ]
    )

    views = table.views(SiteStatuses())

    assert [view.name for view in views] == [
        "Internet Resource",
        "*.test.net",
        "10",
        "9",
        "Cloudflare DNS",
        "Example",
        "Fast.com",
        "Metabase",
        "Metabase",
        "ifconfig.net",
        "😀",
    ]
    assert [view.id for view in views if view.name == "Metabase"] == ["3", "7"]


def test_a_view_has_the_fields_of_its_kind() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.set([_cidr("a", "10.0.0.0/8", address_description="text"), _dns("b", "*.example.com"), _internet("c")])
    internet, cidr, dns = table.views(SiteStatuses())

    assert (internet.kind, internet.name, internet.address) == ("internet", "Internet Resource", None)
    assert (cidr.kind, cidr.address, cidr.address_description) == ("cidr", "10.0.0.0/8", "text")
    assert (dns.kind, dns.address, dns.sites) == ("dns", "*.example.com", (_HQ,))


def test_a_site_is_online_while_one_of_its_gateways_is_connected() -> None:
    sites = SiteStatuses()
    assert sites.status("hq") is Status.UNKNOWN

    sites.connected("hq", "gateway 1")
    sites.connected("hq", "gateway 2")
    sites.disconnected("gateway 1")
    assert sites.status("hq") is Status.ONLINE
    sites.disconnected("gateway 2")

    assert sites.status("hq") is Status.UNKNOWN
    sites.disconnected("gateway 3")


def test_a_site_that_was_offline_is_forgotten_after_5_minutes_or_once_connected() -> None:
    sites = SiteStatuses()
    sites.offline(["hq", "lab"], 100.0)
    assert sites.status("hq") is sites.status("lab") is Status.OFFLINE
    assert sites.next_timeout() == Timeout(100.0 + OFFLINE_FOR, "offline site to forget")

    sites.connected("lab", "gateway 1")
    assert sites.status("lab") is Status.ONLINE
    assert not sites.handle_timeout(100.0 + OFFLINE_FOR - 1.0)
    assert sites.handle_timeout(100.0 + OFFLINE_FOR)

    assert sites.status("hq") is Status.UNKNOWN
    assert sites.next_timeout() is None


@pytest.mark.parametrize(
    ("online", "offline", "status"),
    [
        ([], [], Status.UNKNOWN),
        (["hq"], [], Status.ONLINE),
        (["hq"], ["lab"], Status.ONLINE),
        ([], ["lab"], Status.UNKNOWN),
        ([], ["hq", "lab"], Status.OFFLINE),
    ],
)
def test_a_resource_is_online_with_any_of_its_sites_and_offline_with_all(
    online: list[str], offline: list[str], status: Status
) -> None:
    sites = SiteStatuses()
    sites.offline(offline, 0.0)
    for site in online:
        sites.connected(site, f"gateway of {site}")
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_cidr("a", "10.0.0.0/8", gateway_groups=[_HQ, _LAB]))

    (view,) = table.views(sites)

    assert view.status is status


def test_a_resource_without_sites_is_offline() -> None:
    table = ResourceTable(is_connected=lambda _: False)
    table.add(_cidr("a", "10.0.0.0/8", gateway_groups=[]))

    (view,) = table.views(SiteStatuses())

    assert view.status is Status.OFFLINE


def _cidr(resource_id: str, address: str = "10.0.0.0/8", **fields: Any) -> CidrResource:
    return CidrResource(id=resource_id, address=address, **{"name": "Lab", "gateway_groups": [_HQ], **fields})


def _dns(resource_id: str, address: str, **fields: Any) -> DnsResource:
    return DnsResource(id=resource_id, address=address, **{"name": "Wiki", "gateway_groups": [_HQ], **fields})


def _internet(resource_id: str) -> InternetResource:
    return InternetResource(id=resource_id, name="what the portal calls it", gateway_groups=[_HQ])


def _found(table: ResourceTable, address: str) -> str | None:
    entry = table.lookup(ipaddress.ip_address(address).packed)
    return None if entry is None else entry.id

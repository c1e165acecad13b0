"""The resource of an address, connections that a change voids, and the resources as a front end shows them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.client import CidrResource, DnsResource, InternetResource
from firezone_tunnel.core.messages.common import Filter, Network, Site
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

# Few distinct bits, so that networks overlap and hold the addresses.
_ipv4 = st.integers(0, 2**32 - 1).map(lambda number: number & 0x0A03_0303)
_ipv6 = st.integers(0, 2**128 - 1).map(lambda number: 0x20 << 120 | number & 0x0303)
_addresses = st.one_of(_ipv4.map(ipaddress.IPv4Address), _ipv6.map(ipaddress.IPv6Address))
_networks = st.one_of(
    st.builds(lambda number, bits: str(ipaddress.IPv4Network((number, bits), strict=False)), _ipv4, st.integers(0, 32)),
    st.builds(
        lambda number, bits: str(ipaddress.IPv6Network((number, bits), strict=False)),
        _ipv6,
        st.sampled_from([0, 112, 120, 127, 128]),
    ),
)
_ids = st.sampled_from("abcdef")
_resources = st.builds(
    lambda rid, address, name, filters: _cidr(rid, address, name=name, filters=filters),
    _ids,
    _networks,
    st.sampled_from(["Lab", "Office"]),
    st.sampled_from([[], [Filter(protocol="icmp")]]),
)
_changes = st.one_of(
    st.tuples(st.just("add"), _resources),
    st.tuples(st.just("remove"), _ids),
    st.tuples(st.just("connected"), _ids),
    st.tuples(st.just("set"), st.lists(_resources, max_size=6)),
)


@given(st.lists(_changes, max_size=20), st.lists(_addresses, min_size=1, max_size=5))
def test_after_any_changes_an_address_has_the_resources_that_a_scan_of_all_finds(
    changes: list[Any], addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address]
) -> None:
    table, model = ResourceTable(SiteStatuses()), _Model()
    for change, argument in changes:
        result = getattr(table, change)(argument) if change != "connected" or argument in model.resources else None
        getattr(model, change)(argument, result)

        for address in addresses:
            assert [entry.resource for entry in table.lookup(address.packed)] == model.holding(address)
        assert table.networks() == model.networks()
        assert [view.id for view in table.views()] == model.shown()
        assert {entry.id: entry.resource for entry in table.entries()} == model.resources
        assert all(entry.rules == Rules.of(entry.resource.filters) for entry in table.entries())


class _Model:
    """A table of resources that does everything anew."""

    def __init__(self) -> None:
        self.resources: dict[str, CidrResource] = {}
        self.flows: list[str] = []

    def set(self, resources: list[CidrResource], void: list[str]) -> None:
        wanted = {resource.id: resource for resource in resources}
        moved = [one.id for one in wanted.values() if self._is_elsewhere(one)]
        assert sorted(void) == sorted([rid for rid in self.resources if rid not in wanted] + moved)
        self.resources = wanted
        self.flows = [rid for rid in self.flows if rid not in void]

    def add(self, resource: CidrResource, is_void: bool) -> None:
        assert is_void == self._is_elsewhere(resource)
        self.resources[resource.id] = resource
        if is_void and resource.id in self.flows:
            self.flows.remove(resource.id)

    def remove(self, rid: str, was_there: bool) -> None:
        assert was_there == (rid in self.resources)
        self.resources.pop(rid, None)
        self.flows = [one for one in self.flows if one != rid]

    def connected(self, rid: str, _: None) -> None:
        if rid in self.resources:
            self.flows = [*(one for one in self.flows if one != rid), rid]

    def holding(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[CidrResource]:
        found = [one for one in self.resources.values() if address in ipaddress.ip_network(one.address)]
        found.sort(key=lambda one: one.id, reverse=True)
        found.sort(key=lambda one: self.flows.index(one.id) if one.id in self.flows else len(self.flows))
        return sorted(found, key=lambda one: -ipaddress.ip_network(one.address).prefixlen)

    def networks(self) -> list[Network]:
        distinct = {ipaddress.ip_network(one.address) for one in self.resources.values()}
        return sorted(
            distinct, key=lambda network: (network.version, network.network_address.packed, network.prefixlen)
        )

    def shown(self) -> list[str]:
        return [one.id for one in sorted(self.resources.values(), key=lambda one: (one.name, one.id))]

    def _is_elsewhere(self, resource: CidrResource) -> bool:
        before = self.resources.get(resource.id)
        return before is not None and before.address != resource.address


def test_of_resources_with_the_same_network_one_in_use_is_not_displaced() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_cidr("b", "10.0.0.0/8"))
    table.connected("b")
    table.add(_cidr("c", "10.0.0.0/8"))
    table.add(_cidr("a", "10.0.0.0/8"))
    assert _found(table, "10.0.0.1") == ["b", "c", "a"]

    table.remove("b")

    assert _found(table, "10.0.0.1") == ["c", "a"]


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_of_resources_with_the_same_network_the_one_in_use_for_the_longest_time_comes_first(order: str) -> None:
    """A connection through it goes on when another of them gets a flow for another port."""
    table = ResourceTable(SiteStatuses())
    table.set(_cidr(rid, "10.0.0.0/8") for rid in "abcd")

    for rid in order:
        table.connected(rid)

    assert _found(table, "10.0.0.1") == [*order, "d"]


def test_when_the_resource_in_use_is_disconnected_the_later_id_takes_over() -> None:
    table = ResourceTable(SiteStatuses())
    table.set([_cidr("a", "10.0.0.0/8"), _cidr("b", "10.0.0.0/8")])
    table.connected("a")
    assert _found(table, "10.0.0.1") == ["a", "b"]

    table.disconnected("a")

    assert _found(table, "10.0.0.1") == ["b", "a"]


@pytest.mark.parametrize(
    "address", ["100.64.0.7", "fd00:2021:1111::7", "224.0.0.22", "255.255.255.255", "ff02::2", "239.1.1.1"]
)
def test_the_tunnels_own_addresses_and_multicast_belong_to_no_resource(address: str) -> None:
    table = ResourceTable(SiteStatuses())
    table.set([_cidr("a", "0.0.0.0/0"), _cidr("b", "::/0")])

    assert _found(table, address) == []
    assert _found(table, "192.0.2.1") == ["a"]
    assert _found(table, "2001:db8::1") == ["b"]


def test_a_cached_result_is_dropped_when_resources_change() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_cidr("a", "10.0.0.0/8"))
    assert _found(table, "10.0.0.1") == ["a"]
    table.add(_cidr("b", "10.0.0.0/24"))
    assert _found(table, "10.0.0.1") == ["b", "a"]
    table.remove("b")
    assert _found(table, "10.0.0.1") == ["a"]
    table.set([])
    assert _found(table, "10.0.0.1") == []


def test_the_cache_of_destinations_is_bounded() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_cidr("a", "10.0.0.0/8"))
    for number in range(3 * MAX_CACHED_DESTINATIONS):
        table.lookup(b"\x0a" + number.to_bytes(3, "big"))

    assert table.lookup.cache_info().currsize == MAX_CACHED_DESTINATIONS


def test_a_resource_without_a_valid_network_is_not_routed_but_shown() -> None:
    table = ResourceTable(SiteStatuses())
    table.set([_cidr("a", "10.0.0.1/8"), _dns("b", "*.example.com"), _internet("c")])

    assert table.networks() == []
    assert len(table.views()) == 3


# Void connections


def test_a_list_replaces_all_resources_and_voids_only_those_gone_or_moved() -> None:
    table = ResourceTable(SiteStatuses())
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
    table = ResourceTable(SiteStatuses())
    assert not table.add(_cidr("a", **before))

    assert table.add(_cidr("a", **after)) == is_void


def test_another_ip_stack_or_type_voids_a_connection() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_dns("a", "example.com"))

    assert not table.add(_dns("a", "example.com"))
    assert table.add(_dns("a", "example.com", ip_stack="ipv4_only"))
    assert table.add(_cidr("a", "10.0.0.0/8"))


def test_an_updated_resource_keeps_the_time_of_its_last_use() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_cidr("a", "10.0.0.0/8"))
    entry = table.get("a")
    assert entry is not None
    entry.used_at = 42.0

    table.add(_cidr("a", "10.0.0.0/8", name="renamed"))

    again = table.get("a")
    assert again is not None
    assert again.used_at == 42.0


def test_remove_returns_whether_the_resource_was_present() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_cidr("a", "10.0.0.0/8"))

    assert table.remove("a")
    assert not table.remove("a")
    assert table.get("a") is None


def test_routes_are_sorted_and_distinct() -> None:
    table = ResourceTable(SiteStatuses())
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


def test_a_resource_has_only_its_own_rules_which_change_with_it() -> None:
    table = ResourceTable(SiteStatuses())
    web, icmp = Filter(protocol="tcp", port_range_start=80, port_range_end=80), Filter(protocol="icmp")
    table.set([_cidr("inner", "10.1.0.0/16", filters=[web]), _cidr("outer", "10.0.0.0/8", filters=[icmp])])
    inner, outer = table.lookup(bytes((10, 1, 0, 1)))

    assert (inner.rules, outer.rules) == (Rules(tcp=((80, 80),)), Rules(icmp=True))
    table.add(_cidr("inner", "10.1.0.0/16", filters=[]))
    assert (inner.rules, outer.rules) == (PERMIT_ALL, Rules(icmp=True))


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
    table = ResourceTable(SiteStatuses())
    table.set(
        [
            *(_dns(f"{9 - number}", "example.com", name=name) for number, name in enumerate(names)),
            _internet("zzz"),
        ]
    )

    views = table.views()

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
    table = ResourceTable(SiteStatuses())
    table.set([_cidr("a", "10.0.0.0/8", address_description="text"), _dns("b", "*.example.com"), _internet("c")])
    internet, cidr, dns = table.views()

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
    sites.handle_timeout(100.0 + OFFLINE_FOR - 1.0)
    assert sites.status("hq") is Status.OFFLINE
    sites.handle_timeout(100.0 + OFFLINE_FOR)

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
    table = ResourceTable(sites)
    table.add(_cidr("a", "10.0.0.0/8", gateway_groups=[_HQ, _LAB]))

    (view,) = table.views()

    assert view.status is status


def test_views_follow_the_status_of_their_sites() -> None:
    sites = SiteStatuses()
    table = ResourceTable(sites)
    table.set(
        [
            _cidr("a", gateway_groups=[_HQ]),
            _cidr("b", gateway_groups=[_LAB]),
            _cidr("c", gateway_groups=[_HQ, _LAB]),
        ]
    )

    def seen() -> list[Status]:
        return [view.status for view in table.views()]

    assert seen() == [Status.UNKNOWN] * 3
    sites.connected("hq", "gateway")
    sites.offline(["lab"], 0.0)
    assert seen() == [Status.ONLINE, Status.OFFLINE, Status.ONLINE]
    sites.disconnected("gateway")
    table.add(_cidr("d", gateway_groups=[_LAB]))
    assert seen() == [Status.UNKNOWN, Status.OFFLINE, Status.UNKNOWN, Status.OFFLINE]
    sites.handle_timeout(OFFLINE_FOR)
    assert seen() == [Status.UNKNOWN] * 4


def test_the_revision_changes_with_what_is_reported_and_only_then() -> None:
    sites = SiteStatuses()
    table = ResourceTable(sites)
    table.add(_cidr("a", filters=[]))
    revision = table.revision, sites.revision

    table.add(_cidr("a", filters=[]))
    table.set([_cidr("a", filters=[])])
    table.remove("b")
    table.connected("a")
    sites.disconnected("gateway")
    sites.handle_timeout(1e9)
    assert (table.revision, sites.revision) == revision

    table.add(_cidr("a", name="Else"))
    assert table.revision != revision[0]
    sites.connected("hq", "gateway")
    assert sites.revision == revision[1] + 1
    sites.connected("hq", "another gateway")
    sites.disconnected("gateway")
    assert sites.revision == revision[1] + 1


def test_a_resource_without_sites_is_offline() -> None:
    table = ResourceTable(SiteStatuses())
    table.add(_cidr("a", "10.0.0.0/8", gateway_groups=[]))

    (view,) = table.views()

    assert view.status is Status.OFFLINE


def _cidr(resource_id: str, address: str = "10.0.0.0/8", **fields: Any) -> CidrResource:
    return CidrResource(id=resource_id, address=address, **{"name": "Lab", "gateway_groups": [_HQ], **fields})


def _dns(resource_id: str, address: str, **fields: Any) -> DnsResource:
    return DnsResource(id=resource_id, address=address, **{"name": "Wiki", "gateway_groups": [_HQ], **fields})


def _internet(resource_id: str) -> InternetResource:
    return InternetResource(id=resource_id, name="what the portal calls it", gateway_groups=[_HQ])


def _found(table: ResourceTable, address: str) -> list[str]:
    return [entry.id for entry in table.lookup(ipaddress.ip_address(address).packed)]

"""Host candidates and uplinks, chosen from plain values."""

from __future__ import annotations

import attrs
import pytest

from firezone_tunnel.shell.host.addresses import (
    Address,
    HostSnapshot,
    Link,
    Route,
    Uplink,
    Uplinks,
    has_moved,
    host_candidates,
    uplinks,
)

OURS = "tun-firezone"
LOOPBACK = Link(1, "lo", is_loopback=True)
WIFI = Link(2, "wlan0")
CABLE = Link(3, "eth0")
DOCKER = Link(4, "docker0")
VPN = Link(5, "wg0")
TUN = Link(9, OURS)


def test_only_the_interface_that_leads_to_the_internet_gives_candidates() -> None:
    snapshot = HostSnapshot(
        links=(LOOPBACK, WIFI, CABLE),
        addresses=(Address(1, "127.0.0.1"), Address(2, "192.0.2.2"), Address(3, "198.51.100.3")),
        default_routes=(Route(3, is_ipv6=False),),
    )

    assert host_candidates(snapshot, own_link=OURS) == ["198.51.100.3"]


def test_each_family_has_its_own_interface_and_ipv4_stands_before_ipv6() -> None:
    snapshot = HostSnapshot(
        links=(WIFI, CABLE),
        addresses=(
            Address(2, "2001:db8::2"),
            Address(3, "2001:db8::3"),
            Address(2, "192.0.2.2"),
            Address(3, "192.0.2.3"),
        ),
        default_routes=(Route(3, is_ipv6=True), Route(2, is_ipv6=False)),
    )

    assert host_candidates(snapshot, own_link=OURS) == ["192.0.2.2", "2001:db8::3"]


@pytest.mark.parametrize("link", [TUN, Link(9, "lo", is_loopback=True), Link(9, "eth9", is_up=False)])
@pytest.mark.parametrize("routes", [(), (Route(2, is_ipv6=False),)])
def test_addresses_of_our_tunnel_loopback_and_idle_interfaces_are_not_candidates(
    link: Link, routes: tuple[Route, ...]
) -> None:
    snapshot = HostSnapshot(
        links=(link, WIFI),
        addresses=(Address(9, "192.0.2.9"), Address(2, "192.0.2.2")),
        default_routes=(*(attrs.evolve(route, link=9) for route in routes), *routes),
    )

    assert host_candidates(snapshot, own_link=OURS) == ["192.0.2.2"]


@pytest.mark.parametrize(
    ("routes", "candidates"),
    [
        pytest.param((), ["192.0.2.2", "172.17.0.1", "2001:db8::2", "fd00:17::1"], id="isolated"),
        pytest.param((Route(2, is_ipv6=False),), ["192.0.2.2", "2001:db8::2"], id="ipv4 only"),
        pytest.param((Route(2, is_ipv6=True),), ["192.0.2.2", "2001:db8::2"], id="ipv6 only"),
        pytest.param(
            (Route(2, is_ipv6=False), Route(2, is_ipv6=True)), ["192.0.2.2", "2001:db8::2"], id="both families"
        ),
        pytest.param(
            (Route(4, is_ipv6=False), Route(2, is_ipv6=True)),
            ["172.17.0.1", "2001:db8::2"],
            id="another interface for each family",
        ),
    ],
)
def test_networks_behind_the_host_give_no_candidates(routes: tuple[Route, ...], candidates: list[str]) -> None:
    snapshot = HostSnapshot(
        links=(LOOPBACK, WIFI, DOCKER),
        addresses=(
            Address(1, "127.0.0.1"),
            Address(2, "192.0.2.2"),
            Address(4, "172.17.0.1"),
            Address(2, "2001:db8::2"),
            Address(4, "fd00:17::1"),
        ),
        default_routes=routes,
    )

    assert host_candidates(snapshot, own_link=OURS) == candidates


def test_a_vpn_that_leads_to_the_internet_is_the_uplink_and_gives_a_candidate() -> None:
    snapshot = HostSnapshot(
        links=(LOOPBACK, CABLE, VPN, TUN),
        addresses=(Address(3, "198.51.100.3"), Address(5, "10.8.0.2"), Address(9, "100.64.0.1")),
        default_routes=(Route(5, is_ipv6=False),),
    )

    assert uplinks(snapshot, own_link=OURS) == (Uplink("wg0", None, "10.8.0.2", ("10.8.0.2",)), None)
    assert host_candidates(snapshot, own_link=OURS) == ["10.8.0.2"]


def test_the_routes_source_comes_first_even_where_loopback_has_it() -> None:
    snapshot = HostSnapshot(
        links=(LOOPBACK, CABLE),
        addresses=(Address(1, "127.0.0.1"), Address(3, "10.0.0.3"), Address(1, "203.0.113.1"), Address(3, "10.0.0.4")),
        default_routes=(Route(3, is_ipv6=False, next_hop="10.0.0.1", preferred_source="203.0.113.1"),),
    )

    assert host_candidates(snapshot, own_link=OURS) == ["203.0.113.1", "10.0.0.3", "10.0.0.4"]
    uplink = uplinks(snapshot, own_link=OURS).ipv4
    assert uplink == Uplink("eth0", "10.0.0.1", "203.0.113.1", ("203.0.113.1", "10.0.0.3", "10.0.0.4"))


@pytest.mark.parametrize(
    "address",
    [
        Address(2, "fe80::1"),
        Address(2, "febf::1"),
        Address(2, "2001:db8::1", is_deprecated=True),
        Address(2, "2001:db8::1", is_tentative=True),
    ],
)
def test_link_local_deprecated_and_tentative_addresses_are_not_candidates(address: Address) -> None:
    snapshot = HostSnapshot(links=(WIFI,), addresses=(address,))

    assert host_candidates(snapshot, own_link=OURS) == []


def test_a_carriers_shared_address_is_a_candidate() -> None:
    snapshot = HostSnapshot(links=(WIFI,), addresses=(Address(2, "100.64.3.4"),))

    assert host_candidates(snapshot, own_link=OURS) == ["100.64.3.4"]


def test_there_are_at_most_four_of_each_family() -> None:
    addresses = tuple(Address(2, f"{network}{number}") for network in ("192.0.2.", "2001:db8::") for number in "123456")
    snapshot = HostSnapshot(links=(WIFI,), addresses=addresses)

    candidates = host_candidates(snapshot, own_link=OURS)

    assert candidates == [f"192.0.2.{number}" for number in "1234"] + [f"2001:db8::{number}" for number in "1234"]


def test_default_routes_through_our_tunnel_or_an_idle_interface_do_not_count() -> None:
    snapshot = HostSnapshot(
        links=(TUN, attrs.evolve(CABLE, is_up=False), WIFI),
        default_routes=(
            Route(9, is_ipv6=False),
            Route(3, is_ipv6=False),
            Route(2, is_ipv6=False),
            Route(7, is_ipv6=False),
        ),
    )

    assert uplinks(snapshot, own_link=OURS).ipv4 == Uplink("wlan0", None, None)


@pytest.mark.parametrize(("route_source", "expected"), [(None, "2001:db8::c"), ("2001:db8::a", "2001:db8::a")])
def test_the_preferred_source_is_the_routes_own_or_else_a_lasting_address(
    route_source: str | None, expected: str
) -> None:
    snapshot = HostSnapshot(
        links=(WIFI,),
        addresses=(
            Address(2, "fe80::2"),
            Address(2, "2001:db8::a", is_temporary=True),
            Address(2, "2001:db8::b", is_deprecated=True),
            Address(2, "2001:db8::c"),
            Address(2, "2001:db8::d", is_tentative=True),
        ),
        default_routes=(Route(2, is_ipv6=True, preferred_source=route_source),),
    )

    uplink = uplinks(snapshot, own_link=OURS).ipv6

    assert uplink is not None
    assert uplink.preferred_source == expected
    assert sorted(uplink.sources) == ["2001:db8::a", "2001:db8::b", "2001:db8::c"]


_V4 = Uplink("wlan0", "192.0.2.1", "192.0.2.2", ("192.0.2.2",))
_V6 = Uplink("wlan0", "fe80::1", "2001:db8::a", ("2001:db8::a", "2001:db8::b"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(Uplinks(_V4, None), Uplinks(_V4, _V6), id="ipv6 comes"),
        pytest.param(Uplinks(_V4, None), Uplinks(_V4, _V6._replace(sources=())), id="ipv6 comes without an address"),
        pytest.param(Uplinks(_V4, _V6._replace(sources=())), Uplinks(_V4, _V6), id="its address follows"),
        pytest.param(Uplinks(_V4, _V6), Uplinks(_V4, None), id="ipv6 goes"),
        pytest.param(Uplinks(_V4, _V6), Uplinks(None, _V6), id="ipv4 goes"),
        pytest.param(
            Uplinks(None, _V6),
            Uplinks(None, _V6._replace(preferred_source="2001:db8::c", sources=("2001:db8::c", "2001:db8::a"))),
            id="an address is added and preferred",
        ),
        pytest.param(
            Uplinks(None, _V6),
            Uplinks(None, _V6._replace(preferred_source="2001:db8::b", sources=("2001:db8::b",))),
            id="a privacy address ends",
        ),
        pytest.param(Uplinks(_V4, _V6), Uplinks(None, None), id="the network goes"),
        pytest.param(Uplinks(None, None), Uplinks(None, None), id="still no network"),
    ],
)
def test_what_leaves_the_sockets_addresses_in_place_is_no_move(before: Uplinks, after: Uplinks) -> None:
    assert not has_moved(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(Uplinks(_V4, _V6), Uplinks(_V4._replace(interface="eth0"), _V6), id="another interface"),
        pytest.param(Uplinks(_V4, None), Uplinks(_V4._replace(next_hop="192.0.2.9"), None), id="another router"),
        pytest.param(
            Uplinks(_V4, None),
            Uplinks(_V4._replace(preferred_source="192.0.2.7", sources=("192.0.2.7",)), None),
            id="another address",
        ),
        pytest.param(Uplinks(_V4, None), Uplinks(None, _V6), id="another family"),
        pytest.param(Uplinks(None, None), Uplinks(_V4, None), id="a network comes"),
    ],
)
def test_another_uplink_or_none_of_its_addresses_is_a_move(before: Uplinks, after: Uplinks) -> None:
    assert has_moved(before, after)


def test_a_host_without_network_has_neither_interface_nor_addresses() -> None:
    assert host_candidates(HostSnapshot(), own_link=OURS) == []
    assert uplinks(HostSnapshot(), own_link=OURS) == (None, None)

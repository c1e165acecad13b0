"""Host candidates and uplinks, chosen from plain values."""

from __future__ import annotations

import attrs
import pytest

from firezone_tunnel.shell.host.addresses import Address, HostSnapshot, Link, Route, Uplink, host_candidates, uplinks

OURS = "tun-firezone"
LOOPBACK = Link(1, "lo", is_loopback=True)
WIFI = Link(2, "wlan0")
CABLE = Link(3, "eth0")
TUN = Link(9, OURS, kind="tun")


def test_the_default_routes_interface_comes_first() -> None:
    snapshot = HostSnapshot(
        links=(LOOPBACK, WIFI, CABLE),
        addresses=(Address(1, "127.0.0.1"), Address(2, "192.0.2.2"), Address(3, "198.51.100.3")),
        default_routes=(Route(3, is_ipv6=False),),
    )

    assert host_candidates(snapshot, own_link=OURS) == ["198.51.100.3", "192.0.2.2"]


def test_each_family_has_its_own_first_interface_and_ipv4_stands_before_ipv6() -> None:
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

    assert host_candidates(snapshot, own_link=OURS) == ["192.0.2.2", "192.0.2.3", "2001:db8::3", "2001:db8::2"]


@pytest.mark.parametrize(
    "link",
    [
        TUN,
        Link(9, "tun0", kind="tun"),
        Link(9, "wg0", kind="wireguard"),
        Link(9, "lo", is_loopback=True),
        Link(9, "eth9", is_up=False),
    ],
)
def test_addresses_of_tunnels_loopback_and_idle_interfaces_are_not_candidates(link: Link) -> None:
    snapshot = HostSnapshot(links=(link, WIFI), addresses=(Address(9, "192.0.2.9"), Address(2, "192.0.2.2")))

    assert host_candidates(snapshot, own_link=OURS) == ["192.0.2.2"]


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


def test_the_cheapest_default_route_counts() -> None:
    snapshot = HostSnapshot(
        links=(WIFI, CABLE),
        addresses=(Address(2, "192.0.2.2"), Address(3, "198.51.100.3")),
        default_routes=(
            Route(2, is_ipv6=False, next_hop="192.0.2.1", metric=600),
            Route(3, is_ipv6=False, next_hop="198.51.100.1", metric=100),
        ),
    )

    assert uplinks(snapshot, own_link=OURS) == (Uplink("eth0", "198.51.100.1", "198.51.100.3"), None)


def test_default_routes_through_our_tunnel_or_an_idle_interface_do_not_count() -> None:
    snapshot = HostSnapshot(
        links=(TUN, attrs.evolve(CABLE, is_up=False), WIFI),
        default_routes=(
            Route(9, is_ipv6=False),
            Route(3, is_ipv6=False, metric=100),
            Route(2, is_ipv6=False, metric=600),
            Route(7, is_ipv6=False, metric=1),
        ),
    )

    assert uplinks(snapshot, own_link=OURS).ipv4 == Uplink("wlan0", None, None)


def test_the_preferred_source_is_the_routes_own_or_else_a_lasting_address_of_its_interface() -> None:
    snapshot = HostSnapshot(
        links=(WIFI,),
        addresses=(
            Address(2, "fe80::2"),
            Address(2, "2001:db8::a", is_temporary=True),
            Address(2, "2001:db8::b", is_deprecated=True),
            Address(2, "2001:db8::c"),
        ),
        default_routes=(Route(2, is_ipv6=True),),
    )
    chosen = attrs.evolve(snapshot, default_routes=(Route(2, is_ipv6=True, preferred_source="2001:db8::9"),))

    assert uplinks(snapshot, own_link=OURS).ipv6 == Uplink("wlan0", None, "2001:db8::c")
    assert uplinks(chosen, own_link=OURS).ipv6 == Uplink("wlan0", None, "2001:db8::9")


def test_a_host_without_network_has_neither_interface_nor_addresses() -> None:
    assert host_candidates(HostSnapshot(), own_link=OURS) == []
    assert uplinks(HostSnapshot(), own_link=OURS) == (None, None)

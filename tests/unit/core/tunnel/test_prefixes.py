"""Longest prefixes, compared with a scan of all networks, and the tunnel's own ranges."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.core.tunnel.prefixes import (
    PrefixTable,
    is_multicast,
    is_tunnel_address,
    lies_in_tunnel,
    parse_network,
)

# Few distinct bits, so that networks overlap and contain the addresses.
_ipv4 = st.integers(0, 2**32 - 1).map(lambda number: number & 0xC0C0_0303)
_ipv6 = st.integers(0, 2**128 - 1).map(lambda number: number & 0xC0C0 << 112 | number & 3)
_networks: st.SearchStrategy[Network] = st.one_of(
    st.builds(lambda number, bits: ipaddress.IPv4Network((number, bits), strict=False), _ipv4, st.integers(0, 32)),
    st.builds(lambda number, bits: ipaddress.IPv6Network((number, bits), strict=False), _ipv6, st.integers(0, 128)),
)
_addresses = st.one_of(_ipv4.map(ipaddress.IPv4Address), _ipv6.map(ipaddress.IPv6Address))


@given(st.lists(st.tuples(_networks, st.integers()), max_size=12), st.lists(_addresses, max_size=12))
def test_an_address_finds_the_value_of_its_longest_prefix(
    entries: list[tuple[Network, int]], addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address]
) -> None:
    table: PrefixTable[int] = PrefixTable()
    for network, value in entries:
        table.insert(network, value)
    latest = dict(entries)

    for address in [*addresses, *(network.network_address for network in latest)]:
        holding = [network for network in latest if address in network]
        expected = latest[max(holding, key=lambda network: network.prefixlen)] if holding else None
        assert table.lookup(address.packed) == expected


@given(st.lists(st.tuples(_networks, st.integers()), max_size=12), _networks)
def test_a_network_finds_itself_and_all_that_contain_it(entries: list[tuple[Network, int]], wanted: Network) -> None:
    table: PrefixTable[int] = PrefixTable()
    for network, value in entries:
        table.insert(network, value)
    latest = dict(entries)

    for network in [wanted, *latest]:
        containing = [other for other in latest if other.version == network.version and network.subnet_of(other)]
        containing.sort(key=lambda other: -other.prefixlen)
        assert table.covering(network) == [latest[other] for other in containing]
        assert table.get(network) == latest.get(network)


def test_the_value_0_is_a_value() -> None:
    table: PrefixTable[int] = PrefixTable()
    table.insert(ipaddress.IPv4Network("0.0.0.0/0"), 1)
    table.insert(ipaddress.IPv4Network("10.0.0.0/8"), 0)

    assert table.lookup(bytes((10, 0, 0, 1))) == 0


@pytest.mark.parametrize(
    ("address", "is_own"),
    [
        ("100.64.0.1", True),
        ("100.95.255.255", True),
        ("100.96.0.1", False),  # proxy addresses and resources
        ("100.63.255.255", False),
        ("10.0.0.1", False),
        ("fd00:2021:1111::7", True),
        ("fd00:2021:1111::1f:ffff", True),
        ("fd00:2021:1111::20:0", False),
        ("2001:db8::1", False),
    ],
)
def test_the_ranges_of_clients_and_gateways_are_tunnel_addresses(address: str, is_own: bool) -> None:
    assert is_tunnel_address(ipaddress.ip_address(address).packed) == is_own


@pytest.mark.parametrize(
    ("network", "lies"),
    [
        ("100.64.0.0/11", True),
        ("100.64.0.0/24", True),
        ("100.64.0.7/32", True),
        ("100.64.0.0/10", False),
        ("0.0.0.0/0", False),
        ("fd00:2021:1111::/107", True),
        ("fd00:2021:1111::/64", False),
        ("::/0", False),
    ],
)
def test_a_network_lies_in_the_tunnel_if_all_its_addresses_do(network: str, lies: bool) -> None:
    assert lies_in_tunnel(ipaddress.ip_network(network)) == lies


@given(st.ip_addresses())
def test_multicast_and_broadcast_are_recognized(address: ipaddress.IPv4Address) -> None:
    assert is_multicast(address.packed) == (address.is_multicast or str(address) == "255.255.255.255")


@pytest.mark.parametrize("address", ["224.0.0.22", "ff02::2", "239.255.255.250", "255.255.255.255"])
def test_examples_of_multicast(address: str) -> None:
    assert is_multicast(ipaddress.ip_address(address).packed)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("172.20.0.0/16", ipaddress.IPv4Network("172.20.0.0/16")),
        ("172.20.0.1", ipaddress.IPv4Network("172.20.0.1/32")),
        ("2001:db8::/32", ipaddress.IPv6Network("2001:db8::/32")),
        ("::1", ipaddress.IPv6Network("::1/128")),
        ("172.20.0.1/16", None),
        ("172.20.0.0/33", None),
        ("*.example.com", None),
        ("", None),
    ],
)
def test_a_network_has_no_host_bits(text: str, network: Network | None) -> None:
    assert parse_network(text) == network


@given(st.text())
def test_any_text_is_a_network_or_none(text: str) -> None:
    network = parse_network(text)
    assert network is None or parse_network(str(network)) == network

"""Networks that hold an address, compared with a scan of all networks, and the tunnel's own ranges."""

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


@given(
    st.lists(st.tuples(st.booleans(), _networks, st.sampled_from("abc"), st.integers()), max_size=20),
    st.lists(_addresses, max_size=8),
)
def test_an_address_finds_all_values_of_the_networks_that_hold_it_the_most_specific_first(
    changes: list[tuple[bool, Network, str, int]], addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address]
) -> None:
    table: PrefixTable[int] = PrefixTable()
    expected: dict[Network, dict[str, int]] = {}
    for is_insertion, network, key, value in changes:
        values = expected.setdefault(network, {})
        if is_insertion:
            assert table.insert(network, key, value) == (not values)
            values[key] = value
        elif key in values:
            del values[key]
            assert table.remove(network, key) == (not values)
        if not values:
            del expected[network]

    for address in [*addresses, *(network.network_address for _, network, _, _ in changes)]:
        holding = sorted((network for network in expected if address in network), key=_prefix_length, reverse=True)
        assert table.holding(address.packed) == [expected[network] for network in holding]


def test_a_value_that_is_not_there_cannot_be_removed() -> None:
    table: PrefixTable[int] = PrefixTable()
    table.insert(ipaddress.IPv4Network("10.0.0.0/8"), "a", 0)

    for text, key in (("10.0.0.0/8", "b"), ("11.0.0.0/8", "a"), ("10.0.0.0/9", "a"), ("::/8", "a")):
        with pytest.raises(KeyError):
            table.remove(ipaddress.ip_network(text), key)


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


def _prefix_length(network: Network) -> int:
    return network.prefixlen

"""Which tunnel address a new device gets."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.portal.tunnel_addresses import allocate
from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6

_SMALL = ipaddress.IPv4Network("192.0.2.0/28")  # assignable: .2 to .14


def _entropy(number: int) -> bytes:
    return number.to_bytes(8)


@given(st.integers(0, 2**64 - 1))
def test_an_address_lies_in_the_network_and_is_neither_its_first_nor_its_last(number: int) -> None:
    for network in (TUNNEL_IPV4, TUNNEL_IPV6):
        address = allocate(network, (), lambda _: _entropy(number))

        assert address in network
        assert network[2] <= address <= network[-2]


def test_the_first_free_address_upward_is_assigned() -> None:
    assert str(allocate(_SMALL, {"192.0.2.5", "192.0.2.6"}, lambda _: _entropy(3))) == "192.0.2.7"


def test_the_first_free_address_downward_is_assigned_if_none_is_free_upward() -> None:
    taken = {f"192.0.2.{number}" for number in range(5, 15)}

    assert str(allocate(_SMALL, taken, lambda _: _entropy(3))) == "192.0.2.4"


@given(st.integers(0, 2**64 - 1))
def test_every_address_is_assigned_once_until_none_is_left(number: int) -> None:
    taken: set[str] = set()
    while (address := allocate(_SMALL, taken, lambda _: _entropy(number))) is not None:
        assert str(address) not in taken
        taken.add(str(address))

    assert sorted(taken, key=ipaddress.ip_address) == [f"192.0.2.{number}" for number in range(2, 15)]

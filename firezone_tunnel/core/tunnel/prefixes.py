"""Networks by prefix, looked up with the raw bytes of an address, and the ranges the tunnel itself uses."""

from __future__ import annotations

import ipaddress
from bisect import insort
from typing import Generic, TypeVar

from firezone_tunnel.core.messages.common import Network

TUNNEL_IPV4 = ipaddress.IPv4Network("100.64.0.0/11")  # docs/protocol/data-plane.md, 0.1
TUNNEL_IPV6 = ipaddress.IPv6Network("fd00:2021:1111::/107")

_T = TypeVar("_T")


def parse_network(text: str) -> Network | None:
    """A network whose host bits are zero, or a single address; None for anything else."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def is_tunnel_address(address: bytes) -> bool:
    """Whether an address of 4 or 16 bytes is one that the portal gives to clients and gateways."""
    first, mask = _OWN_RANGES[len(address)]
    return int.from_bytes(address, "big") & mask == first


def is_multicast(address: bytes) -> bool:
    """Whether an address of 4 or 16 bytes is a multicast or broadcast one."""
    if len(address) == 4:
        return address[0] & 0xF0 == 0xE0 or address == b"\xff\xff\xff\xff"
    return address[0] == 0xFF


class PrefixTable(Generic[_T]):
    """Values of networks, each under an id: networks may overlap, and several ids may share one.

    A change costs the same however many networks there are.
    """

    __slots__ = ("_levels",)

    def __init__(self) -> None:
        # By the size of addresses: (host bits, {network bits: {id: value}}), the longest prefix first.
        self._levels: dict[int, list[tuple[int, dict[int, dict[str, _T]]]]] = {4: [], 16: []}

    def holding(self, address: bytes) -> list[dict[str, _T]]:
        """The values of each network that holds an address of 4 or 16 bytes, by id; the most specific network first."""
        number = int.from_bytes(address, "big")
        return [
            values
            for host_bits, networks in self._levels[len(address)]
            if (values := networks.get(number >> host_bits)) is not None
        ]

    def insert(self, network: Network, key: str, value: _T) -> bool:
        """Set the value of an id. Returns whether the network had no values until now."""
        host_bits = network.max_prefixlen - network.prefixlen
        levels = self._levels[network.max_prefixlen // 8]
        networks = next((networks for present, networks in levels if present == host_bits), None)
        if networks is None:
            networks = {}
            insort(levels, (host_bits, networks), key=_host_bits)
        values = networks.setdefault(int(network.network_address) >> host_bits, {})
        is_new = not values
        values[key] = value
        return is_new

    def remove(self, network: Network, key: str) -> bool:
        """Forget the value of an id. Returns whether the network has no values any more.

        Raises: KeyError, if it has none under this id.
        """
        host_bits = network.max_prefixlen - network.prefixlen
        levels = self._levels[network.max_prefixlen // 8]
        networks = next((networks for present, networks in levels if present == host_bits), {})
        prefix = int(network.network_address) >> host_bits
        values = networks[prefix]
        del values[key]
        if values:
            return False
        del networks[prefix]
        if not networks:  # each level costs every look-up
            levels.remove((host_bits, networks))
        return True


def _host_bits(level: tuple[int, object]) -> int:
    return level[0]


_OWN_RANGES = {
    network.max_prefixlen // 8: (int(network.network_address), int(network.netmask))
    for network in (TUNNEL_IPV4, TUNNEL_IPV6)
}
"""First address and mask, by the size of addresses."""

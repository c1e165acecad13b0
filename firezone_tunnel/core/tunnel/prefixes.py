"""Networks by longest prefix, looked up with the raw bytes of an address, and the ranges the tunnel itself uses."""

from __future__ import annotations

import ipaddress
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
    return _OWN_RANGES.lookup(address) is not None


def lies_in_tunnel(network: Network) -> bool:
    """Whether all addresses of a network are ones that the portal gives to clients and gateways."""
    return bool(_OWN_RANGES.covering(network))


def is_multicast(address: bytes) -> bool:
    """Whether an address of 4 or 16 bytes is a multicast or broadcast one."""
    if len(address) == 4:
        return address[0] & 0xF0 == 0xE0 or address == b"\xff\xff\xff\xff"
    return address[0] == 0xFF


class PrefixTable(Generic[_T]):
    """Values of networks; an address finds that of the most specific network that holds it. Values are not None."""

    __slots__ = ("_levels",)

    def __init__(self) -> None:
        # By the size of addresses: (host bits, {network bits: value}), the longest prefix first.
        self._levels: dict[int, list[tuple[int, dict[int, _T]]]] = {4: [], 16: []}

    def lookup(self, address: bytes) -> _T | None:
        """The value of the longest prefix of an address, 4 or 16 bytes."""
        number = int.from_bytes(address, "big")
        for host_bits, networks in self._levels[len(address)]:
            value = networks.get(number >> host_bits)
            if value is not None:
                return value
        return None

    def insert(self, network: Network, value: _T) -> None:
        """Set the value of a network, in place of the one it had."""
        host_bits = network.max_prefixlen - network.prefixlen
        levels = self._levels[network.max_prefixlen // 8]
        networks = next((networks for present, networks in levels if present == host_bits), None)
        if networks is None:
            networks = {}
            levels.append((host_bits, networks))
            levels.sort(key=_host_bits)
        networks[int(network.network_address) >> host_bits] = value

    def get(self, network: Network) -> _T | None:
        """The value of this very network."""
        return next(iter(self._covering(network, least=network.prefixlen)), None)

    def covering(self, network: Network) -> list[_T]:
        """The values of the network and of all that contain it, the most specific first."""
        return self._covering(network, least=0)

    def _covering(self, network: Network, *, least: int) -> list[_T]:
        number = int(network.network_address)
        own = network.max_prefixlen - network.prefixlen
        most = network.max_prefixlen - least
        found = (
            networks.get(number >> host_bits)
            for host_bits, networks in self._levels[network.max_prefixlen // 8]
            if own <= host_bits <= most
        )
        return [value for value in found if value is not None]


def _host_bits(level: tuple[int, object]) -> int:
    return level[0]


_OWN_RANGES: PrefixTable[bool] = PrefixTable()
_OWN_RANGES.insert(TUNNEL_IPV4, True)
_OWN_RANGES.insert(TUNNEL_IPV6, True)

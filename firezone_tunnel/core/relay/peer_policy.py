"""The addresses that nothing is relayed to (RFC 8656, sections 21.2.3 and 21.4).

Without this policy, users could reach the relay's own services and its neighbours. An address is judged together with
every IPv4 address that is embedded in it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence

from firezone_tunnel.core.sansio import SocketAddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PRIVATE: tuple[Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
)
"""Usual values of `allow` if peers share a private network with the relay (RFC 1918, 6598 and 4193)."""


class PeerPolicy:
    """Decides which peers are permitted. Own addresses are denied, except for the ports of allocations."""

    def __init__(
        self,
        *,
        relayed_hosts: Iterable[str],
        own_hosts: Iterable[str] = (),
        lowest_port: int,
        highest_port: int,
        allow: Sequence[Network] = (),
    ) -> None:
        """`relayed_hosts` are the addresses of allocations, `own_hosts` all others that this host answers to.

        `allow` exempts networks from the special-purpose blocks, not from the own addresses, and never group,
        broadcast or unspecified addresses.

        Raises: ValueError for an invalid address.
        """
        self._relayed = {ipaddress.ip_address(host) for host in relayed_hosts}
        self._own = {ipaddress.ip_address(host) for host in own_hosts} | self._relayed
        self._ports = range(lowest_port, highest_port + 1)
        self._allow = tuple(allow)

    def permits(self, peer: SocketAddress) -> bool:
        """Whether datagrams may be relayed to this address and port."""
        address = ipaddress.ip_address(peer.host)
        if address in self._relayed:
            return peer.port in self._ports
        return self._permits_foreign(address)

    def permits_host(self, host: str) -> bool:
        """Whether a permission, which has no port, may be installed. `permits` decides about its use."""
        address = ipaddress.ip_address(host)
        return address in self._relayed or self._permits_foreign(address)

    def is_relayed(self, host: str) -> bool:
        """Whether allocations of this relay have this address."""
        return ipaddress.ip_address(host) in self._relayed

    def private_network(self, host: str) -> Network | None:
        """The private network that a denied address belongs to, itself or by an IPv4 address embedded in it.

        None where `allow` would not help: it is another special address, or one of this host's.
        """
        address = ipaddress.ip_address(host)
        for one in (address, *embedded(address)):
            if not self._permits_one(one):
                network = next((network for network in PRIVATE if one in network), None)
                return None if one in self._own else network
        return None

    def _permits_foreign(self, address: Address) -> bool:
        return self._permits_one(address) and all(self._permits_one(inner) for inner in embedded(address))

    def _permits_one(self, address: Address) -> bool:
        if address in self._own or _is_in(address, _NEVER):
            return False
        if _is_in(address, self._allow):
            return True
        if isinstance(address, ipaddress.IPv6Address) and not _is_in(address, _GLOBAL_IPV6):
            return False
        return not _is_in(address, _SPECIAL)


def embedded(address: Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that translators and tunnels extract from an IPv6 address."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    raw = address.packed
    if _is_in(address, _EMBEDDED_LAST):
        yield ipaddress.IPv4Address(raw[12:])
    if address in _6TO4:
        yield ipaddress.IPv4Address(raw[2:6])
    if address in _TEREDO:
        yield ipaddress.IPv4Address(raw[4:8])
        yield ipaddress.IPv4Address(bytes(byte ^ 0xFF for byte in raw[12:]))
    if raw[8:12] in _ISATAP:
        yield ipaddress.IPv4Address(raw[12:])


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_NEVER = _networks("0.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/128", "ff00::/8")
_GLOBAL_IPV6 = _networks("2000::/3", "64:ff9b::/96")
# The registries of special-purpose addresses (RFC 6890), without the few blocks in them that are ordinary hosts;
# for IPv6 all that lies outside of global unicast is denied already.
_SPECIAL = _networks(
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "2001::/23",
    "2001:db8::/32",
    "2620:4f:8000::/48",
    "3fff::/20",
)
_EMBEDDED_LAST = _networks(
    "::/96",  # IPv4-compatible (RFC 4291, section 2.5.5.1)
    "::ffff:0:0/96",  # IPv4-mapped (RFC 4291, section 2.5.5.2)
    "::ffff:0:0:0/96",  # IPv4-translated (RFC 2765, section 2.1)
    "64:ff9b::/96",  # NAT64 (RFC 6052, section 2.1)
)
_6TO4 = ipaddress.IPv6Network("2002::/16")  # RFC 3056, section 2
_TEREDO = ipaddress.IPv6Network("2001::/32")  # RFC 4380, section 4: the server, and the client inverted
_ISATAP = (bytes.fromhex("00005efe"), bytes.fromhex("02005efe"))  # RFC 5214, section 6.1

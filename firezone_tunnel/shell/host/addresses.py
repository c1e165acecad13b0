"""Which of this host's addresses are worth telling a peer, and by which way the host reaches the internet."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import attrs

MAX_CANDIDATES = 4  # per family


@attrs.frozen
class Link:
    """A network interface. `kind` is what `ip -details link` calls it: "tun", "veth", ...; None for hardware."""

    index: int
    name: str
    kind: str | None = None
    is_up: bool = True  # and has a carrier
    is_loopback: bool = False


@attrs.frozen
class Address:
    """An address of an interface. Temporary: one of those that privacy extensions renew (RFC 8981)."""

    link: int  # its index
    host: str
    is_deprecated: bool = False
    is_tentative: bool = False  # or found to be a duplicate
    is_temporary: bool = False


@attrs.frozen
class Route:
    """A default route of the main table."""

    link: int
    is_ipv6: bool
    next_hop: str | None = None
    preferred_source: str | None = None
    metric: int = 0


@attrs.frozen
class HostSnapshot:
    """The network configuration at one moment, in the kernel's order."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    default_routes: tuple[Route, ...] = ()


class Uplink(NamedTuple):
    """How a family's packets leave: the network has changed once this has."""

    interface: str
    next_hop: str | None
    preferred_source: str | None


class Uplinks(NamedTuple):
    ipv4: Uplink | None
    ipv6: Uplink | None


def uplinks(snapshot: HostSnapshot, *, own_link: str) -> Uplinks:
    """The default route of each family: of those through interfaces that are up and not ours, the cheapest."""
    links = {link.index: link for link in snapshot.links if link.is_up and link.name != own_link}
    return Uplinks(*(_uplink(snapshot, links, is_ipv6=is_ipv6) for is_ipv6 in (False, True)))


def host_candidates(snapshot: HostSnapshot, *, own_link: str) -> list[str]:
    """The addresses to offer as host candidates, IPv4 first, the best of each family first.

    Never those of our own interface, of other tunnels, of loopback, or of interfaces that are down; and no
    link-local, deprecated or tentative IPv6 addresses. The range of an address says nothing: carriers use
    100.64.0.0/10 too.
    """
    links = {link.index: link for link in snapshot.links if _is_candidate(link, own_link)}
    default = uplinks(snapshot, own_link=own_link)
    hosts: list[str] = []
    for is_ipv6, uplink in ((False, default.ipv4), (True, default.ipv6)):
        first = uplink.interface if uplink is not None else None
        usable = [address for address in snapshot.addresses if address.link in links and _is_usable(address, is_ipv6)]
        usable.sort(key=lambda address: links[address.link].name != first)
        hosts += [address.host for address in usable[:MAX_CANDIDATES]]
    return hosts


_TUNNEL_KINDS = frozenset({"tun", "wireguard"})


def _uplink(snapshot: HostSnapshot, links: dict[int, Link], *, is_ipv6: bool) -> Uplink | None:
    routes = [route for route in snapshot.default_routes if route.link in links and route.is_ipv6 == is_ipv6]
    if not routes:
        return None
    best = min(routes, key=lambda route: route.metric)
    source = best.preferred_source or _first_source(snapshot, best.link, is_ipv6=is_ipv6)
    return Uplink(links[best.link].name, best.next_hop, source)


def _first_source(snapshot: HostSnapshot, link: int, *, is_ipv6: bool) -> str | None:
    """An address that stands for the interface: not one that privacy extensions replace every day, if possible."""
    usable = [address for address in snapshot.addresses if address.link == link and _is_usable(address, is_ipv6)]
    usable.sort(key=lambda address: address.is_temporary)
    return usable[0].host if usable else None


def _is_candidate(link: Link, own_link: str) -> bool:
    return link.is_up and not link.is_loopback and link.kind not in _TUNNEL_KINDS and link.name != own_link


def _is_usable(address: Address, is_ipv6: bool) -> bool:
    if (":" in address.host) != is_ipv6 or address.is_deprecated or address.is_tentative:
        return False
    return not is_ipv6 or not ipaddress.IPv6Address(address.host).is_link_local

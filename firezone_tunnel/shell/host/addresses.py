"""Select the host addresses to offer to peers, and the host's uplinks to the internet."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import attrs

MAX_CANDIDATES = 4  # per family


@attrs.frozen
class Link:
    """A network interface."""

    index: int
    name: str
    is_up: bool = True  # administratively up and with a carrier
    is_loopback: bool = False


@attrs.frozen
class Address:
    """An address of an interface."""

    link: int  # the interface's index
    host: str
    is_deprecated: bool = False
    is_tentative: bool = False  # also set for an address that failed duplicate address detection
    is_temporary: bool = False  # renewed by privacy extensions (RFC 8981)


@attrs.frozen
class Route:
    """The route that the kernel chooses for our own packets to the internet, by whatever rule and table."""

    link: int
    is_ipv6: bool
    next_hop: str | None = None
    preferred_source: str | None = None


@attrs.frozen
class HostSnapshot:
    """The network configuration at one point in time, in the kernel's order."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    default_routes: tuple[Route, ...] = ()
    """One for each family that has one."""


class Uplink(NamedTuple):
    """How our own packets of one address family leave the host."""

    interface: str
    next_hop: str | None
    preferred_source: str | None
    sources: tuple[str, ...] = ()
    """Every address that the interface can send from, deprecated ones too."""


class Uplinks(NamedTuple):
    ipv4: Uplink | None
    ipv6: Uplink | None


def uplinks(snapshot: HostSnapshot, *, own_link: str) -> Uplinks:
    """The way to the internet in each family. Interfaces that are down and our own are ignored."""
    links = _links(snapshot, own_link)
    return Uplinks(*(_uplink(snapshot, links, is_ipv6=is_ipv6) for is_ipv6 in (False, True)))


def has_moved(before: Uplinks, after: Uplinks) -> bool:
    """Whether the host is in another network now, so that our sockets' addresses and NAT mappings are void.

    One of the addresses that remains is enough: privacy addresses rotate, and networks announce further prefixes. So
    is one of the families: the other may come and go. An uplink that has no address yet is of no use.
    """
    old, new = (tuple(one if one is not None and one.sources else None for one in both) for both in (before, after))
    kept = [_is_same(one, other) for one, other in zip(old, new, strict=True) if one is not None and other is not None]
    return not all(kept) if kept else any(new)


def host_candidates(snapshot: HostSnapshot, *, own_link: str) -> list[str]:
    """The addresses to offer as host candidates, IPv4 first, the best address of each family first.

    These are the addresses of the interface that leads to the internet: networks behind this host, such as a
    container's bridge, are of no use to a peer. A family without such an interface takes that of the other, and a host
    without any takes all. Addresses of our own interface, loopback and interfaces that are down are excluded, and so
    are link-local, deprecated and tentative IPv6 addresses. Neither ranges nor kinds are filtered: carriers use
    100.64.0.0/10 too, and the way to the internet may be a VPN.
    """
    links = _links(snapshot, own_link)
    ipv4, ipv6 = uplinks(snapshot, own_link=own_link)
    hosts: list[str] = []
    for is_ipv6, uplink, other in ((False, ipv4, ipv6), (True, ipv6, ipv4)):
        way_out = uplink or other
        source = None if uplink is None else uplink.preferred_source
        usable = [
            address.host
            for address in snapshot.addresses
            if address.link in links and _is_usable(address, is_ipv6)
            if address.host == source or _is_offered(links[address.link], way_out)
        ]
        usable.sort(key=lambda host: host != source)
        hosts += usable[:MAX_CANDIDATES]
    return hosts


def _links(snapshot: HostSnapshot, own_link: str) -> dict[int, Link]:
    return {link.index: link for link in snapshot.links if link.is_up and link.name != own_link}


def _uplink(snapshot: HostSnapshot, links: dict[int, Link], *, is_ipv6: bool) -> Uplink | None:
    for route in snapshot.default_routes:
        link = links.get(route.link)
        if link is not None and not link.is_loopback and route.is_ipv6 == is_ipv6:
            source = route.preferred_source or _first_source(snapshot, route.link, is_ipv6=is_ipv6)
            own = [one.host for one in snapshot.addresses if one.link == route.link and _is_valid(one, is_ipv6)]
            sources = dict.fromkeys([source, *own] if source else own)
            return Uplink(link.name, route.next_hop, source, tuple(sources))
    return None


def _is_offered(link: Link, way_out: Uplink | None) -> bool:
    return not link.is_loopback if way_out is None else link.name == way_out.interface


def _is_same(before: Uplink, after: Uplink) -> bool:
    if (before.interface, before.next_hop) != (after.interface, after.next_hop):
        return False
    return any(source in after.sources for source in before.sources)


def _first_source(snapshot: HostSnapshot, link: int, *, is_ipv6: bool) -> str | None:
    """The interface's first usable address. Temporary addresses come last, since they change every day."""
    usable = [address for address in snapshot.addresses if address.link == link and _is_usable(address, is_ipv6)]
    usable.sort(key=lambda address: address.is_temporary)
    return usable[0].host if usable else None


def _is_usable(address: Address, is_ipv6: bool) -> bool:
    return _is_valid(address, is_ipv6) and not address.is_deprecated


def _is_valid(address: Address, is_ipv6: bool) -> bool:
    """Whether the kernel sends from it, at least where asked to."""
    if (":" in address.host) != is_ipv6 or address.is_tentative:
        return False
    return not is_ipv6 or not ipaddress.IPv6Address(address.host).is_link_local

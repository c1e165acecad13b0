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
    """A default route of the main table."""

    link: int
    is_ipv6: bool
    next_hop: str | None = None
    preferred_source: str | None = None
    metric: int = 0


@attrs.frozen
class HostSnapshot:
    """The network configuration at one point in time, in the kernel's order."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    default_routes: tuple[Route, ...] = ()
    sources: tuple[str, ...] = ()
    """The address of each family that the kernel sends our own datagrams from, by whatever rule and table."""


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
    """The interface that the kernel chooses for our packets, else that of the default route with the lowest metric.

    Interfaces that are down and our own are ignored.
    """
    links = {link.index: link for link in snapshot.links if link.is_up and link.name != own_link}
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

    These are the addresses that the kernel sends from, and the others of the interfaces that lead to the internet:
    networks behind this host, such as a container's bridge, are of no use to a peer. A family without a default route
    takes the interfaces of the other, and a host without any takes all. Addresses of our own interface, loopback and
    interfaces that are down are excluded, and so are link-local, deprecated and tentative IPv6 addresses. Neither
    ranges nor kinds are filtered: carriers use 100.64.0.0/10 too, and the way to the internet may be a VPN.
    """
    links = {link.index: link for link in snapshot.links if link.is_up and link.name != own_link}
    found = uplinks(snapshot, own_link=own_link)
    lead_out = {is_ipv6: _lead_out(snapshot, links, found[is_ipv6], is_ipv6=is_ipv6) for is_ipv6 in (False, True)}
    hosts: list[str] = []
    for is_ipv6, uplink in ((False, found.ipv4), (True, found.ipv6)):
        offered = lead_out[is_ipv6] or lead_out[not is_ipv6] or [one for one in links if not links[one].is_loopback]
        first, source = (None, None) if uplink is None else (uplink.interface, uplink.preferred_source)
        usable = [
            address
            for address in snapshot.addresses
            if _is_usable(address, is_ipv6) and (address.link in offered or address.host == source)
        ]
        usable.sort(key=lambda address: (address.host != source, links[address.link].name != first))
        hosts += [address.host for address in usable[:MAX_CANDIDATES]]
    return hosts


def _uplink(snapshot: HostSnapshot, links: dict[int, Link], *, is_ipv6: bool) -> Uplink | None:
    routes = _default_routes(snapshot, links, is_ipv6=is_ipv6)
    owners = {
        address.host: address.link
        for address in snapshot.addresses
        if address.link in links and _is_usable(address, is_ipv6)
    }
    chosen = next((source for source in snapshot.sources if source in owners), None)
    if chosen is not None and not links[owners[chosen]].is_loopback:
        routes = [route for route in routes if route.link == owners[chosen]] or [Route(owners[chosen], is_ipv6)]
    if not routes:
        return None
    best = min(routes, key=lambda route: route.metric)
    source = chosen or best.preferred_source or _first_source(snapshot, best.link, is_ipv6=is_ipv6)
    sources = [
        address.host
        for address in snapshot.addresses
        if address.link == best.link and _is_valid(address, is_ipv6) and address.host != source
    ]
    return Uplink(links[best.link].name, best.next_hop, source, (*([source] if source else ()), *sources))


def _default_routes(snapshot: HostSnapshot, links: dict[int, Link], *, is_ipv6: bool) -> list[Route]:
    usable = [index for index, link in links.items() if not link.is_loopback]
    return [route for route in snapshot.default_routes if route.link in usable and route.is_ipv6 == is_ipv6]


def _lead_out(snapshot: HostSnapshot, links: dict[int, Link], uplink: Uplink | None, *, is_ipv6: bool) -> list[int]:
    """The interfaces that lead to the internet: the uplink and those of the other default routes."""
    routes = [route.link for route in _default_routes(snapshot, links, is_ipv6=is_ipv6)]
    return routes + [index for index, link in links.items() if uplink is not None and link.name == uplink.interface]


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

"""Select the host addresses to offer to peers, and the host's uplinks to the internet."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import attrs

MAX_CANDIDATES = 4  # per family


@attrs.frozen
class Link:
    """A network interface. `kind` is the type shown by `ip -details link`: "tun", "veth", ...; None for hardware."""

    index: int
    name: str
    kind: str | None = None
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


class Uplink(NamedTuple):
    """How packets of one address family leave the host. A different uplink means that the host has changed networks."""

    interface: str
    next_hop: str | None
    preferred_source: str | None


class Uplinks(NamedTuple):
    ipv4: Uplink | None
    ipv6: Uplink | None


def uplinks(snapshot: HostSnapshot, *, own_link: str) -> Uplinks:
    """The default route with the lowest metric for each family. Interfaces that are down and our own are ignored."""
    links = {link.index: link for link in snapshot.links if link.is_up and link.name != own_link}
    return Uplinks(*(_uplink(snapshot, links, is_ipv6=is_ipv6) for is_ipv6 in (False, True)))


def host_candidates(snapshot: HostSnapshot, *, own_link: str) -> list[str]:
    """The addresses to offer as host candidates, IPv4 first, the best address of each family first.

    Addresses of our own interface, other tunnels, loopback and interfaces that are down are excluded, and so are
    link-local, deprecated and tentative IPv6 addresses. Ranges are not filtered: carriers use 100.64.0.0/10 too.
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
    """The interface's first usable address. Temporary addresses come last, since they change every day."""
    usable = [address for address in snapshot.addresses if address.link == link and _is_usable(address, is_ipv6)]
    usable.sort(key=lambda address: address.is_temporary)
    return usable[0].host if usable else None


def _is_candidate(link: Link, own_link: str) -> bool:
    return link.is_up and not link.is_loopback and link.kind not in _TUNNEL_KINDS and link.name != own_link


def _is_usable(address: Address, is_ipv6: bool) -> bool:
    if (":" in address.host) != is_ipv6 or address.is_deprecated or address.is_tentative:
        return False
    return not is_ipv6 or not ipaddress.IPv6Address(address.host).is_link_local

"""The resources of a client: which one an address belongs to, and how a front end shows them.

docs/protocol/data-plane.md, 4.2 and 4.3; docs/protocol/client-application.md, 1.9.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import attrs

from firezone_tunnel.core.messages.client import CidrResource, DnsResource, InternetResource, Resource
from firezone_tunnel.core.messages.common import Network, Site
from firezone_tunnel.core.sansio import Timeout, earliest
from firezone_tunnel.core.tunnel.filter import PERMIT_NOTHING, FilterTable, Rules
from firezone_tunnel.core.tunnel.prefixes import PrefixTable, is_multicast, is_tunnel_address, parse_network

MAX_CACHED_DESTINATIONS = 1024
OFFLINE_FOR = 300.0  # docs/protocol/data-plane.md, 4.3: after that the status is unknown


class Status(enum.Enum):
    """Of a site, and of a resource. The values are what the front end's JSON says."""

    UNKNOWN = "Unknown"
    ONLINE = "Online"
    OFFLINE = "Offline"


@attrs.frozen
class ResourceView:
    """A resource as a person sees it. `kind` is "cidr", "dns" or "internet"."""

    kind: str
    id: str
    name: str
    address: str | None
    address_description: str | None
    sites: tuple[Site, ...]
    status: Status


@attrs.define(eq=False)
class ActiveResource:
    """A resource in use. `networks` are what it routes, `rules` what passes to the first of them."""

    resource: Resource
    networks: tuple[Network, ...] = ()
    rules: Rules = PERMIT_NOTHING
    used_at: float = float("-inf")
    """When a packet last went to it."""

    @property
    def id(self) -> str:
        return self.resource.id

    @property
    def site_ids(self) -> tuple[str, ...]:
        return tuple(site.id for site in self.resource.gateway_groups)


class ResourceTable:
    """All resources that the portal lets this client see; those with a network route packets.

    `lookup(address)` finds the active resource of an address, 4 or 16 raw bytes, by the longest prefix; None for
    addresses of the tunnel itself, for multicast, and where there is no resource. Its answers are cached.
    """

    def __init__(self, *, is_connected: Callable[[str], bool]) -> None:
        """`is_connected(resource id)`: among resources of the same network, one in use isn't displaced."""
        self._is_connected = is_connected
        self._entries: dict[str, ActiveResource] = {}
        self._by_network: PrefixTable[ActiveResource] = PrefixTable()
        self.lookup = lru_cache(MAX_CACHED_DESTINATIONS)(self._find)

    def get(self, resource_id: str) -> ActiveResource | None:
        return self._entries.get(resource_id)

    def entries(self) -> Iterable[ActiveResource]:
        return self._entries.values()

    def set(self, resources: Iterable[Resource]) -> list[str]:
        """Have exactly these resources; returns the ids whose connections are void: gone, or now somewhere else."""
        wanted = {resource.id: resource for resource in resources}
        void = [resource_id for resource_id in self._entries if resource_id not in wanted]
        for resource_id in void:
            del self._entries[resource_id]
        void += [resource.id for resource in wanted.values() if self._put(resource)]
        self._rebuild(void)
        return void

    def add(self, resource: Resource) -> bool:
        """Insert or update a resource; returns whether its connection is void: it is now somewhere else."""
        is_void = self._put(resource)
        self._rebuild([resource.id] if is_void else [])
        return is_void

    def remove(self, resource_id: str) -> bool:
        """Returns whether it was there."""
        if self._entries.pop(resource_id, None) is None:
            return False
        self._rebuild()
        return True

    def networks(self) -> list[Network]:
        """The networks that the host routes into the tunnel, sorted, IPv4 first."""
        distinct = dict.fromkeys(network for entry in self._entries.values() for network in entry.networks)
        return sorted(distinct, key=_network_order)

    def views(self, sites: SiteStatuses) -> tuple[ResourceView, ...]:
        """All resources: the internet resource first, the others by name and id."""
        ordered = sorted((entry.resource for entry in self._entries.values()), key=_view_order)
        return tuple(_view(resource, sites) for resource in ordered)

    def _put(self, resource: Resource) -> bool:
        entry = self._entries.get(resource.id)
        if entry is not None and _place(entry.resource) == _place(resource):
            entry.resource = resource
            return False
        network = parse_network(resource.address) if isinstance(resource, CidrResource) else None
        self._entries[resource.id] = ActiveResource(resource, () if network is None else (network,))
        return entry is not None

    def _rebuild(self, void: Sequence[str] = ()) -> None:
        """Connections of `void` resources lead to where those were before."""
        table: PrefixTable[ActiveResource] = PrefixTable()
        entries = sorted(self._entries.values(), key=_id_order)
        for entry in entries:
            for network in entry.networks:
                occupant = table.get(network)
                is_used = occupant is not None and occupant.id not in void and self._is_connected(occupant.id)
                if not is_used:
                    table.insert(network, entry)
        filters = FilterTable(
            (network, Rules.of(entry.resource.filters))
            for entry in entries
            if isinstance(entry.resource, CidrResource)
            for network in entry.networks
        )
        for entry in entries:
            for network in entry.networks:
                entry.rules = filters.of(network)
        self._by_network = table
        self.lookup.cache_clear()

    def _find(self, address: bytes) -> ActiveResource | None:
        if is_tunnel_address(address) or is_multicast(address):
            return None
        return self._by_network.lookup(address)


class SiteStatuses:
    """The status of each site: online while a gateway of it is connected, offline if the portal reported it."""

    def __init__(self) -> None:
        self._gateways: dict[str, dict[str, None]] = {}  # by site: the connected ones, in order
        self._offline_until: dict[str, float] = {}

    def connected(self, site_id: str, gateway_id: str) -> None:
        self._gateways.setdefault(site_id, {})[gateway_id] = None
        self._offline_until.pop(site_id, None)

    def disconnected(self, gateway_id: str) -> None:
        for gateways in self._gateways.values():
            gateways.pop(gateway_id, None)

    def offline(self, site_ids: Iterable[str], now: float) -> None:
        for site_id in site_ids:
            self._offline_until[site_id] = now + OFFLINE_FOR

    def status(self, site_id: str) -> Status:
        if self._gateways.get(site_id):
            return Status.ONLINE
        return Status.OFFLINE if site_id in self._offline_until else Status.UNKNOWN

    def next_timeout(self) -> Timeout | None:
        return earliest(Timeout(until, "offline site to forget") for until in self._offline_until.values())

    def handle_timeout(self, now: float) -> bool:
        """Returns whether a status has changed."""
        over = [site_id for site_id, until in self._offline_until.items() if now >= until]
        for site_id in over:
            del self._offline_until[site_id]
        return bool(over)


_KINDS: dict[type[Resource], str] = {CidrResource: "cidr", DnsResource: "dns", InternetResource: "internet"}


def _place(resource: Resource) -> tuple[object, ...]:
    """Where a resource is. Once that changes, a connection made for it leads to the wrong place."""
    sites = sorted(site.id for site in resource.gateway_groups)
    address = None if isinstance(resource, InternetResource) else resource.address
    ip_stack = resource.ip_stack if isinstance(resource, DnsResource) else None
    return type(resource), address, ip_stack, sites


def _view(resource: Resource, sites: SiteStatuses) -> ResourceView:
    named = None if isinstance(resource, InternetResource) else resource
    return ResourceView(
        kind=_KINDS[type(resource)],
        id=resource.id,
        name="Internet Resource" if named is None else named.name,
        address=None if named is None else named.address,
        address_description=None if named is None else named.address_description,
        sites=tuple(resource.gateway_groups),
        status=_resource_status([sites.status(site.id) for site in resource.gateway_groups]),
    )


def _resource_status(sites: list[Status]) -> Status:
    if Status.ONLINE in sites:
        return Status.ONLINE
    if all(status is Status.OFFLINE for status in sites):
        return Status.OFFLINE
    return Status.UNKNOWN


def _id_order(entry: ActiveResource) -> str:
    return entry.id


def _view_order(resource: Resource) -> tuple[bool, bytes, str]:
    return not isinstance(resource, InternetResource), resource.name.encode(), resource.id


def _network_order(network: Network) -> tuple[int, int, int]:
    return network.version, int(network.network_address), network.prefixlen

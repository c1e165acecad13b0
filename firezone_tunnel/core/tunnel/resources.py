"""The resources of a client: which one an address belongs to, and how a front end shows them.

docs/protocol/data-plane.md, 4.2 and 4.3; docs/protocol/client-application.md, 1.9.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from collections.abc import Iterable
from functools import lru_cache

import attrs

from firezone_tunnel.core.messages.client import CidrResource, DnsResource, InternetResource, Resource
from firezone_tunnel.core.messages.common import Network, Site
from firezone_tunnel.core.sansio import Timeout, earliest
from firezone_tunnel.core.tunnel.filter import PERMIT_NOTHING, Rules
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
    """A resource in use. `networks` are what it routes, `rules` what passes to them."""

    resource: Resource
    networks: tuple[Network, ...]
    rules: Rules
    flow: float = float("inf")
    """Its place in the order in which the flows were made; infinite while it has none."""
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

    `lookup(address)` are the active resources of an address, 4 or 16 raw bytes: a packet is for the first whose rules
    permit it (docs/protocol/data-plane.md, 4.2). There are none for addresses of the tunnel itself and for multicast.
    Its answers are cached.

    A change costs the same however many resources there are. `revision` changes with `networks` and `views`.
    """

    def __init__(self, sites: SiteStatuses) -> None:
        self.revision = 0
        self._sites = sites
        self._entries: dict[str, ActiveResource] = {}
        self._by_network: PrefixTable[ActiveResource] = PrefixTable()
        self._networks: list[Network] = []  # sorted
        self._views: list[ResourceView] = []  # sorted
        self._flows = 0
        self.lookup = lru_cache(MAX_CACHED_DESTINATIONS)(self._find)

    def get(self, resource_id: str) -> ActiveResource | None:
        return self._entries.get(resource_id)

    def entries(self) -> Iterable[ActiveResource]:
        return self._entries.values()

    def set(self, resources: Iterable[Resource]) -> list[str]:
        """Have exactly these resources; returns the ids whose connections are void: gone, or now somewhere else."""
        wanted = {resource.id: resource for resource in resources}
        gone = [resource_id for resource_id in self._entries if resource_id not in wanted]
        for resource_id in gone:
            self.remove(resource_id)
        return gone + [resource.id for resource in wanted.values() if self.add(resource)]

    def add(self, resource: Resource) -> bool:
        """Insert or update a resource; returns whether its connection is void: it is now somewhere else."""
        entry = self._entries.get(resource.id)
        if entry is None:
            self._insert(resource)
            return False
        if entry.resource == resource:
            return False
        if _place(entry.resource) != _place(resource):
            self.remove(resource.id)
            self._insert(resource)
            return True
        self._hide(entry)
        entry.resource, entry.rules = resource, _rules(resource)
        self._show(entry)
        return False

    def remove(self, resource_id: str) -> bool:
        """Returns whether it was there."""
        entry = self._entries.pop(resource_id, None)
        if entry is None:
            return False
        self._hide(entry)
        for network in entry.networks:
            if self._by_network.remove(network, entry.id):
                del self._networks[bisect_left(self._networks, _network_order(network), key=_network_order)]
        self.lookup.cache_clear()
        return True

    def connected(self, resource_id: str) -> None:
        """A resource has a flow: those of the same network that have none, or get one later, don't displace it."""
        self._flows += 1
        self._entries[resource_id].flow = self._flows
        self.lookup.cache_clear()

    def disconnected(self, resource_id: str) -> None:
        """A resource has no flow any more."""
        self._entries[resource_id].flow = float("inf")
        self.lookup.cache_clear()

    def networks(self) -> list[Network]:
        """The networks that the host routes into the tunnel, sorted, IPv4 first."""
        return list(self._networks)

    def views(self) -> tuple[ResourceView, ...]:
        """All resources: the internet resource first, the others by name and id."""
        changed = self._sites.take_changed()
        if changed:
            self._views = [
                attrs.evolve(view, status=_resource_status(view.sites, self._sites))
                if any(site.id in changed for site in view.sites)
                else view
                for view in self._views
            ]
        return tuple(self._views)

    def _insert(self, resource: Resource) -> None:
        network = parse_network(resource.address) if isinstance(resource, CidrResource) else None
        entry = ActiveResource(resource, () if network is None else (network,), _rules(resource))
        self._entries[entry.id] = entry
        for network in entry.networks:
            if self._by_network.insert(network, entry.id, entry):
                insort(self._networks, network, key=_network_order)
        self._show(entry)
        self.lookup.cache_clear()

    def _show(self, entry: ActiveResource) -> None:
        insort(self._views, _view(entry.resource, self._sites), key=_view_order)
        self.revision += 1

    def _hide(self, entry: ActiveResource) -> None:
        view = _view(entry.resource, self._sites)
        del self._views[bisect_left(self._views, _view_order(view), key=_view_order)]
        self.revision += 1

    def _find(self, address: bytes) -> tuple[ActiveResource, ...]:
        if is_tunnel_address(address) or is_multicast(address):
            return ()
        return tuple(entry for network in self._by_network.holding(address) for entry in _in_turn(network.values()))


class SiteStatuses:
    """The status of each site: online while a gateway of it is connected, offline if the portal reported it.

    `revision` changes with the statuses.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._statuses: dict[str, Status] = {}
        self._changed: set[str] = set()
        self._gateways: dict[str, dict[str, None]] = {}  # by site: the connected ones, in order
        self._offline_until: dict[str, float] = {}

    def connected(self, site_id: str, gateway_id: str) -> None:
        self._gateways.setdefault(site_id, {})[gateway_id] = None
        self._offline_until.pop(site_id, None)
        self._follow(site_id)

    def disconnected(self, gateway_id: str) -> None:
        for site_id, gateways in self._gateways.items():
            if gateway_id in gateways:
                del gateways[gateway_id]
                self._follow(site_id)

    def offline(self, site_ids: Iterable[str], now: float) -> None:
        for site_id in site_ids:
            self._offline_until[site_id] = now + OFFLINE_FOR
            self._follow(site_id)

    def status(self, site_id: str) -> Status:
        return self._statuses.get(site_id, Status.UNKNOWN)

    def take_changed(self) -> set[str]:
        """The sites whose status has changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def next_timeout(self) -> Timeout | None:
        return earliest(Timeout(until, "offline site to forget") for until in self._offline_until.values())

    def handle_timeout(self, now: float) -> None:
        over = [site_id for site_id, until in self._offline_until.items() if now >= until]
        for site_id in over:
            del self._offline_until[site_id]
            self._follow(site_id)

    def _follow(self, site_id: str) -> None:
        status = Status.OFFLINE if site_id in self._offline_until else Status.UNKNOWN
        if self._gateways.get(site_id):
            status = Status.ONLINE
        if status is not self.status(site_id):
            self._statuses[site_id] = status
            self._changed.add(site_id)
            self.revision += 1


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
        status=_resource_status(resource.gateway_groups, sites),
    )


def _resource_status(groups: Iterable[Site], sites: SiteStatuses) -> Status:
    statuses = [sites.status(site.id) for site in groups]
    if Status.ONLINE in statuses:
        return Status.ONLINE
    if all(status is Status.OFFLINE for status in statuses):
        return Status.OFFLINE
    return Status.UNKNOWN


def _rules(resource: Resource) -> Rules:
    return Rules.of(resource.filters) if isinstance(resource, CidrResource) else PERMIT_NOTHING


def _in_turn(rivals: Iterable[ActiveResource]) -> list[ActiveResource]:
    """Resources of the same network: those with a flow in the order they got it, the others by descending id."""
    return sorted(sorted(rivals, key=_id_order, reverse=True), key=_flow_order)


def _id_order(entry: ActiveResource) -> str:
    return entry.id


def _flow_order(entry: ActiveResource) -> float:
    return entry.flow


def _view_order(view: ResourceView) -> tuple[bool, bytes, str]:
    return view.kind != "internet", view.name.encode(), view.id


def _network_order(network: Network) -> tuple[int, int, int]:
    return network.version, int(network.network_address), network.prefixlen

"""One client of a gateway: its authorizations and their filters (docs/protocol/data-plane.md, 6.1 and 6.5)."""

from __future__ import annotations

from functools import lru_cache

import attrs

from firezone_tunnel.core.messages.gateway import CidrResource, Resource
from firezone_tunnel.core.tunnel.filter import FilterTable, Rules
from firezone_tunnel.core.tunnel.prefixes import parse_network

_MAX_CACHED_ADDRESSES = 1024


class UnsupportedResource(Exception):
    """A resource of a kind that this gateway can't give access to."""


@attrs.frozen
class Allowed:
    """A resource that a client may use, until unix time `expires_at` if there is one."""

    resource: CidrResource
    expires_at: int | None

    @classmethod
    def of(cls, resource: Resource, expires_at: int | None) -> Allowed:
        """
        Raises: UnsupportedResource.
        """
        if not isinstance(resource, CidrResource):
            raise UnsupportedResource(f"this gateway gives access to networks and addresses only, not to {resource.id}")
        if parse_network(resource.address) is None:
            raise UnsupportedResource(f"{resource.address!r} is not a network")
        return cls(resource, expires_at)


class AdmittedClient:
    """The authorizations and addresses of a client, which outlive its connection.

    `rules(address)` are those of an address of 4 or 16 bytes, for packets to it and from it.
    """

    def __init__(self, cid: str) -> None:
        self.id = cid
        self.addresses: tuple[bytes, ...] = ()
        self.resources: dict[str, Allowed] = {}
        self._filters = FilterTable()
        self.rules = lru_cache(_MAX_CACHED_ADDRESSES)(self._rules)

    def allow(self, allowed: Allowed) -> None:
        """Give access to a resource, or renew it on the new terms."""
        self.resources[allowed.resource.id] = allowed
        self._rebuild()

    def forbid(self, rid: str) -> bool:
        """Returns whether it was allowed until now."""
        if self.resources.pop(rid, None) is None:
            return False
        self._rebuild()
        return True

    def update_filters(self, resource: Resource) -> None:
        """Only filters change: where an address does, the portal rejects the flow instead."""
        allowed = self.resources.get(resource.id)
        if allowed is None or not isinstance(resource, CidrResource):
            return
        changed = CidrResource(
            id=resource.id, name=resource.name, address=allowed.resource.address, filters=resource.filters
        )
        self.resources[resource.id] = attrs.evolve(allowed, resource=changed)
        self._rebuild()

    def set_expiry(self, rid: str, expires_at: int | None) -> None:
        allowed = self.resources.get(rid)
        if allowed is not None:
            self.resources[rid] = attrs.evolve(allowed, expires_at=expires_at)

    def first_expiry(self) -> int | None:
        return min((one.expires_at for one in self.resources.values() if one.expires_at is not None), default=None)

    def expired(self, utc_now: float) -> list[str]:
        """Resources that expire now or have expired (docs/protocol/gateway-and-relay.md, 3.6)."""
        return [rid for rid, one in self.resources.items() if one.expires_at is not None and one.expires_at <= utc_now]

    def _rebuild(self) -> None:
        allowed = [one.resource for one in self.resources.values()]
        networks = [(parse_network(resource.address), Rules.of(resource.filters)) for resource in allowed]
        self._filters = FilterTable((network, rules) for network, rules in networks if network is not None)
        self.rules.cache_clear()

    def _rules(self, address: bytes) -> Rules:
        return self._filters.lookup(address)

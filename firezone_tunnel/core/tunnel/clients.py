"""One client of a gateway: its authorizations and their filters (docs/protocol/data-plane.md, 6.1 and 6.5)."""

from __future__ import annotations

from functools import lru_cache

import attrs
import msgspec

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.core.messages.gateway import CidrResource, Resource
from firezone_tunnel.core.tunnel.filter import PERMIT_NOTHING, Rules
from firezone_tunnel.core.tunnel.prefixes import PrefixTable, is_tunnel_address, parse_network

_MAX_CACHED_ADDRESSES = 1024


class UnsupportedResource(Exception):
    """A resource of a kind that this gateway can't give access to."""


@attrs.frozen
class Allowed:
    """A resource that a client may use."""

    resource: CidrResource
    network: Network

    @classmethod
    def of(cls, resource: Resource) -> Allowed:
        """
        Raises: UnsupportedResource.
        """
        if not isinstance(resource, CidrResource):
            raise UnsupportedResource(f"this gateway gives access to networks and addresses only, not to {resource.id}")
        network = parse_network(resource.address)
        if network is None:
            raise UnsupportedResource(f"{resource.address!r} is not a network")
        return cls(resource, network)


class AdmittedClient:
    """The authorizations and addresses of a client, which outlive its connection.

    `rules(address)` are those of an address of 4 or 16 bytes, for packets to it and from it: the union over all
    resources whose network holds the address.
    """

    def __init__(self, cid: str) -> None:
        self.id = cid
        self.addresses: tuple[bytes, ...] = ()
        self.resources: dict[str, Allowed] = {}
        self._networks: PrefixTable[Rules] = PrefixTable()
        self.rules = lru_cache(_MAX_CACHED_ADDRESSES)(self._rules)

    def allow(self, allowed: Allowed) -> None:
        """Give access to a resource, or renew it on the new terms."""
        rid = allowed.resource.id
        self.forbid(rid)
        self.resources[rid] = allowed
        self._networks.insert(allowed.network, rid, Rules.of(allowed.resource.filters))
        self.rules.cache_clear()

    def forbid(self, rid: str) -> bool:
        """Returns whether it was allowed until now."""
        allowed = self.resources.pop(rid, None)
        if allowed is None:
            return False
        self._networks.remove(allowed.network, rid)
        self.rules.cache_clear()
        return True

    def update_filters(self, resource: Resource) -> None:
        """Only filters change: where an address does, the portal rejects the flow instead."""
        allowed = self.resources.get(resource.id)
        if allowed is None or not isinstance(resource, CidrResource):
            return
        changed = msgspec.structs.replace(resource, address=allowed.resource.address)
        self.allow(attrs.evolve(allowed, resource=changed))

    def _rules(self, address: bytes) -> Rules:
        if is_tunnel_address(address):
            return PERMIT_NOTHING  # whatever resource covers it: no client reaches another through a gateway
        return Rules.union(rules for network in self._networks.holding(address) for rules in network.values())

"""The operator's configuration: sites, groups, actors, tokens, resources and the policies that join them."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import attrs

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.portal.conditions import Condition
from firezone_tunnel.core.sansio import SocketAddress


class PeerRole(enum.Enum):
    """The role of a peer and of its token; the value is the Phoenix topic."""

    CLIENT = "client"
    GATEWAY = "gateway"
    RELAY = "relay"


def token_hash(token: str) -> str:
    """SHA3-256 of a token's text, in hex: the portal keeps nothing else of a token."""
    return hashlib.sha3_256(token.encode()).hexdigest()


@attrs.frozen
class Site:
    """Gateways that reach the same networks."""

    id: str
    name: str


@attrs.frozen
class Actor:
    """A person or a service that owns clients; `groups` are ids."""

    id: str
    name: str
    email: str | None
    groups: tuple[str, ...]


@attrs.frozen
class Token:
    """Admits devices of one role; `owner` is the id of an actor (client), of a site (gateway) or the account's."""

    id: str
    role: PeerRole
    hash: str
    owner: str
    expires_at: int | None

    def is_expired(self, utc_now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= utc_now


ResourceType = Literal["dns", "cidr", "ip", "internet"]
IpStack = Literal["dual", "ipv4_only", "ipv6_only"]


@attrs.frozen
class Resource:
    """`sites` are ids, sorted. `address` is a network for cidr and ip, a pattern for dns, and empty for internet."""

    id: str
    name: str
    type: ResourceType
    address: str
    address_description: str | None
    ip_stack: IpStack | None
    sites: tuple[str, ...]
    filters: tuple[Filter, ...]

    @property
    def reach(self) -> str:
        """The resource's type and place, as one string: when it changes, all flows to the resource end.

        See docs/protocol/portal-protocol.md, 3.8.
        """
        return "|".join((self.type, self.address, self.ip_stack or "", *self.sites))


@attrs.frozen
class Policy:
    """Lets the members of a group reach a resource while all conditions hold."""

    id: str
    group: str
    resource: str
    conditions: tuple[Condition, ...]


@attrs.frozen
class DnsSettings:
    """`upstream` are (address, port) pairs."""

    upstream: tuple[tuple[str, int], ...] = ()
    upstream_doh: tuple[str, ...] = ()
    search_domain: str | None = None


@attrs.frozen
class TurnServer:
    """A standard TURN server and our user on it. A realm of None is the one that the server names."""

    id: str
    name: str
    addresses: tuple[SocketAddress, ...]
    username: str
    password: str = attrs.field(repr=False)
    realm: str | None = None


@attrs.frozen
class Account:
    """The whole configuration. Mappings are by id, `tokens` by hash."""

    id: str
    name: str
    slug: str
    dns: DnsSettings
    sites: Mapping[str, Site]
    groups: Mapping[str, str]
    actors: Mapping[str, Actor]
    tokens: Mapping[str, Token]
    resources: Mapping[str, Resource]
    policies: tuple[Policy, ...]
    turn_servers: Mapping[str, TurnServer] = attrs.field(factory=dict)
    _by_resource: Mapping[str, Sequence[Policy]] = attrs.field(init=False, repr=False, eq=False)

    @_by_resource.default
    def _index_policies(self) -> Mapping[str, Sequence[Policy]]:
        index: dict[str, list[Policy]] = {}
        for policy in self.policies:
            index.setdefault(policy.resource, []).append(policy)
        return index

    def token(self, role: PeerRole, text: str, utc_now: float) -> Token | None:
        """The token with this text, if it is for this role and has not expired."""
        return self.live_token(role, token_hash(text), utc_now)

    def live_token(self, role: PeerRole, hash_: str, utc_now: float) -> Token | None:
        token = self.tokens.get(hash_)
        if token is None or token.role is not role or token.is_expired(utc_now):
            return None
        return token

    def policies_for(self, actor: Actor, resource_id: str) -> Iterator[Policy]:
        """The policies that give this actor this resource, if their conditions hold."""
        for policy in self._by_resource.get(resource_id, ()):
            if policy.group in actor.groups:
                yield policy

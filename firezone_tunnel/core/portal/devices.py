"""Clients and gateways as the portal knows them, and one connection of each (docs/protocol/portal-protocol.md, 3.1)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import attrs

from firezone_tunnel.core.messages.common import Generation
from firezone_tunnel.core.portal.account import PeerRole, Token
from firezone_tunnel.core.portal.derived_credentials import Party
from firezone_tunnel.core.portal.versions import UserAgent
from firezone_tunnel.core.sansio import Entropy


@attrs.frozen
class Identity:
    """Identifies a device across connections: its owner (an actor or a site) and its own id."""

    role: PeerRole
    owner: str
    external_id: str


@attrs.frozen
class Device:
    """A client or a gateway. Id, addresses and `psk_base` are assigned once; the rest is of its newest connection."""

    id: str
    identity: Identity
    name: str
    public_key: str
    psk_base: bytes = attrs.field(repr=False)
    ipv4: str
    ipv6: str
    remote_ip: str
    user_agent: str

    @property
    def party(self) -> Party:
        return Party(self.id, self.public_key, self.psk_base)


class PeerSocket(Protocol):
    """The socket of a connected peer. Its methods neither wait nor fail."""

    def push(self, event: str, payload: Any) -> None: ...

    def close(self) -> None:
        """Close the socket; the peer may come back."""

    def disconnect(self, reason: str) -> None:
        """Push `disconnect` with this reason and close the socket. After "token_expired" the peer stays away."""

    def probe(self) -> None:
        """Have the kernel find out within seconds whether the peer's host is still there, and end the socket if not."""


@attrs.define(eq=False)
class DeviceSession:
    """One connection of a client or gateway."""

    device: Device
    generation: Generation
    agent: UserAgent
    token: Token
    socket: PeerSocket
    is_joined: bool = False
    contested_since: float | None = None
    """When another host was first refused because of this session."""
    relays: dict[str, str] = attrs.Factory(dict)
    """Its relays: relay id to the stamp secret that the credentials were derived from."""
    resources: dict[str, Mapping[str, Any]] = attrs.Factory(dict)
    """The resources that a client was sent, by id."""

    @property
    def role(self) -> PeerRole:
        return self.device.identity.role


def new_id(entropy: Entropy) -> str:
    """A random UUID, version 4."""
    return str(uuid.UUID(bytes=entropy(16), version=4))

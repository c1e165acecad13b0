"""A relay's configuration: plain values, which are sent to its workers as JSON."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

import attrs

from firezone_tunnel.core.relay.allocator import RelayConfig
from firezone_tunnel.core.relay.credentials import CredentialSource, StampSecret, StaticUsers
from firezone_tunnel.core.relay.nonce import NONCE_KEY_SIZE
from firezone_tunnel.core.relay.peer_policy import Network, PeerPolicy
from firezone_tunnel.core.stun.message import FAMILY_IPV6, FIREZONE_REALM

DRAIN_TIME = 30.0  # docs/decisions.md, 6

_STAMP_SECRET_SIZE = 32  # docs/protocol/gateway-and-relay.md, 6.2


@attrs.frozen
class EngineConfig:
    """The configuration of an `Engine`."""

    relaying: RelayConfig
    bind_ipv4: str = "0.0.0.0"
    bind_ipv6: str = "::"
    own_hosts: tuple[str, ...] = ()
    """Addresses of this host, which users may not reach through the relay."""
    allow_peers: tuple[str, ...] = ()
    """Special-purpose networks to which the relay relays nevertheless."""
    drain_time: float = DRAIN_TIME

    def bind_host(self, family: int) -> str:
        """The address to listen on, of a family as STUN numbers them."""
        return self.bind_ipv6 if family == FAMILY_IPV6 else self.bind_ipv4

    def policy(self) -> PeerPolicy:
        """
        Raises: ValueError for an invalid address or network.
        """
        allow: list[Network] = [ipaddress.ip_network(network) for network in self.allow_peers]
        return PeerPolicy(
            relayed_hosts=self.relaying.hosts.values(),
            own_hosts=self.own_hosts,
            lowest_port=self.relaying.lowest_port,
            highest_port=self.relaying.highest_port,
            allow=allow,
        )


@attrs.frozen(repr=False)
class Secrets:
    """The secrets behind credentials and nonces, the same in each worker.

    With `users` (passwords by name), the relay serves these users only; else holders of names derived from the secret.
    """

    stamp_secret: str
    nonce_key: bytes
    users: Mapping[str, str] | None = None
    realm: str = FIREZONE_REALM

    @classmethod
    def new(cls, users: Mapping[str, str] | None = None, realm: str = FIREZONE_REALM) -> Secrets:
        return cls(os.urandom(_STAMP_SECRET_SIZE).hex(), os.urandom(NONCE_KEY_SIZE), users, realm)

    def credentials(self) -> CredentialSource:
        """
        Raises: ValueError for a realm that is empty or too long.
        """
        return StampSecret(self.stamp_secret) if self.users is None else StaticUsers(self.users, self.realm)

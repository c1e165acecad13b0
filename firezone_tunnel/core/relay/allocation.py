"""An allocation: a client's relayed addresses, permissions and channels (RFC 8656, sections 3.2 to 3.5).

Every use compares times, so everything expires exactly on time; `prune` only frees numbers and memory.
"""

from __future__ import annotations

import attrs

from firezone_tunnel.core.sansio import SocketAddress, Timeout
from firezone_tunnel.core.stun.message import FAMILY_IPV4, FAMILY_IPV6

PERMISSION_LIFETIME = 300.0  # RFC 8656, section 9
CHANNEL_LIFETIME = 600.0  # RFC 8656, section 12
CHANNEL_REST = 300.0  # RFC 8656, section 12: before the number or peer may be bound to another
MAX_CHANNELS = 4096  # of one allocation: all numbers that the RFC has
MAX_PERMISSIONS = 1024


@attrs.define
class Quota:
    """The limits for all allocations of a relay together, and what they use."""

    max_channels: int
    max_permissions: int
    channels: int = 0
    permissions: int = 0


class ChannelBinding:
    """A channel number bound to a peer. After its lifetime it stays reserved for another five minutes."""

    __slots__ = ("bound_until", "is_relayed", "number", "peer")

    def __init__(self, number: int, peer: SocketAddress, *, is_relayed: bool) -> None:
        self.number = number
        self.peer = peer
        self.bound_until = float("-inf")
        self.is_relayed = is_relayed
        """The peer's address is one of this relay's allocations (or was, or will be)."""


class Allocation:
    """A client's allocation. `relayed` has its address of each family, all with the same port."""

    __slots__ = (
        "channels",
        "channels_by_peer",
        "client",
        "expires_at",
        "local",
        "owner",
        "permissions",
        "port",
        "quota",
        "relayed",
        "token",
        "transaction_id",
        "username",
        "wants_indications",
    )

    def __init__(
        self,
        client: SocketAddress,
        local: SocketAddress,
        *,
        port: int,
        hosts: dict[int, str],
        username: str,
        owner: str,
        transaction_id: bytes,
        expires_at: float,
        quota: Quota,
        token: bytes | None = None,
    ) -> None:
        """`hosts` are public addresses by family; `local` is our address that the client uses."""
        self.client = client
        self.local = local
        self.port = port
        self.relayed = {family: SocketAddress(host, port) for family, host in hosts.items()}
        self.expires_at = dict.fromkeys(hosts, expires_at)
        self.username = username
        self.owner = owner
        self.transaction_id = transaction_id
        self.token = token
        self.quota = quota
        self.channels: dict[int, ChannelBinding] = {}
        self.channels_by_peer: dict[SocketAddress, ChannelBinding] = {}
        self.permissions: dict[str, float] = {}
        self.wants_indications = False

    def bind(self, number: int, peer: SocketAddress, now: float, *, is_relayed: bool) -> int:
        """Bind or renew a channel and install the permission that comes with it. Returns 0 or the error code.

        400: the number or peer is bound to another, or still reserved. 508: too many. `prune` must be up to date.
        """
        channel = self.channels.get(number)
        if self.channels_by_peer.get(peer) is not channel:
            return 400
        if not self.may_permit([peer.host]):
            return 508
        if channel is None:
            if len(self.channels) >= MAX_CHANNELS or self.quota.channels >= self.quota.max_channels:
                return 508
            channel = ChannelBinding(number, peer, is_relayed=is_relayed)
            self.channels[number] = self.channels_by_peer[peer] = channel
            self.quota.channels += 1
        channel.bound_until = now + CHANNEL_LIFETIME
        self.permit([peer.host], now)
        return 0

    def may_permit(self, hosts: list[str]) -> bool:
        """Whether the limits allow permissions for all these hosts."""
        new = len(dict.fromkeys(host for host in hosts if host not in self.permissions))
        quota = self.quota
        return len(self.permissions) + new <= MAX_PERMISSIONS and quota.permissions + new <= quota.max_permissions

    def permit(self, hosts: list[str], now: float) -> None:
        """Install or renew permissions. Call `may_permit` first."""
        before = len(self.permissions)
        for host in hosts:
            self.permissions[host] = now + PERMISSION_LIFETIME
        self.quota.permissions += len(self.permissions) - before

    def is_permitted(self, host: str, now: float) -> bool:
        return self.permissions.get(host, now) > now

    def refresh(self, families: list[int], expires_at: float) -> None:
        for family in families:
            self.expires_at[family] = expires_at

    def expired(self, now: float) -> list[int]:
        """The families that have expired."""
        return [family for family, at in self.expires_at.items() if at <= now]

    def remove(self, families: list[int]) -> None:
        """Drop relayed addresses, with the channels and permissions of their families."""
        for family in families:
            del self.relayed[family]
            del self.expires_at[family]
        self._keep(
            [one for one in self.channels.values() if family_of(one.peer.host) in self.relayed],
            {host: until for host, until in self.permissions.items() if family_of(host) in self.relayed},
        )

    def prune(self, now: float) -> None:
        """Forget expired channels and permissions."""
        if not self.channels and not self.permissions:
            return
        self._keep(
            [one for one in self.channels.values() if one.bound_until + CHANNEL_REST > now],
            {host: until for host, until in self.permissions.items() if until > now},
        )

    def next_timeout(self) -> Timeout:
        """When something expires and memory or a port can be freed."""
        ends = [*self.expires_at.values(), *self.permissions.values()]
        ends += [channel.bound_until + CHANNEL_REST for channel in self.channels.values()]
        return Timeout(min(ends), "allocation, channel or permission over")

    def __repr__(self) -> str:
        return f"<Allocation {self.port} of {self.client} with {len(self.channels)} channels>"

    def _keep(self, channels: list[ChannelBinding], permissions: dict[str, float]) -> None:
        self.quota.channels += len(channels) - len(self.channels)
        self.quota.permissions += len(permissions) - len(self.permissions)
        if len(channels) != len(self.channels):
            self.channels = {channel.number: channel for channel in channels}
            self.channels_by_peer = {channel.peer: channel for channel in channels}
        if len(permissions) != len(self.permissions):
            self.permissions = permissions


def family_of(host: str) -> int:
    """The family of an address in text, as STUN numbers them."""
    return FAMILY_IPV6 if ":" in host else FAMILY_IPV4

"""The joined relays, their assignment to peers, and updates (docs/protocol/portal-protocol.md, 3.3, 3.4, 4.4)."""

from __future__ import annotations

import hashlib

import attrs

from firezone_tunnel.core.messages.common import Relay, RelaysPresence
from firezone_tunnel.core.portal.account import PeerRole, Token
from firezone_tunnel.core.portal.derived_credentials import FOREVER, relay_credentials
from firezone_tunnel.core.portal.devices import DeviceSession, PeerSocket
from firezone_tunnel.core.sansio import SocketAddress, Timeout

RELAYS_EACH = 2  # docs/protocol/portal-protocol.md, 3.3
DEBOUNCE = 1.0  # docs/protocol/portal-protocol.md, 3.3, V2


@attrs.define(eq=False)
class RelaySession:
    """One connection of a relay: its public addresses, at most one of a family, IPv4 first."""

    id: str
    token: Token
    addresses: tuple[SocketAddress, ...]
    socket: PeerSocket
    stamp_secret: str = attrs.field(default="", repr=False)


class RelayRegistry:
    """The joined relays. Changes are announced after a second, so that a burst is announced once and a flap never."""

    def __init__(self) -> None:
        self._relays: dict[str, RelaySession] = {}
        self._settles_at: float | None = None
        self._urgent = False

    def join(self, relay: RelaySession, now: float) -> RelaySession | None:
        """Add a relay. Returns the older connection of the same relay, which the caller closes."""
        displaced = self._relays.get(relay.id)
        self._relays[relay.id] = relay
        self._changed(now)
        # Peers without any relay, or with credentials that the restarted relay refuses, get an update at once.
        self._urgent = True
        return displaced if displaced is not relay else None

    def leave(self, relay: RelaySession, now: float) -> None:
        if self._relays.get(relay.id) is relay:
            del self._relays[relay.id]
            self._changed(now)

    def all(self) -> list[RelaySession]:
        return list(self._relays.values())

    def assign(self, session: DeviceSession) -> list[Relay]:
        """Choose up to two relays for a client or gateway, remember them in its session, and derive credentials.

        A dual-stack relay is two adjacent entries. The choice depends only on the device and the joined relays, so a
        device that reconnects gets the same relays.
        """
        chosen = self._choose(session)
        session.relays = {relay.id: relay.stamp_secret for relay in chosen}
        expires_at = FOREVER
        if session.role is PeerRole.CLIENT and session.token.expires_at is not None:
            expires_at = session.token.expires_at
        return [
            relay_credentials(
                relay.id,
                address,
                stamp_secret=relay.stamp_secret,
                public_key=session.device.public_key,
                expires_at=expires_at,
            )
            for relay in chosen
            for address in relay.addresses
        ]

    def urgent_updates(self, sessions: list[DeviceSession]) -> list[tuple[DeviceSession, RelaysPresence]]:
        """Updates that can't wait for the debounce: a relay is back with another secret, or a peer had none."""
        if not self._urgent:
            return []
        self._urgent = False
        return self._updates([one for one in sessions if not one.relays or self._has_restarted_relay(one)])

    def next_timeout(self) -> Timeout | None:
        return None if self._settles_at is None else Timeout(self._settles_at, "relays settled")

    def settled_updates(self, sessions: list[DeviceSession], now: float) -> list[tuple[DeviceSession, RelaysPresence]]:
        """Once the debounce is over: the updates for peers with a relay that is gone, or with too few."""
        if self._settles_at is None or now < self._settles_at:
            return []
        self._settles_at = None
        return self._updates(sessions)

    def _updates(self, sessions: list[DeviceSession]) -> list[tuple[DeviceSession, RelaysPresence]]:
        updates = []
        for session in sessions:
            gone = [id_ for id_, secret in session.relays.items() if not self._is_good(id_, secret)]
            if gone or len(session.relays) < min(RELAYS_EACH, len(self._relays)):
                updates.append((session, RelaysPresence(disconnected_ids=gone, connected=self.assign(session))))
        return updates

    def _is_good(self, id_: str, secret: str) -> bool:
        return id_ in self._relays and self._relays[id_].stamp_secret == secret

    def _has_restarted_relay(self, session: DeviceSession) -> bool:
        return any(id_ in self._relays and not self._is_good(id_, secret) for id_, secret in session.relays.items())

    def _choose(self, session: DeviceSession) -> list[RelaySession]:
        """Keep the relays that are still valid; choose the others by rendezvous hashing, which is even and stable."""

        def rank(relay: RelaySession) -> tuple[bool, bytes]:
            is_kept = session.relays.get(relay.id) == relay.stamp_secret
            return not is_kept, hashlib.sha256(f"{session.device.id}{relay.id}".encode()).digest()

        return sorted(self._relays.values(), key=rank)[:RELAYS_EACH]

    def _changed(self, now: float) -> None:
        if self._settles_at is None:
            self._settles_at = now + DEBOUNCE

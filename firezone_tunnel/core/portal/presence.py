"""Who is connected right now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.core.portal.devices import DeviceSession, Identity

SWAP_WINDOW = 60.0
SWAPS_TOLERATED = 3  # more swaps within the window: two hosts share an identity


class SwapCounter:
    """Counts how often another host connected with the identity of a device that was connected."""

    def __init__(self) -> None:
        self._swaps: dict[str, list[float]] = {}

    def note(self, id_: str, now: float) -> bool:
        """Count one. True when there are too many."""
        recent = [at for at in self._swaps.get(id_, []) if now - at < SWAP_WINDOW]
        self._swaps[id_] = [*recent[-SWAPS_TOLERATED:], now]
        return len(recent) >= SWAPS_TOLERATED

    def is_excessive(self, id_: str, now: float) -> bool:
        """Whether one more would be too many."""
        return sum(now - at < SWAP_WINDOW for at in self._swaps.get(id_, [])) >= SWAPS_TOLERATED

    def forget_old(self, now: float) -> None:
        """Drop outdated counts. Called periodically."""
        self._swaps = {id_: ats for id_, ats in self._swaps.items() if now - ats[-1] < SWAP_WINDOW}


class Presence:
    """Connected clients and gateways by device id. An arriving connection replaces an older one of the device."""

    def __init__(self) -> None:
        self._sessions: dict[str, DeviceSession] = {}
        self._by_identity: dict[Identity, DeviceSession] = {}

    def arrive(self, session: DeviceSession) -> DeviceSession | None:
        """Returns the older connection of the same device, to be closed."""
        displaced = self._sessions.get(session.device.id)
        self._sessions[session.device.id] = session
        self._by_identity[session.device.identity] = session
        if displaced is not None:
            displaced.is_joined = False
        return displaced

    def leave(self, session: DeviceSession) -> bool:
        """False if a newer connection has replaced it."""
        session.is_joined = False
        if self._sessions.get(session.device.id) is not session:
            return False
        del self._sessions[session.device.id]
        del self._by_identity[session.device.identity]
        return True

    def with_identity(self, identity: Identity) -> DeviceSession | None:
        """The session of this device, joined or about to join."""
        return self._by_identity.get(identity)

    def all(self) -> list[DeviceSession]:
        return list(self._sessions.values())

    def joined(self, role: PeerRole) -> Iterator[DeviceSession]:
        for session in self.all():
            if session.role is role and session.is_joined:
                yield session

    def get(self, role: PeerRole, id_: str) -> DeviceSession | None:
        """The joined session of this device."""
        session = self.connected(role, id_)
        return session if session is not None and session.is_joined else None

    def connected(self, role: PeerRole, id_: str) -> DeviceSession | None:
        """The session of this device, joined or about to join. Pushes wait for the join."""
        session = self._sessions.get(id_)
        return session if session is not None and session.role is role else None

    def gateways_of(self, sites: Sequence[str]) -> list[DeviceSession]:
        """Joined gateways of any of these sites, ordered by id."""
        found = [one for one in self.joined(PeerRole.GATEWAY) if one.device.identity.owner in sites]
        return sorted(found, key=lambda one: one.device.id)

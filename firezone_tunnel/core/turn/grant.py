"""A granted allocation: its relayed addresses, their lifetime and their channels (docs/protocol/data-plane.md, 3.6)."""

from __future__ import annotations

import attrs

from firezone_tunnel.core.ice.candidate import Candidate, is_usable
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import LIFETIME, XOR_RELAYED_ADDRESS, Message
from firezone_tunnel.core.turn.channel import ChannelBindings

DEFAULT_LIFETIME = 600  # RFC 8656, section 3.2; for a relay that names none


@attrs.define(eq=False)
class Grant:
    candidates: tuple[Candidate, ...]
    """One per address family, at least one."""
    expires_at: float
    refresh_at: float | None
    """When the regular REFRESH is due; None once it was sent."""
    channels: ChannelBindings = attrs.field(factory=ChannelBindings)

    @classmethod
    def from_answer(cls, message: Message, relay: SocketAddress, now: float) -> Grant | None:
        """Read the success answer to an ALLOCATE at `relay`. None: it grants no usable address, or no time."""
        candidates: dict[bool, Candidate] = {}
        for address in message.get_all(XOR_RELAYED_ADDRESS):
            if is_usable(address):
                other_family = address.is_ipv6 != relay.is_ipv6
                candidates.setdefault(address.is_ipv6, Candidate.relayed(address, other_family=other_family))
        lifetime = granted_lifetime(message)
        if not candidates or not lifetime:
            return None
        return cls(tuple(candidates.values()), now + lifetime, now + lifetime / 2)

    def extend(self, lifetime: int, now: float) -> None:
        self.expires_at = now + lifetime
        self.refresh_at = now + lifetime / 2

    def relayed(self, is_ipv6: bool) -> SocketAddress | None:
        """Our address of that family."""
        for candidate in self.candidates:
            if candidate.address.is_ipv6 == is_ipv6:
                return candidate.address
        return None


def granted_lifetime(message: Message) -> int:
    """Seconds from now; 0: the allocation was deleted."""
    lifetime = message.get(LIFETIME)
    return DEFAULT_LIFETIME if lifetime is None else lifetime

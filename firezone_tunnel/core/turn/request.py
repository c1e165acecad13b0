"""A request of an allocation's owner to its relay."""

from __future__ import annotations

from typing import Any

import attrs

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS, Attribute
from firezone_tunnel.core.stun.transaction import Transaction


@attrs.define(eq=False)
class Request(Transaction):
    """A transaction whose transmissions are signed, each with the newest nonce, or not."""

    is_signed: bool = True
    nonce: str | None = None
    """What the latest transmission carried."""
    challenges: int = 0
    """How often it was sent again because of a 401 or 438."""
    after_deletion: bool = False
    """An ALLOCATE right after the relay was asked to delete an earlier allocation."""

    @property
    def is_deletion(self) -> bool:
        return (LIFETIME, 0) in self.attributes

    @property
    def channel(self) -> int:
        """The number that a CHANNEL-BIND asks for."""
        return int(self._value(CHANNEL_NUMBER))

    @property
    def peer(self) -> SocketAddress:
        """The peer that a CHANNEL-BIND asks for."""
        peer: SocketAddress = self._value(XOR_PEER_ADDRESS)
        return peer

    def _value(self, wanted: Attribute[Any]) -> Any:
        return next(value for attribute, value in self.attributes if attribute == wanted)

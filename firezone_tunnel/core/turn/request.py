"""The requests that an allocation sends (docs/protocol/data-plane.md, 3.3).

Each begins with the attributes below, in this order; credentials are appended when it is sent.
"""

from __future__ import annotations

from typing import Any

import attrs

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    FAMILY_IPV6,
    LIFETIME,
    REQUESTED_TRANSPORT,
    SOFTWARE,
    UDP,
    XOR_PEER_ADDRESS,
    Attribute,
    Method,
)
from firezone_tunnel.core.stun.transaction import BACKOFF, Transaction

_SOFTWARE: tuple[Attribute[Any], Any] = (SOFTWARE, "firezone_tunnel")


@attrs.define(eq=False)
class Request(Transaction):
    """A transaction whose transmissions may be signed, each with the newest nonce."""

    is_signed: bool = False
    nonce: str | None = None
    """The nonce that the latest transmission carried."""
    challenges: int = 0
    """How many 401 and 438 errors were followed."""
    after_deletion: bool = False
    """An ALLOCATE right after the relay deleted an earlier allocation."""

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


def binding(relay: SocketAddress) -> Request:
    return Request(Method.BINDING, relay, (_SOFTWARE,))


def allocate(relay: SocketAddress, *, after_deletion: bool = False) -> Request:
    attributes = ((REQUESTED_TRANSPORT, UDP), (ADDITIONAL_ADDRESS_FAMILY, FAMILY_IPV6), _SOFTWARE)
    return Request(Method.ALLOCATE, relay, attributes, after_deletion=after_deletion)


def refresh(relay: SocketAddress, *, schedule: tuple[float, ...] = BACKOFF) -> Request:
    """Without REQUESTED-TRANSPORT and ADDITIONAL-ADDRESS-FAMILY, which upstream sends: coturn answers 420."""
    return Request(Method.REFRESH, relay, (_SOFTWARE,), schedule)


def deletion(relay: SocketAddress) -> Request:
    return Request(Method.REFRESH, relay, (_SOFTWARE, (LIFETIME, 0)))


def channel_bind(relay: SocketAddress, channel: int, peer: SocketAddress) -> Request:
    return Request(Method.CHANNEL_BIND, relay, ((XOR_PEER_ADDRESS, peer), (CHANNEL_NUMBER, channel), _SOFTWARE))

"""The state that all connections of a portal share: configuration, connected peers, store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from firezone_tunnel.apps.portal.store import Store
from firezone_tunnel.core.phoenix.channel import IDENTITY_SHARED
from firezone_tunnel.core.portal.account import Account
from firezone_tunnel.core.portal.devices import PeerSocket
from firezone_tunnel.core.portal.flows import FlowAuthorizer
from firezone_tunnel.core.portal.presence import Presence, SwapCounter
from firezone_tunnel.core.portal.relay_registry import RelayRegistry
from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.shell.logs.limiter import Limiter


@attrs.define(eq=False)
class PortalState:
    """`account` is replaced as a whole when the seed is reloaded; `now` and `utc_now` are the clocks."""

    account: Account
    store: Store
    flows: FlowAuthorizer
    entropy: Entropy
    now: Callable[[], float]
    utc_now: Callable[[], float]
    presence: Presence = attrs.Factory(Presence)
    swaps: SwapCounter = attrs.Factory(SwapCounter)
    relays: RelayRegistry = attrs.Factory(RelayRegistry)

    limiter: Limiter = attrs.Factory(lambda self: Limiter(clock=self.now), takes_self=True)

    def displace(self, id_: str, socket: PeerSocket, **fields: Any) -> None:
        """Close the older connection of a device or relay that a newer one replaced (docs/decisions.md, 25)."""
        if self.swaps.note(id_, self.now()):
            self.warn_of_twins(id_, **fields)
        socket.disconnect(IDENTITY_SHARED)

    def warn_of_twins(self, id_: str, **fields: Any) -> None:
        advice = "two hosts share one identity: give each its own --firezone-id, or a state directory of its own"
        self.limiter.warning("portal:identity_shared", key=id_, device=id_, **fields, advice=advice)

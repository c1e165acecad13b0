"""The state that all connections of a portal share: configuration, connected peers, store."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from firezone_tunnel.apps.portal.store import Store
from firezone_tunnel.core.portal.account import Account
from firezone_tunnel.core.portal.devices import PeerSocket
from firezone_tunnel.core.portal.flows import FlowAuthorizer
from firezone_tunnel.core.portal.presence import Presence, SwapCounter
from firezone_tunnel.core.portal.relay_registry import RelayRegistry
from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.shell.logs import events as log


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

    def displace(self, id_: str, socket: PeerSocket) -> None:
        """Close the older connection of a device or relay that a newer one replaced (docs/decisions.md, 25)."""
        if self.swaps.note(id_, self.now()):
            log.warning("portal:identity_shared", device=id_, advice="two hosts share one identity: give each its own")
        socket.close()

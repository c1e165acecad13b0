"""The state that all connections of a portal share: configuration, connected peers, store."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from firezone_tunnel.logs import events as log
from firezone_tunnel.policy.account import Account
from firezone_tunnel.policy.devices import PeerSocket
from firezone_tunnel.policy.flows import FlowAuthorizer
from firezone_tunnel.policy.presence import Presence, SwapCounter
from firezone_tunnel.policy.relay_registry import RelayRegistry
from firezone_tunnel.portal.store import Store
from firezone_tunnel.sansio import Entropy


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
        """Close the older connection of a device or relay that a newer one replaced (decision 25)."""
        if self.swaps.note(id_, self.now()):
            log.warning("portal:identity_shared", device=id_, advice="two hosts share one identity: give each its own")
        socket.close()

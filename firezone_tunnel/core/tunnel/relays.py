"""Turn the portal's relays into the node's terms (docs/protocol/data-plane.md, 2.10)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from firezone_tunnel.core.messages.common import Relay
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.relays import RelayTerms
from firezone_tunnel.core.stun.message import FIREZONE_REALM


def relay_terms(relays: Iterable[Relay]) -> list[RelayTerms]:
    """One entry a relay, where the portal has one for each of its addresses."""
    merged: dict[str, dict[bool, SocketAddress]] = {}
    last: dict[str, Relay] = {}
    for relay in relays:
        address = relay.address
        merged.setdefault(relay.id, {})[address.is_ipv6] = address
        last[relay.id] = relay
    return [
        RelayTerms(
            rid=rid,
            ipv4=addresses.get(False),
            ipv6=addresses.get(True),
            username=last[rid].username,
            password=last[rid].password,
            realm=_realm(last[rid]),
        )
        for rid, addresses in merged.items()
    ]


def _realm(relay: Relay) -> str | None:
    return FIREZONE_REALM if isinstance(relay.realm, msgspec.UnsetType) else relay.realm

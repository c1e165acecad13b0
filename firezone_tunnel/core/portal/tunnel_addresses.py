"""Tunnel addresses of clients and gateways: assigned once, kept for life (docs/protocol/portal-protocol.md, 3.5)."""

from __future__ import annotations

import ipaddress
from collections.abc import Container

from firezone_tunnel.core.messages.common import IPAddress, Network
from firezone_tunnel.core.sansio import Entropy

RESERVED = (ipaddress.IPv4Network("100.64.0.0/10"), ipaddress.IPv6Network("fd00:2021:1111::/48"))
"""No resource and no upstream resolver may lie in these networks."""

_FIRST_OFFSET = 2  # the network's own address and the one after it are never assigned


def allocate(network: Network, taken: Container[str], entropy: Entropy) -> IPAddress | None:
    """The first free address upwards from a random offset, else downwards; None if all are taken."""
    last = network.num_addresses - 2
    start = _FIRST_OFFSET + int.from_bytes(entropy(8)) % (last - _FIRST_OFFSET + 1)
    for offsets in (range(start, last + 1), range(start - 1, _FIRST_OFFSET - 1, -1)):
        for offset in offsets:
            address = network[offset]
            if str(address) not in taken:
                return address
    return None

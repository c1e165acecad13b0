"""IP networks as an operator writes them."""

from __future__ import annotations

import ipaddress

from firezone_tunnel.core.messages.common import Network


def parse_network(text: str) -> Network:
    """Parse a network such as 10.20.0.0/24, or a single address.

    Raises: ValueError, with a message for the operator, for host bits and scopes too: the first may be meant as one
    address or as the network, the second is what peers can't parse.
    """
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address or network, such as 10.20.0.0/24") from None
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which peers can't parse")
    network = interface.network
    if interface.ip != network.network_address:
        raise ValueError(f"{text!r} has host bits: the network is '{network}', the address alone '{interface.ip}'")
    return network

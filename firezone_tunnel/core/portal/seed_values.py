"""The notations of single values in the portal's seed file."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.portal.account import ResourceType
from firezone_tunnel.core.portal.networks import parse_network
from firezone_tunnel.core.portal.tunnel_addresses import RESERVED
from firezone_tunnel.core.sansio import SocketAddress

_DNS_PORT = 53
_PATTERN_LABEL = re.compile(r"\*\*|[a-z0-9_*?-]{1,63}")
_FILTER = re.compile(r"(?P<other>icmp)|(?P<protocol>tcp|udp)(?:/(?P<first>[0-9]{1,5})(?:-(?P<last>[0-9]{1,5}))?)?")
_HOST_AND_PORT = re.compile(r"(?:\[([^]]*)\]|([^:]*))(?::([0-9]{1,5}))?")
_HOST_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


def parse_address(kind: ResourceType, text: str) -> str:
    """A resource's address in its wire form.

    Raises: ValueError, as all functions here, with a message for the operator.
    """
    if kind == "internet":
        if text:
            raise ValueError("an internet resource has no address")
        return ""
    if kind == "dns":
        return _parse_pattern(text)
    network = parse_network(text)
    if kind == "ip" and network.num_addresses != 1:
        raise ValueError(f"{text!r} is a network, not an address: use type cidr")
    if network.prefixlen == 0:
        raise ValueError(f"{text} covers everything: use type internet")
    if network.is_loopback:
        raise ValueError(f"{text} is the loopback network, which every host has for itself")
    if any(network.version == one.version and network.overlaps(one) for one in RESERVED):
        raise ValueError(f"{text} overlaps the tunnel's own addresses (100.64.0.0/10, fd00:2021:1111::/48)")
    return str(network)


def _parse_pattern(text: str) -> str:
    pattern = text.lower().rstrip(".")
    labels = pattern.split(".")
    if not pattern or len(pattern) > 253 or not all(_PATTERN_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is not a domain name or pattern")
    last = labels[-1]
    if "*" in last or "?" in last or last == "localhost":
        raise ValueError(f"{text!r}: the last label must be a plain top-level domain")
    if last.isdigit():
        raise ValueError(f"{text!r} is an IP address: use type ip")
    return pattern


def check_host(text: str) -> None:
    """A domain name without wildcards."""
    if len(text) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in text.lower().split(".")):
        raise ValueError(f"{text!r} is not a domain name")


def check_https_url(text: str) -> None:
    """An unreadable URL would make clients drop the whole `init`."""
    try:
        url = urlsplit(text)
        is_valid = url.scheme == "https" and bool(url.hostname) and url.port != 0
    except ValueError:  # of brackets or the port
        is_valid = False
    if not is_valid or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{text!r} is not a https:// URL")


def parse_filter(text: str) -> Filter:
    """`icmp`, `tcp`, `udp/53` or `tcp/8000-8080`."""
    found = _FILTER.fullmatch(text.replace(" ", "").lower())
    if found is None:
        raise ValueError(f"{text!r} is not a filter (icmp, tcp, udp/53, tcp/8000-8080)")
    if found["other"]:
        return Filter(protocol="icmp")
    start, end = int(found["first"] or 0), int(found["last"] or found["first"] or 0xFFFF)
    if not start <= end <= 0xFFFF:
        raise ValueError(f"{text!r} is not a valid port range")
    return Filter(protocol="tcp" if found["protocol"] == "tcp" else "udp", port_range_start=start, port_range_end=end)


def parse_resolver(text: str) -> tuple[str, int]:
    """`10.0.0.53`, `10.0.0.53:53`, `2001:db8::53` or `[2001:db8::53]:53`."""
    host, port = text, _DNS_PORT
    found = _HOST_AND_PORT.fullmatch(text)
    if found is not None:
        host, port = found[1] or found[2], int(found[3] or _DNS_PORT)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is None or "%" in host or not 0 < port <= 0xFFFF:
        raise ValueError(f"{text!r} is not the address of a resolver (10.0.0.53, 10.0.0.53:53, [2001:db8::53]:53)")
    if any(address in one for one in RESERVED):
        raise ValueError(f"the resolver {text} lies in the tunnel's own addresses")
    return str(address), port


def parse_socket_address(text: str) -> SocketAddress:
    """`192.0.2.3:3478` or `[2001:db8::3]:3478`."""
    try:
        return SocketAddress.parse(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an address and port, such as 192.0.2.3:3478") from None

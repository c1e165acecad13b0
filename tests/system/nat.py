"""NATs between a host and the internet, as routers made of namespaces with nftables.

    none         the host has public IPv4 and IPv6 addresses
    cone         the router keeps the source port if possible, so that all peers see the same mapping
    fullcone     a cone that forwards UDP port 52625 to the host, also for hosts inside (hairpinning)
    symmetric    a random port for each destination, so that the address seen by a relay is useless for other peers
    double       a cone behind a cone
    cgn          a cone behind a carrier's cone that uses 100.64.0.0/10
    udp-blocked  a cone that blocks outgoing UDP except to port 3478, the relay's port

A single kind applies to both sides, `client,gateway` gives one for each. In the pairs `v6-v4` and `v4-v6` each side has
a public address of one family only.

Each NAT drops packets from outside to its own addresses, as real NATs do. Otherwise the kernel would track the flow of
a peer's early check, and the port would be taken when the host behind the NAT sends from it: the cone would sometimes
behave as a symmetric NAT.

Hosts behind a NAT have no IPv6, because a direct IPv6 path would bypass the NAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tests.system.hosts import Host, Lab, Switch

KINDS = ("none", "cone", "fullcone", "symmetric", "double", "cgn", "udp-blocked")
INTERNET_ROUTERS = ("203.0.113.1", "2001:db8:113::1")
RELAY_PORT = 3478

_FORWARDED_PORT = 52625  # the preferred port of clients and gateways
_FAMILY_PAIRS = {"v6-v4": ("v6", "v4"), "v4-v6": ("v4", "v6")}


class Pair(NamedTuple):
    """The NATs of client and gateway: each is one of KINDS, or "v4" or "v6" for public addresses of one family."""

    client: str
    gateway: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Parse the value of NAT= or --nat.

        Raises: ValueError.
        """
        if text in _FAMILY_PAIRS:
            return cls(*_FAMILY_PAIRS[text])
        client, comma, gateway = text.partition(",")
        pair = cls(client, gateway if comma else client)
        for kind in pair:
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is not a kind of NAT: use one of {', '.join((*KINDS, *_FAMILY_PAIRS))}")
        return pair

    @property
    def is_direct(self) -> bool:
        """Whether the two sides can reach each other without a relay (docs/decisions.md, 8)."""
        if "udp-blocked" in self or set(self) == {"v4", "v6"}:
            return False
        mapped = ["cone" if kind in {"double", "cgn"} else kind for kind in self]
        return "none" in mapped or "fullcone" in mapped or mapped == ["cone", "cone"]

    def __str__(self) -> str:
        for name, kinds in _FAMILY_PAIRS.items():
            if self == kinds:
                return name
        return self.client if self.client == self.gateway else f"{self.client},{self.gateway}"


@dataclass(frozen=True)
class Place:
    """The public addresses of a host or its NAT. `number` makes its private networks unique."""

    ipv4: str
    ipv6: str
    number: int


def connect(lab: Lab, host: Host, internet: Switch, place: Place, kind: str) -> list[Host]:
    """Connect a host's eth0 to the internet through NATs of this kind. Returns the routers, the outermost first."""
    if kind not in _CHAINS:
        families = {"none": (place.ipv4, place.ipv6), "v4": (place.ipv4,), "v6": (place.ipv6,)}[kind]
        plug(host, internet, *families)
        return []
    routers: list[Host] = []
    outer: _Layer | None = None
    for layer in _CHAINS[kind]:
        router = lab.host(f"{host.name}-nat{len(routers) + 1}", forwards=True)
        if outer is None:
            outside = place.ipv4
            plug(router, internet, outside, interface=_OUTSIDE)
        else:
            outside = _put_behind(routers[-1], router, _OUTSIDE, f"{outer.inside}.{place.number}")
        network = f"{layer.inside}.{place.number}"
        router.run("nft", "-f", "-", stdin=_rules(layer, outside=outside, host=f"{network}.2"))
        routers.append(router)
        outer = layer
    assert outer is not None
    _put_behind(routers[-1], host, "eth0", f"{outer.inside}.{place.number}")
    return routers


def plug(host: Host, internet: Switch, *addresses: str, interface: str = "eth0") -> None:
    """Connect a new interface of a host to the internet, with a default route for each address family."""
    lengths = {False: 24, True: 64}
    with_lengths = [f"{address}/{lengths[':' in address]}" for address in addresses]
    gateways = tuple(INTERNET_ROUTERS[":" in address] for address in addresses)
    internet.plug(host, *with_lengths, interface=interface, gateways=gateways)


_OUTSIDE = "wan"  # names of a router's interfaces
_INSIDE = "lan"


@dataclass(frozen=True)
class _Layer:
    """One router. `inside` is the prefix of the network behind it; the place's number follows."""

    inside: str = "192.168"
    masquerade: str = "masquerade"
    forwards_port: bool = False
    blocks_udp: bool = False


_CONE = _Layer()
_CHAINS = {
    "cone": (_CONE,),
    "fullcone": (_Layer(forwards_port=True),),
    "symmetric": (_Layer(masquerade="masquerade random,fully-random"),),
    "double": (_Layer(inside="172.16"), _CONE),
    "cgn": (_Layer(inside="100.64"), _CONE),
    "udp-blocked": (_Layer(blocks_udp=True),),
}


def _put_behind(router: Host, host: Host, interface: str, network: str) -> str:
    """Connect a host or another router to this router. Returns its address in the new network."""
    router.lab.cable(host, interface, router, _INSIDE)
    router.add_address(_INSIDE, f"{network}.1/24")
    host.add_address(interface, f"{network}.2/24")
    host.ip("route", "add", "default", "via", f"{network}.1", "dev", interface)
    return f"{network}.2"


def _rules(layer: _Layer, *, outside: str, host: str) -> str:
    """The nftables rules of a router with this public address and one host behind it."""
    forwarded = f"ip daddr {outside} udp dport {_FORWARDED_PORT} dnat to {host}" if layer.forwards_port else ""
    hairpin = f"iifname {_INSIDE} oifname {_INSIDE} ct status dnat masquerade" if layer.forwards_port else ""
    admitted = "ct status dnat accept" if layer.forwards_port else ""
    blocked = f"iifname {_INSIDE} udp dport != {RELAY_PORT} drop" if layer.blocks_udp else ""
    return f"""
table ip nat {{
    chain input {{
        type filter hook input priority filter
        iifname {_OUTSIDE} ct state != {{ established, related }} drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop
        {blocked}
        iifname {_INSIDE} accept
        ct state {{ established, related }} accept
        {admitted}
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat
        {forwarded}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat
        oifname {_OUTSIDE} {layer.masquerade}
        {hairpin}
    }}
}}
"""

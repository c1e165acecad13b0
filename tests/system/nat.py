"""NATs: what can stand between a host and the internet, as routers made of namespaces with nftables.

    none         the host's own addresses are public, IPv4 and IPv6
    cone         the router keeps the source port where it can: one host behind it looks the same to everybody
    fullcone     as well, and the router's owner has forwarded UDP 52625 to the host, also for those inside (hairpin)
    symmetric    a random port for each destination: what a relay sees of the host is of no use to anybody else
    double       a cone behind a cone
    cgn          the same with a carrier's 100.64.0.0/10 between the two, and nowhere else
    udp-blocked  a cone that lets no UDP out but to port 3478, a relay's

Of a pair, one kind stands for both sides; `client,gateway` names them one by one; in the pairs `v6-v4` and `v4-v6` each
side has public addresses, but of that family only.

Every NAT drops what arrives from outside for itself. A real one does so, too; and a kernel that lets it in remembers
the flow of a peer's early check, so that the port is taken when the host behind the NAT wants to answer from it: the
same cone is then sometimes a cone and sometimes symmetric.

Hosts behind a NAT have no IPv6 at all: behind a firewall without translation it would open paths that say nothing
about the NAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tests.system.hosts import Host, Lab, Switch

KINDS = ("none", "cone", "fullcone", "symmetric", "double", "cgn", "udp-blocked")
INTERNET_ROUTERS = ("203.0.113.1", "2001:db8:113::1")
RELAY_PORT = 3478

_FORWARDED_PORT = 52625  # the one that clients and gateways prefer
_FAMILY_PAIRS = {"v6-v4": ("v6", "v4"), "v4-v6": ("v4", "v6")}


class Pair(NamedTuple):
    """What the client and the gateway are behind: each one of KINDS, or "v4" or "v6" for that family alone."""

    client: str
    gateway: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read what NAT= may be.

        Raises: ValueError.
        """
        if text in _FAMILY_PAIRS:
            return cls(*_FAMILY_PAIRS[text])
        client, comma, gateway = text.partition(",")
        pair = cls(client, gateway if comma else client)
        for kind in pair:
            if kind not in KINDS:
                raise ValueError(f"no kind of NAT: {kind!r}; there are {', '.join((*KINDS, *_FAMILY_PAIRS))}")
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
    """Where a host is on the internet, by itself or by its NAT; `number` tells its private networks from others."""

    ipv4: str
    ipv6: str
    number: int


def connect(lab: Lab, host: Host, internet: Switch, place: Place, kind: str) -> list[Host]:
    """Connect a host's eth0 to the internet, through NATs of this kind; returns their routers, the outermost first."""
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
    """Connect a host's new interface to the internet, with a default route for each family that it has."""
    lengths = {False: 24, True: 64}
    with_lengths = [f"{address}/{lengths[':' in address]}" for address in addresses]
    gateways = tuple(INTERNET_ROUTERS[":" in address] for address in addresses)
    internet.plug(host, *with_lengths, interface=interface, gateways=gateways)


_OUTSIDE = "wan"  # the names of a router's interfaces
_INSIDE = "lan"


@dataclass(frozen=True)
class _Layer:
    """One router. `inside` is how the network behind it begins, in front of the place's number."""

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
    """Give a host, or another router, a cable to this router; returns the address that it has there."""
    router.lab.cable(host, interface, router, _INSIDE)
    router.add_address(_INSIDE, f"{network}.1/24")
    host.add_address(interface, f"{network}.2/24")
    host.ip("route", "add", "default", "via", f"{network}.1", "dev", interface)
    return f"{network}.2"


def _rules(layer: _Layer, *, outside: str, host: str) -> str:
    """What nft is to do on a router with this public address, for the one host behind it."""
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

"""Which protocols and ports pass to and from an address.

See docs/protocol/data-plane.md, 6.5; docs/protocol/gateway-and-relay.md, 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from firezone_tunnel.core.messages.common import Filter, Network
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, TCP, UDP, SuperPacket
from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6, PrefixTable, lies_in_tunnel

PortRange = tuple[int, int]
"""First and last port, both inclusive."""


@attrs.frozen
class Rules:
    """The packets that may pass. By default none may."""

    everything: bool = False
    tcp: tuple[PortRange, ...] = ()
    udp: tuple[PortRange, ...] = ()
    icmp: bool = False

    @classmethod
    def of(cls, filters: Sequence[Filter]) -> Rules:
        """The rules of one resource: an empty list lets everything pass."""
        if not filters:
            return PERMIT_ALL
        ranges = [(one.protocol, (one.port_range_start, one.port_range_end)) for one in filters]
        return cls(
            tcp=tuple(ports for protocol, ports in ranges if protocol == "tcp"),
            udp=tuple(ports for protocol, ports in ranges if protocol == "udp"),
            icmp=any(protocol == "icmp" for protocol, _ in ranges),
        )

    @classmethod
    def union(cls, several: Iterable[Rules]) -> Rules:
        """The union of several rules."""
        several = list(several)
        if any(rules.everything for rules in several):
            return PERMIT_ALL
        return cls(
            tcp=tuple(ports for rules in several for ports in rules.tcp),
            udp=tuple(ports for rules in several for ports in rules.udp),
            icmp=any(rules.icmp for rules in several),
        )

    def permits(self, packet: SuperPacket, port: int) -> bool:
        """Whether a packet passes whose port on the resource's side is `port`.

        The ports of a fragment are not known: it passes only where everything does.
        """
        if self.everything:
            return True
        if packet.fragment:
            return False
        protocol = packet.protocol
        if protocol == TCP:
            ranges = self.tcp
        elif protocol == UDP:
            ranges = self.udp
        else:
            return self.icmp and protocol in {ICMP, ICMPV6}
        for first, last in ranges:  # noqa: SIM110  # a generator costs three times as much for one range
            if first <= port <= last:
                return True
        return False


PERMIT_ALL = Rules(everything=True)
PERMIT_NOTHING = Rules()


class FilterTable:
    """The rules of networks. Those of a network are the union over all the given networks that contain it."""

    __slots__ = ("_rules",)

    def __init__(self, networks: Iterable[tuple[Network, Rules]] = ()) -> None:
        given: PrefixTable[list[Rules]] = PrefixTable()
        distinct: dict[Network, list[Rules]] = {}
        for network, rules in networks:
            if not lies_in_tunnel(network):
                distinct.setdefault(network, []).append(rules)
        for network, all_rules in distinct.items():
            given.insert(network, all_rules)
        self._rules: PrefixTable[Rules] = PrefixTable()
        for network in distinct:
            self._rules.insert(network, Rules.union(rules for each in given.covering(network) for rules in each))
        # Whatever resource covers them: one client doesn't reach another through a gateway.
        self._rules.insert(TUNNEL_IPV4, PERMIT_NOTHING)
        self._rules.insert(TUNNEL_IPV6, PERMIT_NOTHING)

    def lookup(self, address: bytes) -> Rules:
        """The rules of the longest prefix of an address of 4 or 16 bytes; where there is none, nothing passes."""
        return self._rules.lookup(address) or PERMIT_NOTHING

    def of(self, network: Network) -> Rules:
        """The rules of one of the networks themselves."""
        return self._rules.get(network) or PERMIT_NOTHING

"""Which protocols and ports pass to and from an address.

See docs/protocol/data-plane.md, 6.5; docs/protocol/gateway-and-relay.md, 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.packet.icmp import quoted_packet
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, TCP, UDP, SuperPacket

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

    def permits_report(self, error: SuperPacket) -> bool:
        """Whether a packet to the resource is an ICMP error about one that the resource may have sent to its sender.

        A path of the client's that is too narrow, or a closed port, is then known to the resource without a permission
        for ICMP. The error says nothing about any other flow.
        """
        quoted = quoted_packet(error)
        if quoted is None or quoted.source != error.destination or quoted.destination != error.source:
            return False
        return self.permits(quoted, quoted.source_port)


PERMIT_ALL = Rules(everything=True)
PERMIT_NOTHING = Rules()

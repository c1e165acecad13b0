"""The gateways of a client, and which resources each serves (docs/protocol/data-plane.md, 4.4 and 4.7)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from functools import lru_cache

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.core.packet.icmp import is_icmp_error, is_of_a_host, quoted_packet
from firezone_tunnel.core.packet.superpacket import ICMP_PROTOCOLS, SuperPacket
from firezone_tunnel.core.tunnel.prefixes import PrefixTable

MAX_RECENT = 100  # docs/protocol/data-plane.md, 4.4
_MAX_CACHED_SOURCES = 1024


class Gateway:
    """One gateway. `may_send_from(address)` says whether it serves this address of 4 or 16 bytes, or has it itself."""

    def __init__(self, gid: str, site_id: str, addresses: tuple[bytes, bytes]) -> None:
        self.id = gid
        self.site_id = site_id
        self.addresses = addresses
        self.resources: dict[str, tuple[Network, ...]] = {}
        self._networks: PrefixTable[bool] = PrefixTable()
        self.may_send_from = lru_cache(_MAX_CACHED_SOURCES)(self._may_send_from)

    def may_send(self, packet: SuperPacket) -> bool:
        """Whether a packet to our own address may come from this gateway.

        Its source is served by the gateway. An ICMP error may come from any router behind it instead, as only the
        router knows its address; but the packet that it quotes must be from that own address of ours to one that this
        gateway serves. So a gateway affects only flows that it carries anyway, whose packets it could as well drop or
        answer itself, and none through another gateway or outside the tunnel. That there is such a flow, and that a
        quoted TCP sequence number is in its window, the host's kernel verifies (RFC 5927, section 4).
        """
        if packet.protocol not in ICMP_PROTOCOLS or not is_icmp_error(packet):
            return self.may_send_from(packet.source)
        quoted = quoted_packet(packet)
        if quoted is None or quoted.source != packet.destination or not is_of_a_host(packet.source):
            return False
        return self.may_send_from(quoted.destination)

    def serve(self, rid: str, networks: tuple[Network, ...]) -> None:
        """Serve a resource that it doesn't serve yet."""
        self.resources[rid] = networks
        for network in networks:
            self._networks.insert(network, rid, True)
        self.may_send_from.cache_clear()

    def stop_serving(self, rid: str) -> None:
        for network in self.resources.pop(rid, ()):
            self._networks.remove(network, rid)
        self.may_send_from.cache_clear()

    def _may_send_from(self, address: bytes) -> bool:
        return address in self.addresses or bool(self._networks.holding(address))


class Gateways:
    """All gateways by id, by what they serve, and by their own tunnel addresses."""

    def __init__(self) -> None:
        self._by_id: dict[str, Gateway] = {}
        self._by_resource: dict[str, Gateway] = {}
        self._by_address: dict[bytes, Gateway] = {}
        self._recent: dict[str, None] = {}  # the latest last
        self.get = self._by_id.get
        """The gateway of an id, or None."""
        self.serving = self._by_resource.get
        """The gateway through which a resource is reached, by the resource's id, or None."""
        self.at = self._by_address.get
        """The gateway whose own tunnel address this is, 4 or 16 bytes, or None."""

    def recent(self) -> Iterator[str]:
        """The gateways connected lately, the latest first: a hint for the portal to stay with them."""
        return reversed(self._recent)

    def forget_recent(self) -> None:
        self._recent.clear()

    def upsert(self, gid: str, site_id: str, ipv4: str, ipv6: str) -> Gateway:
        """A gateway that the portal named, known or not.

        Raises: ValueError if its addresses are invalid.
        """
        addresses = (ipaddress.IPv4Address(ipv4).packed, ipaddress.IPv6Address(ipv6).packed)
        gateway = self._by_id.get(gid)
        if gateway is None:
            gateway = self._by_id[gid] = Gateway(gid, site_id, addresses)
        self._forget_addresses(gateway)
        gateway.site_id, gateway.addresses = site_id, addresses
        gateway.may_send_from.cache_clear()
        self._by_address.update(dict.fromkeys(addresses, gateway))
        return gateway

    def serve(self, gateway: Gateway, rid: str, networks: tuple[Network, ...]) -> None:
        """From now on this gateway, and no other, serves a resource."""
        self.stop_serving(rid)
        gateway.serve(rid, networks)
        self._by_resource[rid] = gateway

    def stop_serving(self, rid: str) -> Gateway | None:
        """The gateway that served a resource until now, if any did."""
        gateway = self._by_resource.pop(rid, None)
        if gateway is not None:
            gateway.stop_serving(rid)
        return gateway

    def stop_serving_all(self, gateway: Gateway) -> list[str]:
        """The resources that it served until now."""
        served = list(gateway.resources)
        for rid in served:
            self.stop_serving(rid)
        return served

    def connected(self, gateway: Gateway) -> None:
        self._recent.pop(gateway.id, None)
        self._recent[gateway.id] = None
        if len(self._recent) > MAX_RECENT:
            del self._recent[next(iter(self._recent))]

    def remove(self, gid: str) -> list[str]:
        """A gateway's connection is gone: no gateway serves its resources, whose ids are returned."""
        gateway = self._by_id.pop(gid, None)
        if gateway is None:
            return []
        self._forget_addresses(gateway)
        return self.stop_serving_all(gateway)

    def _forget_addresses(self, gateway: Gateway) -> None:
        """Those that are still its own: the portal may have given one to another gateway since."""
        for address in gateway.addresses:
            if self._by_address.get(address) is gateway:
                del self._by_address[address]

"""The client's data plane: which resource a packet is for, through which gateway it goes, and which replies are valid.

docs/protocol/data-plane.md, 4; the packets themselves are carried by the node's connections.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

import attrs

from firezone_tunnel.core.datagrams import BufferPool, DatagramBatch
from firezone_tunnel.core.messages import client as messages
from firezone_tunnel.core.messages.common import Interface, Network, PortalMessage, RelaysPresence
from firezone_tunnel.core.packet.icmp import SOURCE_REFUSED, icmp_error
from firezone_tunnel.core.packet.reset import is_reset, tcp_reset
from firezone_tunnel.core.packet.superpacket import TCP, SuperPacket
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionEvent,
    ConnectionFailed,
    InvalidatedCandidates,
    NewCandidates,
    RelayNews,
    Role,
)
from firezone_tunnel.core.tunnel import control
from firezone_tunnel.core.tunnel.answer_limit import AnswerLimit
from firezone_tunnel.core.tunnel.base import GOODBYE, ToPortal, Tunnel, ice_credentials
from firezone_tunnel.core.tunnel.gateways import Gateways
from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6
from firezone_tunnel.core.tunnel.resources import ActiveResource, ResourceTable, ResourceView, SiteStatuses
from firezone_tunnel.core.tunnel.waiting import WaitingPackets
from firezone_tunnel.core.wireguard.seal import SealBuffer
from firezone_tunnel.errors import ProtocolError

ASK_AGAIN_AFTER = 2.0  # docs/protocol/data-plane.md, 4.4
# How recently a resource was used whose flow is asked for again after roaming (docs/decisions.md, 3).
RECENT_TRAFFIC = 20.0
PUBLISH_INTERVAL = 0.25
"""Seconds between two reports of the whole configuration or of all resources, at least."""

_PUBLICATION = "publication"  # the key of the deadline


@attrs.frozen
class TunConfig:
    """The configuration of the tunnel's interface."""

    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address
    routes: tuple[Network, ...]  # sorted, IPv4 first
    search_domain: str | None = None


@attrs.frozen
class TunConfigChanged:
    config: TunConfig


@attrs.frozen
class ResourcesChanged:
    resources: tuple[ResourceView, ...]


@attrs.frozen
class FlowRefused:
    """The portal refused a flow: "offline", "version_mismatch", "forbidden", "not_found", ..."""

    rid: str
    reason: str


@attrs.frozen
class FlowIgnored:
    """The portal named a gateway that we can't connect to."""

    rid: str
    gid: str
    reason: str


@attrs.frozen
class PacketFiltered:
    """The filters of a resource refused a packet. `port` is its destination port; 0 if it has none."""

    rid: str
    protocol: int
    port: int


ClientEvent = (
    PacketFiltered
    | ToPortal
    | TunConfigChanged
    | ResourcesChanged
    | FlowRefused
    | FlowIgnored
    | ConnectionEvent
    | RelayNews
)
"""The `peer_id` of a connection event is the gateway's id."""


@attrs.define
class ClientCounters:
    """Packets that were dropped, by reason."""

    without_resource: int = 0
    foreign_source: int = 0
    """Sent by the host from an address other than the tunnel's. Answered with a TCP reset or ICMP."""
    filtered: int = 0
    unexpected_source: int = 0
    """From a gateway that doesn't serve the source, or not to our own address; ICMP errors about other packets."""
    unknown_control: int = 0
    waiting_overwritten: int = 0
    """Too many packets were waiting for a flow."""


@attrs.define
class _PendingFlow:
    asked_at: float = float("-inf")
    packets: WaitingPackets = attrs.field(factory=WaitingPackets)


class ClientTunnel(Tunnel):
    """A client's data plane."""

    def __init__(self, *, entropy: Entropy, now: float, pool: BufferPool[SealBuffer]) -> None:
        super().__init__(Role.CLIENT, entropy=entropy, now=now, pool=pool)
        self.counters = ClientCounters()
        self._sites = SiteStatuses()
        self._resources = ResourceTable(self._sites)
        self._gateways = Gateways()
        self._pending: dict[str, _PendingFlow] = {}
        self._config: TunConfig | None = None
        self._views: tuple[ResourceView, ...] | None = None
        self._published: tuple[Interface, int, int] | None = None
        self._publish_from = float("-inf")
        self._wanted_again: tuple[str, ...] = ()
        self._hosts: frozenset[bytes] = frozenset()  # the host's own addresses outside of the tunnel
        self._answer_limit = AnswerLimit(now)

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None:
        super().set_local_addresses(addresses, now)
        self._hosts = frozenset(ipaddress.ip_address(address.host).packed for address in addresses)

    def handle_packets(self, packets: Sequence[SuperPacket], now: float, utc_now: float) -> list[SuperPacket]:
        """Handle packets that the host sent into the tunnel. Returns answers to the host."""
        answers: list[SuperPacket] = []
        lookup, serving = self._resources.lookup, self._gateways.serving
        encapsulate, own, counters = self.node.encapsulate, self._own, self.counters
        for packet in packets:
            if packet.source not in own:
                counters.foreign_source += packet.segments
                if (answer := self._refuse_source(packet, now)) is not None:
                    answers.append(answer)
                continue
            candidates = lookup(packet.destination)
            if not candidates:
                self._send_to_gateway_itself(packet, now, utc_now)
                continue
            port = packet.destination_port
            for resource in candidates:
                if resource.rules.permits(packet, port) or resource.rules.permits_report(packet):
                    break
            else:
                counters.filtered += packet.segments
                self._events.append(PacketFiltered(candidates[0].id, packet.protocol, port))
                if (answer := icmp_error(packet)) is not None:
                    answers.append(answer)
                continue
            resource.used_at = now
            gateway = serving(resource.id)
            if gateway is None:
                self._want(resource, packet, now)
            else:
                encapsulate(gateway.id, packet, now, utc_now)
        self.node.flush(now)
        self._follow_node(now)
        return answers

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[SuperPacket]:
        """Handle a batch from the network. Returns the packets for the host."""
        accepted: list[SuperPacket] = []
        own, counters = self._own, self.counters
        for gid, packets in self.node.handle_datagrams(batch, now, utc_now):
            gateway = self._gateways.get(gid)
            for packet in packets:
                if gateway is not None and packet.destination in own and gateway.may_send(packet):
                    accepted.append(packet)
                elif control.is_control(packet):
                    self._handle_control(gid, packet, now)
                else:
                    counters.unexpected_source += packet.segments
        self._follow_node(now)
        return accepted

    def handle_message(self, message: messages.FromPortal, now: float, utc_now: float) -> None:
        """Handle a message of the portal."""
        match message:
            case messages.Init():
                self._handle_init(message, now)
            case messages.ConfigChanged():
                self._set_interface(message.interface)
            case messages.ResourceChanged():
                if self._resources.add(message.resource):
                    self._forget_flow(message.resource.id, now)
            case messages.ResourceDeleted():
                if self._resources.remove(message.id):
                    self._forget_flow(message.id, now)
            case messages.FlowCreated():
                self._handle_flow(message, now, utc_now)
            case messages.FlowCreationFailed():
                self._handle_refusal(message, now)
            case messages.IceCandidates():
                self._add_candidates(message.gateway_id, message.candidates, now)
            case messages.InvalidateIceCandidates():
                self._remove_candidates(message.gateway_id, message.candidates, now)
            case RelaysPresence():
                self._update_relays(message, now)
        self._follow_node(now)
        self._publish(now)

    def reset(self, now: float, *, paused: float = 0.0) -> None:
        """Start again with a new key after the network has changed: with new sockets and a new portal connection.

        Flows with recent traffic are asked for again as soon as the portal has answered (docs/decisions.md, 3);
        `paused` seconds, during which the host didn't run, don't count.
        """
        entries = sorted(self._resources.entries(), key=_latest_first)
        self._wanted_again = tuple(entry.id for entry in entries if entry.used_at > now - paused - RECENT_TRAFFIC)
        self._is_joined = False
        self.node.reset(now, farewell=GOODBYE)
        self._gateways.forget_recent()
        self._follow_node(now)
        self._publish(now)

    def handle_timeout(self, now: float, utc_now: float) -> None:
        if self._sites in self.node.handle_timeout(now, utc_now):
            self._sites.handle_timeout(now)
        self._schedule_sites()
        self._follow_node(now)
        self._publish(now)

    def _refuse_source(self, packet: SuperPacket, now: float) -> SuperPacket | None:
        """The answer to a packet from an address other than the tunnel's; None where there must be none.

        It belongs to a connection from before the tunnel had this destination, or to an application that is bound to
        an address of another interface. Neither can work: the application learns that at once, and may try again.
        What the host forwards is never reset. Its NAT lets packets through unchanged that it can't assign (conntrack's
        INVALID), and these belong to a connection that works.
        """
        if not self._own or is_reset(packet):
            return None
        if packet.protocol == TCP and not packet.fragment and packet.source in self._hosts:
            answer = tcp_reset(packet)
        else:
            answer = icmp_error(packet, SOURCE_REFUSED)
        return answer if answer is not None and self._answer_limit.take(now) else None

    def _send_to_gateway_itself(self, packet: SuperPacket, now: float, utc_now: float) -> None:
        gateway = self._gateways.at(packet.destination)
        if gateway is None:
            self.counters.without_resource += packet.segments
        else:
            self.node.encapsulate(gateway.id, packet, now, utc_now)

    def _want(self, resource: ActiveResource, packet: SuperPacket, now: float) -> None:
        """Keep a packet until there is a gateway for it, and ask for one, though not for every packet."""
        pending = self._pending.setdefault(resource.id, _PendingFlow())
        if (oldest := pending.packets.add(packet)) is not None:
            self.counters.waiting_overwritten += oldest.segments
        if now >= pending.asked_at + ASK_AGAIN_AFTER:
            self._ask(resource.id, pending, now)

    def _ask(self, rid: str, pending: _PendingFlow, now: float) -> None:
        if not self._is_joined:
            return
        pending.asked_at = now
        recent = list(self._gateways.recent())
        self._events.append(ToPortal(messages.CreateFlow(resource_id=rid, connected_gateway_ids=recent)))

    def _handle_init(self, init: messages.Init, now: float) -> None:
        self._set_interface(init.interface)
        for rid in self._resources.set(init.resources):
            self._forget_flow(rid, now)
        self._start_relays(init.relays, now)
        for rid in self._wanted_again:
            if self._resources.get(rid) is not None and self._gateways.serving(rid) is None:
                self._pending.setdefault(rid, _PendingFlow())
        for rid, pending in self._pending.items():  # whatever was asked of an earlier connection is forgotten there
            if len(pending.packets) or rid in self._wanted_again:
                self._ask(rid, pending, now)
        self._wanted_again = ()

    def _handle_flow(self, flow: messages.FlowCreated, now: float, utc_now: float) -> None:
        rid, gid = flow.resource_id, flow.gateway_id
        resource = self._resources.get(rid)
        pending = self._pending.get(rid)
        if resource is None or pending is None:
            return  # it went away meanwhile, or this answers a question that was answered before
        try:
            gateway = self._gateways.upsert(gid, flow.gateway_group_id, flow.gateway_ipv4, flow.gateway_ipv6)
            is_kept = self.node.upsert_connection(
                gid,
                remote_public_key=flow.gateway_public_key,
                preshared_key=flow.preshared_key,
                local=ice_credentials(flow.client_ice_credentials),
                remote=ice_credentials(flow.gateway_ice_credentials),
                now=now,
                utc_now=utc_now,
            )
        except (ProtocolError, ValueError) as error:
            self._events.append(FlowIgnored(rid, gid, str(error)))
            if not self.node.has_connection(gid):
                self._gateways.remove(gid)
            return
        if not is_kept:  # a gateway that has begun anew knows nothing of what it served before
            self._disconnect(self._gateways.stop_serving_all(gateway))
        del self._pending[rid]
        self._gateways.serve(gateway, rid, resource.networks)
        self._resources.connected(rid)
        for packet in pending.packets.take():
            self.node.encapsulate(gid, packet, now, utc_now)
        self.node.flush(now)

    def _handle_refusal(self, refusal: messages.FlowCreationFailed, now: float) -> None:
        rid, reason = refusal.resource_id, refusal.reason
        self._events.append(FlowRefused(rid, reason))
        resource = self._resources.get(rid)
        if reason == "offline" and resource is not None:
            self._sites.offline(resource.site_ids, now)
            self._schedule_sites()
        if (pending := self._pending.get(rid)) is not None:
            pending.packets.take()  # the next packet asks again, after two seconds at the earliest

    def _handle_control(self, gid: str, packet: SuperPacket, now: float) -> None:
        if isinstance(control.decode(packet), control.Goodbye):
            self.node.close_connection(gid, now)
        else:
            self.counters.unknown_control += 1

    def _forget_flow(self, rid: str, now: float) -> None:
        """A resource is gone, or is somewhere else now. Its gateway stays connected while it serves others."""
        self._pending.pop(rid, None)
        gateway = self._gateways.stop_serving(rid)
        if gateway is not None and not gateway.resources:
            self.node.close_connection(gateway.id, now, farewell=GOODBYE)

    def _follow_node(self, now: float) -> None:
        if self.node.has_events:
            super()._follow_node(now)
            self._publish(now)

    def _handle_node_event(self, event: ConnectionEvent | RelayNews) -> None:
        match event:
            case ConnectionEstablished(gid):
                self._established(gid)
            case ConnectionFailed(gid) | ConnectionClosed(gid):
                self._disconnect(self._gateways.remove(gid))
                self._sites.disconnected(gid)

    def _broadcast(self, event: NewCandidates | InvalidatedCandidates) -> PortalMessage:
        is_new = isinstance(event, NewCandidates)
        kind = messages.BroadcastIceCandidates if is_new else messages.BroadcastInvalidatedIceCandidates
        return kind(gateway_ids=[event.peer_id], candidates=list(event.candidates))

    def _established(self, gid: str) -> None:
        gateway = self._gateways.get(gid)
        if gateway is not None:
            self._gateways.connected(gateway)
            self._sites.connected(gateway.site_id, gid)
            self._schedule_sites()

    def _disconnect(self, rids: Iterable[str]) -> None:
        for rid in rids:
            self._resources.disconnected(rid)

    def _schedule_sites(self) -> None:
        self.node.deadlines.set(self._sites, self._sites.next_timeout())

    def _publish(self, now: float) -> None:
        """Report the configuration and the resources if they have changed.

        A report lists everything. So a lone change is reported at once, but of many in a row only the newest state.
        """
        if self._interface is None:
            return
        state = (self._interface, self._resources.revision, self._sites.revision)
        if state == self._published:
            return
        if now < self._publish_from:
            self.node.deadlines.set(_PUBLICATION, Timeout(self._publish_from, "changes to report"))
            return
        self._published, self._publish_from = state, now + PUBLISH_INTERVAL
        config = self._tun_config(self._interface)
        if config != self._config:
            self._config = config
            self._replace(TunConfigChanged(config))
        views = self._resources.views()
        if views != self._views:
            self._views = views
            self._replace(ResourcesChanged(views))

    def _replace(self, event: ClientEvent) -> None:
        for older in [one for one in self._events if type(one) is type(event)]:
            self._events.remove(older)
        self._events.append(event)

    def _tun_config(self, interface: Interface) -> TunConfig:
        return TunConfig(
            ipv4=interface.ipv4,
            ipv6=interface.ipv6,
            routes=(TUNNEL_IPV4, *self._resources.networks(), TUNNEL_IPV6),
            search_domain=interface.search_domain,
        )


def _latest_first(entry: ActiveResource) -> float:
    return -entry.used_at

"""What a client does with packets: to which resource they go, through which gateway, and what may come back.

spec/data-plane.md, section 4; the packets themselves are carried by the node's connections.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import attrs

from firezone_tunnel.datagrams import BufferPool, DatagramBatch
from firezone_tunnel.errors import ProtocolError
from firezone_tunnel.ice.agent import Credentials
from firezone_tunnel.messages import client as messages
from firezone_tunnel.messages.common import IceCredentials, Interface, Network, NoRelays, RelaysPresence
from firezone_tunnel.packet.rewrite import icmp_error
from firezone_tunnel.packet.superpacket import SuperPacket
from firezone_tunnel.sansio import Entropy, SocketAddress, Timeout, Transmit, earliest
from firezone_tunnel.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionEvent,
    ConnectionFailed,
    InvalidatedCandidates,
    NewCandidates,
    RelayNews,
    Role,
)
from firezone_tunnel.snownet.node import Node
from firezone_tunnel.snownet.relays import RelayFailed
from firezone_tunnel.tunnel import control
from firezone_tunnel.tunnel.gateways import Gateways
from firezone_tunnel.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6
from firezone_tunnel.tunnel.relays import relay_terms
from firezone_tunnel.tunnel.resources import ActiveResource, ResourceTable, ResourceView, SiteStatuses
from firezone_tunnel.tunnel.waiting import WaitingPackets
from firezone_tunnel.wireguard.seal import SealBuffer

ASK_AGAIN_AFTER = 2.0  # spec/data-plane.md, 4.4
RECENT_TRAFFIC = 20.0  # how recently a resource was used whose flow is asked for again after roaming (decision 3)


@attrs.frozen
class TunConfig:
    """How the host is to set up the tunnel's interface."""

    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address
    routes: tuple[Network, ...]  # sorted, IPv4 first
    search_domain: str | None = None


@attrs.frozen
class ToPortal:
    """A message to send; it is worth nothing later."""

    message: messages.ToPortal


@attrs.frozen
class TunConfigChanged:
    config: TunConfig


@attrs.frozen
class ResourcesChanged:
    resources: tuple[ResourceView, ...]


@attrs.frozen
class FlowRefused:
    """The portal knows no way to this resource: "offline", "version_mismatch", "forbidden", "not_found", ..."""

    rid: str
    reason: str


@attrs.frozen
class FlowIgnored:
    """The portal named a gateway that we can't connect to."""

    rid: str
    gid: str
    reason: str


ClientEvent = ToPortal | TunConfigChanged | ResourcesChanged | FlowRefused | FlowIgnored | ConnectionEvent | RelayNews
"""Of connection events, `cid` is the gateway's id."""


@attrs.define
class ClientCounters:
    """Packets that were not carried, and why."""

    without_resource: int = 0
    foreign_source: int = 0
    """Sent by the host from an address that is not the tunnel's."""
    filtered: int = 0
    unexpected_source: int = 0
    """From a gateway, for a resource that it doesn't serve or to an address that is not ours."""
    unknown_control: int = 0
    waiting_overwritten: int = 0
    """Dropped because too many were waiting for a flow."""


@attrs.define
class _PendingFlow:
    asked_at: float = float("-inf")
    packets: WaitingPackets = attrs.field(factory=WaitingPackets)


class ClientTunnel:
    """A client's whole data plane, without I/O.

    After each call drain `transmits` and `events`, then ask `next_timeout`. Packets are valid only until the next
    `handle_packets` or `handle_datagrams`.
    """

    def __init__(self, *, entropy: Entropy, now: float, pool: BufferPool[SealBuffer]) -> None:
        self.counters = ClientCounters()
        self.node = Node(role=Role.CLIENT, entropy=entropy, now=now, pool=pool)
        self._resources = ResourceTable(is_connected=lambda rid: self._gateways.serving(rid) is not None)
        self._sites = SiteStatuses()
        self._gateways = Gateways()
        self._pending: dict[str, _PendingFlow] = {}
        self._interface: Interface | None = None
        self._own: tuple[bytes, ...] = ()
        self._config: TunConfig | None = None
        self._views: tuple[ResourceView, ...] | None = None
        self._wanted_again: tuple[str, ...] = ()
        self._is_joined = False
        self._events: deque[ClientEvent] = deque()

    @property
    def public_key(self) -> bytes:
        """What the portal is told at login; another one after each `reset`."""
        return self.node.public_key

    def handle_packets(self, packets: Sequence[SuperPacket], now: float, utc_now: float) -> list[SuperPacket]:
        """The host sends these into the tunnel. Returns what is to be answered to the host at once."""
        answers: list[SuperPacket] = []
        lookup, serving = self._resources.lookup, self._gateways.serving
        encapsulate, own, counters = self.node.encapsulate, self._own, self.counters
        for packet in packets:
            if packet.source not in own:
                counters.foreign_source += packet.segments
                continue
            resource = lookup(packet.destination)
            if resource is None:
                self._send_to_gateway_itself(packet, now, utc_now)
                continue
            if not resource.rules.permits(packet, packet.destination_port):
                counters.filtered += packet.segments
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
        self._follow_node()
        return answers

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[SuperPacket]:
        """These arrived from outside. Returns the packets for the host."""
        accepted: list[SuperPacket] = []
        own, counters = self._own, self.counters
        for cid, packets in self.node.handle_datagrams(batch, now, utc_now):
            gateway = self._gateways.get(cid)
            for packet in packets:
                if gateway is not None and packet.destination in own and gateway.may_send_from(packet.source):
                    accepted.append(packet)
                elif control.is_control(packet):
                    self._handle_control(cid, packet, now)
                else:
                    counters.unexpected_source += packet.segments
        self._follow_node()
        return accepted

    def handle_joined(self) -> None:
        """The portal takes messages again; its `init` follows."""
        self._is_joined = True

    def handle_left(self) -> None:
        """The portal is gone; what is connected goes on."""
        self._is_joined = False

    def handle_message(self, message: messages.FromPortal, now: float, utc_now: float) -> None:
        """The portal said this."""
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
                for candidate in message.candidates:
                    self.node.add_remote_candidate(message.gateway_id, candidate, now)
            case messages.InvalidateIceCandidates():
                for candidate in message.candidates:
                    self.node.remove_remote_candidate(message.gateway_id, candidate, now)
            case RelaysPresence():
                self.node.update_relays(message.disconnected_ids, relay_terms(message.connected), now)
        self._follow_node()
        self._publish()

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None:
        """Where our sockets can be reached, the preferred one of each family first."""
        self.node.set_local_addresses(addresses, now)
        self._follow_node()

    def reset(self, now: float) -> None:
        """Begin anew with another key after the network has changed: the sockets are new, the portal is called again.

        Flows with recent traffic are asked for again as soon as the portal has answered (decision 3).
        """
        entries = sorted(self._resources.entries(), key=_latest_first)
        self._wanted_again = tuple(entry.id for entry in entries if entry.used_at > now - RECENT_TRAFFIC)
        self._is_joined = False
        self.node.reset(now, farewell=control.encode(control.Goodbye()))
        self._gateways.forget_recent()
        self._follow_node()
        self._publish()

    def close(self, now: float) -> None:
        """Say goodbye to every gateway: what `transmits` gives after this is the last."""
        self.node.close(now, farewell=control.encode(control.Goodbye()))
        self._follow_node()

    def transmits(self) -> Iterator[Transmit]:
        return self.node.transmits()

    def events(self) -> Iterator[ClientEvent]:
        """What happened, in order; of several changes of the configuration or the resources only the newest."""
        events = self._events
        while events:
            yield events.popleft()

    def next_timeout(self) -> Timeout | None:
        return earliest((self.node.next_timeout(), self._sites.next_timeout()))

    def handle_timeout(self, now: float, utc_now: float) -> None:
        self.node.handle_timeout(now, utc_now)
        self._follow_node()
        if self._sites.handle_timeout(now):
            self._publish()

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
        self.node.update_relays((), relay_terms(init.relays), now)
        self.node.announce()
        for rid in self._wanted_again:
            if self._resources.get(rid) is not None and self._gateways.serving(rid) is None:
                self._pending.setdefault(rid, _PendingFlow())
        for rid, pending in self._pending.items():  # whatever was asked of an earlier connection is forgotten there
            if len(pending.packets) or rid in self._wanted_again:
                self._ask(rid, pending, now)
        self._wanted_again = ()

    def _set_interface(self, interface: Interface) -> None:
        self._interface = interface
        self._own = (interface.ipv4.packed, interface.ipv6.packed)

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
                local=_credentials(flow.client_ice_credentials),
                remote=_credentials(flow.gateway_ice_credentials),
                now=now,
                utc_now=utc_now,
            )
        except (ProtocolError, ValueError) as error:
            self._events.append(FlowIgnored(rid, gid, str(error)))
            if not self.node.has_connection(gid):
                self._gateways.remove(gid)
            return
        if not is_kept:  # a gateway that has begun anew knows nothing of what it served before
            self._gateways.stop_serving_all(gateway)
        del self._pending[rid]
        self._gateways.serve(gateway, rid, resource.networks)
        for packet in pending.packets.take():
            self.node.encapsulate(gid, packet, now, utc_now)
        self.node.flush(now)

    def _handle_refusal(self, refusal: messages.FlowCreationFailed, now: float) -> None:
        rid, reason = refusal.resource_id, refusal.reason
        self._events.append(FlowRefused(rid, reason))
        resource = self._resources.get(rid)
        if reason == "offline" and resource is not None:
            self._sites.offline(resource.site_ids, now)
            self._pending.pop(rid, None)
        elif (pending := self._pending.get(rid)) is not None:
            pending.packets.take()  # whoever sends another one has us ask again, in two seconds at the earliest

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
            self.node.close_connection(gateway.id, now, farewell=control.encode(control.Goodbye()))

    def _follow_node(self) -> None:
        if not self.node.has_events:
            return
        for event in self.node.events():
            match event:
                case NewCandidates(gid, candidates):
                    self._tell_portal(messages.BroadcastIceCandidates, gid, candidates)
                    continue
                case InvalidatedCandidates(gid, candidates):
                    self._tell_portal(messages.BroadcastInvalidatedIceCandidates, gid, candidates)
                    continue
                case ConnectionEstablished(gid):
                    self._established(gid)
                case ConnectionFailed(gid) | ConnectionClosed(gid):
                    self._gateways.remove(gid)
                    self._sites.disconnected(gid)
                case RelayFailed(is_last=True) if self._is_joined:
                    self._events.append(ToPortal(NoRelays()))
            self._events.append(event)
        self._publish()

    def _established(self, gid: str) -> None:
        gateway = self._gateways.get(gid)
        if gateway is not None:
            self._gateways.connected(gateway)
            self._sites.connected(gateway.site_id, gid)

    def _tell_portal(self, kind: _Broadcast, gid: str, candidates: tuple[str, ...]) -> None:
        """Whatever is not told because the portal is away is announced when it is back."""
        if self._is_joined:
            self._events.append(ToPortal(kind(gateway_ids=[gid], candidates=list(candidates))))

    def _publish(self) -> None:
        """Tell the configuration and the resources, those that have changed."""
        if self._interface is None:
            return
        config = self._tun_config(self._interface)
        if config != self._config:
            self._config = config
            self._replace(TunConfigChanged(config))
        views = self._resources.views(self._sites)
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


_Broadcast = Callable[..., messages.BroadcastIceCandidates | messages.BroadcastInvalidatedIceCandidates]


def _credentials(told: IceCredentials) -> Credentials:
    return Credentials(told.username, told.password)


def _latest_first(entry: ActiveResource) -> float:
    return -entry.used_at

"""The gateway's data plane: who sent a packet, which resources the client may reach, and which replies may return.

docs/protocol/data-plane.md, 6; docs/protocol/gateway-and-relay.md, 2.4, 2.5 and 3.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import attrs

from firezone_tunnel.core.datagrams import BufferPool, DatagramBatch
from firezone_tunnel.core.deadlines import Deadlines
from firezone_tunnel.core.messages import gateway as messages
from firezone_tunnel.core.messages.common import Authorization, PortalMessage, RelaysPresence
from firezone_tunnel.core.packet.icmp import icmp_error, is_icmp_error, quoted_packet
from firezone_tunnel.core.packet.superpacket import ICMP_PROTOCOLS, SuperPacket
from firezone_tunnel.core.sansio import Entropy, Timeout
from firezone_tunnel.core.snownet.events import ConnectionEvent, InvalidatedCandidates, NewCandidates, RelayNews, Role
from firezone_tunnel.core.tunnel import control
from firezone_tunnel.core.tunnel.base import GOODBYE, ToPortal, Tunnel, ice_credentials
from firezone_tunnel.core.tunnel.clients import AdmittedClient, Allowed, UnsupportedResource
from firezone_tunnel.core.wireguard.seal import SealBuffer
from firezone_tunnel.errors import ProtocolError

_EXPIRY = "expiry"  # the key of the deadline
_EXPIRY_CHECK_INTERVAL = 60.0
"""Seconds between looks at expiries, which are unix times: the wall clock may be set."""


@attrs.frozen
class InterfaceChanged:
    """The portal gave this gateway its tunnel addresses."""

    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address


@attrs.frozen
class FlowAuthorized:
    """A client may use a resource, until unix time `expires_at` if there is one."""

    cid: str
    rid: str
    expires_at: int | None


@attrs.frozen
class FlowIgnored:
    """The portal authorized a client that can't be admitted."""

    cid: str
    rid: str
    reason: str


@attrs.frozen
class FlowEnded:
    """A client may not use a resource any more. `reason`: "rejected", "expired" or "unlisted"."""

    cid: str
    rid: str
    reason: str


@attrs.frozen
class PacketFiltered:
    """The filters of a client's resources refused a packet. `port` is its destination port; 0 if it has none."""

    cid: str
    destination: bytes
    protocol: int
    port: int


GatewayEvent = (
    PacketFiltered
    | InterfaceChanged
    | ToPortal
    | FlowAuthorized
    | FlowIgnored
    | FlowEnded
    | ConnectionEvent
    | RelayNews
)
"""The `peer_id` of a connection event is the client's id."""


@attrs.define
class GatewayCounters:
    """Packets that were dropped, by reason."""

    unknown_client: int = 0
    foreign_source: int = 0
    """Not from the client's own tunnel address. Answered with ICMP."""
    filtered: int = 0
    """Not permitted by the filters of the client's resources. Answered with ICMP."""
    filtered_answers: int = 0
    """From a resource that the client may not use, or an ICMP error about a packet that it may not send."""
    unknown_control: int = 0


class GatewayTunnel(Tunnel):
    """A gateway's data plane. A client's authorizations outlive its connection: it may come back."""

    def __init__(self, *, entropy: Entropy, now: float, utc_now: float, pool: BufferPool[SealBuffer]) -> None:
        super().__init__(Role.GATEWAY, entropy=entropy, now=now, pool=pool)
        self.counters = GatewayCounters()
        self._clients: dict[str, AdmittedClient] = {}
        self._by_address: dict[bytes, AdmittedClient] = {}
        self._by_resource: dict[str, dict[str, AdmittedClient]] = {}  # the clients that may use it, by id
        self._expiries: Deadlines[tuple[str, str]] = Deadlines()  # by client and resource, in unix time
        self._utc_offset = utc_now - now

    def handle_packets(self, packets: Sequence[SuperPacket], now: float, utc_now: float) -> list[SuperPacket]:
        """Handle packets that the host routed into the tunnel. Returns nothing: refused packets get no answer."""
        by_address, own = self._by_address.get, self._own
        encapsulate, counters = self.node.encapsulate, self.counters
        for packet in packets:
            client = by_address(packet.destination)
            if client is None:
                counters.unknown_client += packet.segments
                continue
            source = packet.source
            if packet.protocol in ICMP_PROTOCOLS and is_icmp_error(packet):
                may_return = self._reports_on(client, packet)
            else:
                may_return = client.rules(source).permits(packet, packet.source_port) or source in own
            if may_return:
                encapsulate(client.id, packet, now, utc_now)
            else:
                counters.filtered_answers += packet.segments
        self.node.flush(now)
        self._follow_node(now)
        return []

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[SuperPacket]:
        """Handle a batch from the network. Returns the packets for the host."""
        accepted: list[SuperPacket] = []
        has_answered = False
        for cid, packets in self.node.handle_datagrams(batch, now, utc_now):
            client = self._clients.get(cid)
            if client is None:
                self.counters.unknown_client += sum(packet.segments for packet in packets)
                continue
            addresses, rules, own = client.addresses, client.rules, self._own
            for packet in packets:
                destination = packet.destination
                if packet.source in addresses and rules(destination).permits(packet, packet.destination_port):
                    accepted.append(packet)
                elif control.is_control(packet):
                    self._handle_control(client, packet, now)
                elif packet.source in addresses and (destination in own or rules(destination).permits_report(packet)):
                    accepted.append(packet)
                else:
                    self._refuse(client, packet, now, utc_now)
                    has_answered = True
        if has_answered:
            self.node.flush(now)
        self._follow_node(now)
        return accepted

    def handle_message(self, message: messages.FromPortal, now: float, utc_now: float) -> None:
        """Handle a message of the portal."""
        self._utc_offset = utc_now - now
        match message:
            case messages.Init():
                self._handle_init(message, now)
            case messages.AuthorizeFlow():
                self._authorize(message, now, utc_now)
            case messages.RejectAccess():
                self._revoke(message.client_id, message.resource_id, "rejected", now)
            case messages.ExpiryUpdated():
                client = self._clients.get(message.client_id)
                if client is not None and message.resource_id in client.resources:
                    self._set_expiry(client, message.resource_id, message.expires_at)
                    self._schedule_expiry(now)
            case messages.ResourceUpdated():
                for client in self._by_resource.get(message.resource.id, {}).values():
                    client.update_filters(message.resource)
            case messages.IceCandidates():
                self._add_candidates(message.client_id, message.candidates, now)
            case messages.InvalidateIceCandidates():
                self._remove_candidates(message.client_id, message.candidates, now)
            case RelaysPresence():
                self._update_relays(message, now)
        self._follow_node(now)

    def resource_at(self, cid: str, address: bytes) -> messages.CidrResource | None:
        """The narrowest of a client's resources that contains an address of 4 or 16 bytes."""
        client = self._clients.get(cid)
        return None if client is None else client.resource_at(address)

    def restart_relays(self, now: float) -> None:
        """Allocate again: the relays don't know our new sockets."""
        self.node.restart_relays(now)
        self._follow_node(now)

    def handle_timeout(self, now: float, utc_now: float) -> None:
        self._utc_offset = utc_now - now
        if _EXPIRY in self.node.handle_timeout(now, utc_now):
            for cid, rid in self._expiries.due(utc_now):
                self._revoke(cid, rid, "expired", now)
            self._schedule_expiry(now)
        self._follow_node(now)

    def _handle_init(self, init: messages.Init, now: float) -> None:
        if init.interface != self._interface:
            self._set_interface(init.interface)
            self._events.append(InterfaceChanged(init.interface.ipv4, init.interface.ipv6))
        self._retain(init.authorizations, now)
        self._schedule_expiry(now)
        self._start_relays(init.relays, now)

    def _retain(self, authorizations: Sequence[Authorization], now: float) -> None:
        """Revoke everything that is not listed, and take over when the rest ends."""
        listed = {(one.client_id, one.resource_id): one for one in authorizations}
        for client in list(self._clients.values()):
            for rid in list(client.resources):
                authorization = listed.get((client.id, rid))
                if authorization is None:
                    self._revoke(client.id, rid, "unlisted", now)
                else:
                    self._set_expiry(client, rid, authorization.expires_at)

    def _authorize(self, flow: messages.AuthorizeFlow, now: float, utc_now: float) -> None:
        peer, rid = flow.client, flow.resource.id
        try:
            addresses = (ipaddress.IPv4Address(peer.ipv4).packed, ipaddress.IPv6Address(peer.ipv6).packed)
            allowed = Allowed.of(flow.resource)
            self.node.upsert_connection(
                peer.id,
                remote_public_key=peer.public_key,
                preshared_key=peer.preshared_key,
                local=ice_credentials(flow.gateway_ice_credentials),
                remote=ice_credentials(flow.client_ice_credentials),
                now=now,
                utc_now=utc_now,
            )
        except (ProtocolError, UnsupportedResource, ValueError) as error:
            self._events.append(FlowIgnored(peer.id, rid, str(error)))
            return
        client = self._clients.setdefault(peer.id, AdmittedClient(peer.id))
        client.allow(allowed)
        self._by_resource.setdefault(rid, {})[client.id] = client
        self._set_expiry(client, rid, flow.expires_at)
        self._forget_addresses(client)
        client.addresses = addresses
        self._by_address.update(dict.fromkeys(addresses, client))
        self._schedule_expiry(now)
        self._events.append(FlowAuthorized(peer.id, rid, flow.expires_at))
        self._events.append(ToPortal(messages.FlowAuthorized(ref=flow.ref)))

    def _revoke(self, cid: str, rid: str, reason: str, now: float) -> None:
        client = self._clients.get(cid)
        if client is None or not client.forbid(rid):
            return
        self._forget_flow(client, rid)
        self._events.append(FlowEnded(cid, rid, reason))
        if not client.resources:
            self._forget(client)
            self.node.close_connection(cid, now, farewell=GOODBYE)

    def _forget(self, client: AdmittedClient) -> None:
        del self._clients[client.id]
        for rid in client.resources:
            self._forget_flow(client, rid)
        self._forget_addresses(client)

    def _forget_flow(self, client: AdmittedClient, rid: str) -> None:
        self._set_expiry(client, rid, None)
        clients = self._by_resource[rid]
        del clients[client.id]
        if not clients:
            del self._by_resource[rid]

    def _forget_addresses(self, client: AdmittedClient) -> None:
        for address in client.addresses:
            if self._by_address.get(address) is client:
                del self._by_address[address]

    def _set_expiry(self, client: AdmittedClient, rid: str, expires_at: int | None) -> None:
        timeout = None if expires_at is None else Timeout(expires_at, "flow that expires")
        self._expiries.set((client.id, rid), timeout)

    def _schedule_expiry(self, now: float) -> None:
        first, timeout = self._expiries.first(), None
        if first is not None:
            at = min(max(now, first.at - self._utc_offset), now + _EXPIRY_CHECK_INTERVAL)
            timeout = Timeout(at, "flows that expire")
        self.node.deadlines.set(_EXPIRY, timeout)

    def _reports_on(self, client: AdmittedClient, error: SuperPacket) -> bool:
        """Whether an ICMP error is about a packet that this client may send.

        It may come from any router on the way, whose address no resource covers.
        """
        quoted = quoted_packet(error)
        if quoted is None or quoted.source != error.destination:
            return False
        destination = quoted.destination
        return destination in self._own or client.rules(destination).permits(quoted, quoted.destination_port)

    def _refuse(self, client: AdmittedClient, packet: SuperPacket, now: float, utc_now: float) -> None:
        if packet.source in client.addresses:
            self.counters.filtered += packet.segments
            refused = (packet.destination, packet.protocol, packet.destination_port)
            self._events.append(PacketFiltered(client.id, *refused))
        else:
            self.counters.foreign_source += packet.segments
        answer = icmp_error(packet)
        if answer is not None:
            self.node.encapsulate(client.id, answer, now, utc_now)

    def _handle_control(self, client: AdmittedClient, packet: SuperPacket, now: float) -> None:
        if isinstance(control.decode(packet), control.Goodbye):
            self.node.close_connection(client.id, now)
            if self._clients.get(client.id) is client:  # a repeated goodbye
                self._forget(client)
        else:
            self.counters.unknown_control += 1

    def _handle_node_event(self, event: ConnectionEvent | RelayNews) -> None:
        pass  # authorizations outlive connections

    def _broadcast(self, event: NewCandidates | InvalidatedCandidates) -> PortalMessage:
        is_new = isinstance(event, NewCandidates)
        kind = messages.BroadcastIceCandidates if is_new else messages.BroadcastInvalidatedIceCandidates
        return kind(client_ids=[event.peer_id], candidates=list(event.candidates))

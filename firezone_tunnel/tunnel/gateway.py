"""What a gateway does with packets: whose they are, what their sender may reach, and what may come back.

spec/data-plane.md, section 6; spec/gateway-and-relay.md, sections 2.4, 2.5 and 3.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import attrs

from firezone_tunnel.datagrams import BufferPool, DatagramBatch
from firezone_tunnel.errors import ProtocolError
from firezone_tunnel.ice.agent import Credentials
from firezone_tunnel.messages import gateway as messages
from firezone_tunnel.messages.common import Authorization, IceCredentials, Interface, NoRelays, RelaysPresence
from firezone_tunnel.packet.rewrite import icmp_error, is_icmp_error
from firezone_tunnel.packet.superpacket import SuperPacket
from firezone_tunnel.sansio import Entropy, SocketAddress, Timeout, Transmit, earliest
from firezone_tunnel.snownet.events import ConnectionEvent, InvalidatedCandidates, NewCandidates, RelayNews, Role
from firezone_tunnel.snownet.node import Node
from firezone_tunnel.snownet.relays import RelayFailed
from firezone_tunnel.tunnel import control
from firezone_tunnel.tunnel.clients import Allowed, Client, UnsupportedResource
from firezone_tunnel.tunnel.relays import relay_terms
from firezone_tunnel.wireguard.seal import SealBuffer

_EXPIRY_CHECK_INTERVAL = 60.0
"""Seconds between looks at expiries: they are unix times, and the wall clock may be set meanwhile."""


@attrs.frozen
class InterfaceChanged:
    """The portal gave this gateway its tunnel addresses."""

    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address


@attrs.frozen
class ToPortal:
    """A message to send; it is worth nothing later."""

    message: messages.ToPortal


@attrs.frozen
class FlowAuthorized:
    """A client may use a resource from now on, until unix time `expires_at` if there is one."""

    cid: str
    rid: str
    expires_at: int | None


@attrs.frozen
class FlowIgnored:
    """The portal wanted a client admitted, which can't be done."""

    cid: str
    rid: str
    reason: str


@attrs.frozen
class FlowEnded:
    """A client may not use a resource any more. `reason`: "rejected", "expired" or "unlisted"."""

    cid: str
    rid: str
    reason: str


GatewayEvent = InterfaceChanged | ToPortal | FlowAuthorized | FlowIgnored | FlowEnded | ConnectionEvent | RelayNews
"""Of connection events, `cid` is the client's id."""


@attrs.define
class GatewayCounters:
    """Packets that were not carried, and why."""

    unknown_client: int = 0
    foreign_source: int = 0
    """Not from the client's own tunnel address: answered."""
    filtered: int = 0
    """Not allowed by what the client is authorized for: answered."""
    filtered_answers: int = 0
    """From a resource, but not what the client may use."""
    unknown_control: int = 0


class GatewayTunnel:
    """A gateway's whole data plane, without I/O.

    After each call drain `transmits` and `events`, then ask `next_timeout`. Packets are valid only until the next
    `handle_packets` or `handle_datagrams`. What a client is authorized for outlives its connection: it may come back.
    """

    def __init__(self, *, entropy: Entropy, now: float, utc_now: float, pool: BufferPool[SealBuffer]) -> None:
        self.counters = GatewayCounters()
        self.node = Node(role=Role.GATEWAY, entropy=entropy, now=now, pool=pool)
        self._clients: dict[str, Client] = {}
        self._by_address: dict[bytes, Client] = {}
        self._own: tuple[bytes, ...] = ()
        self._interface: Interface | None = None
        self._is_joined = False
        self._utc_offset = utc_now - now
        self._check_expiry_at: float | None = None
        self._events: deque[GatewayEvent] = deque()

    @property
    def public_key(self) -> bytes:
        """What the portal is told at login; the same for the life of the process."""
        return self.node.public_key

    def handle_packets(self, packets: Sequence[SuperPacket], now: float, utc_now: float) -> list[SuperPacket]:
        """The host routed these into the tunnel. Returns nothing: what may not pass is dropped silently."""
        by_address, own = self._by_address.get, self._own
        encapsulate, counters = self.node.encapsulate, self.counters
        for packet in packets:
            client = by_address(packet.destination)
            if client is None:
                counters.unknown_client += packet.segments
                continue
            source = packet.source
            # An ICMP error may come from any router on the way.
            if client.rules(source).permits(packet, packet.source_port) or source in own or is_icmp_error(packet):
                encapsulate(client.id, packet, now, utc_now)
            else:
                counters.filtered_answers += packet.segments
        self.node.flush(now)
        self._follow_node()
        return []

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[SuperPacket]:
        """These arrived from outside. Returns the packets for the host."""
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
                elif packet.source in addresses and destination in own:
                    accepted.append(packet)
                else:
                    self._refuse(client, packet, now, utc_now)
                    has_answered = True
        if has_answered:
            self.node.flush(now)
        self._follow_node()
        return accepted

    def handle_joined(self) -> None:
        """The portal takes messages again; its `init` follows."""
        self._is_joined = True

    def handle_left(self) -> None:
        """The portal is gone; who is admitted stays so."""
        self._is_joined = False

    def handle_message(self, message: messages.FromPortal, now: float, utc_now: float) -> None:
        """The portal said this."""
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
                if client is not None:
                    client.set_expiry(message.resource_id, message.expires_at)
                    self._schedule_expiry(now)
            case messages.ResourceUpdated():
                for client in self._clients.values():
                    client.update_filters(message.resource)
            case messages.IceCandidates():
                for candidate in message.candidates:
                    self.node.add_remote_candidate(message.client_id, candidate, now)
            case messages.InvalidateIceCandidates():
                for candidate in message.candidates:
                    self.node.remove_remote_candidate(message.client_id, candidate, now)
            case RelaysPresence():
                self.node.update_relays(message.disconnected_ids, relay_terms(message.connected), now)
        self._follow_node()

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None:
        """Where our sockets can be reached, the preferred one of each family first."""
        self.node.set_local_addresses(addresses, now)
        self._follow_node()

    def restart_relays(self, now: float) -> None:
        """The sockets are others now, and the relays know nothing of them."""
        self.node.restart_relays(now)
        self._follow_node()

    def close(self, now: float) -> None:
        """Say goodbye to every client: what `transmits` gives after this is the last."""
        self.node.close(now, farewell=control.encode(control.Goodbye()))
        self._follow_node()

    def transmits(self) -> Iterator[Transmit]:
        return self.node.transmits()

    def events(self) -> Iterator[GatewayEvent]:
        """What happened, in order."""
        events = self._events
        while events:
            yield events.popleft()

    def next_timeout(self) -> Timeout | None:
        expiry = None if self._check_expiry_at is None else Timeout(self._check_expiry_at, "flows that expire")
        return earliest((self.node.next_timeout(), expiry))

    def handle_timeout(self, now: float, utc_now: float) -> None:
        self._utc_offset = utc_now - now
        self.node.handle_timeout(now, utc_now)
        if self._check_expiry_at is not None and now >= self._check_expiry_at:
            for client in list(self._clients.values()):
                for rid in client.expired(utc_now):
                    self._revoke(client.id, rid, "expired", now)
            self._schedule_expiry(now)
        self._follow_node()

    def _handle_init(self, init: messages.Init, now: float) -> None:
        if init.interface != self._interface:
            self._interface = init.interface
            self._own = (init.interface.ipv4.packed, init.interface.ipv6.packed)
            self._events.append(InterfaceChanged(init.interface.ipv4, init.interface.ipv6))
        self._retain(init.authorizations, now)
        self._schedule_expiry(now)
        self.node.update_relays((), relay_terms(init.relays), now)
        self.node.announce()

    def _retain(self, authorizations: Sequence[Authorization], now: float) -> None:
        """Revoke everything that is not listed, and take over when the rest ends."""
        listed = {(one.client_id, one.resource_id): one for one in authorizations}
        for client in list(self._clients.values()):
            for rid in list(client.resources):
                authorization = listed.get((client.id, rid))
                if authorization is None:
                    self._revoke(client.id, rid, "unlisted", now)
                else:
                    client.set_expiry(rid, authorization.expires_at)

    def _authorize(self, flow: messages.AuthorizeFlow, now: float, utc_now: float) -> None:
        peer, rid = flow.client, flow.resource.id
        try:
            addresses = (ipaddress.IPv4Address(peer.ipv4).packed, ipaddress.IPv6Address(peer.ipv6).packed)
            allowed = Allowed.of(flow.resource, flow.expires_at)
            self.node.upsert_connection(
                peer.id,
                remote_public_key=peer.public_key,
                preshared_key=peer.preshared_key,
                local=_credentials(flow.gateway_ice_credentials),
                remote=_credentials(flow.client_ice_credentials),
                now=now,
                utc_now=utc_now,
            )
        except (ProtocolError, UnsupportedResource, ValueError) as error:
            self._events.append(FlowIgnored(peer.id, rid, str(error)))
            return
        client = self._clients.setdefault(peer.id, Client(peer.id))
        client.allow(allowed)
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
        self._events.append(FlowEnded(cid, rid, reason))
        if not client.resources:
            self._forget(client)
            self.node.close_connection(cid, now, farewell=control.encode(control.Goodbye()))

    def _forget(self, client: Client) -> None:
        del self._clients[client.id]
        self._forget_addresses(client)

    def _forget_addresses(self, client: Client) -> None:
        for address in client.addresses:
            if self._by_address.get(address) is client:
                del self._by_address[address]

    def _schedule_expiry(self, now: float) -> None:
        expiries = [expiry for client in self._clients.values() if (expiry := client.first_expiry()) is not None]
        if not expiries:
            self._check_expiry_at = None
            return
        self._check_expiry_at = min(max(now, min(expiries) - self._utc_offset), now + _EXPIRY_CHECK_INTERVAL)

    def _refuse(self, client: Client, packet: SuperPacket, now: float, utc_now: float) -> None:
        if packet.source in client.addresses:
            self.counters.filtered += packet.segments
        else:
            self.counters.foreign_source += packet.segments
        answer = icmp_error(packet)
        if answer is not None:
            self.node.encapsulate(client.id, answer, now, utc_now)

    def _handle_control(self, client: Client, packet: SuperPacket, now: float) -> None:
        if isinstance(control.decode(packet), control.Goodbye):
            self.node.close_connection(client.id, now)
            if self._clients.get(client.id) is client:  # it may say so twice
                self._forget(client)
        else:
            self.counters.unknown_control += 1

    def _follow_node(self) -> None:
        if not self.node.has_events:
            return
        for event in self.node.events():
            match event:
                case NewCandidates(cid, candidates):
                    self._tell_portal(messages.BroadcastIceCandidates, cid, candidates)
                case InvalidatedCandidates(cid, candidates):
                    self._tell_portal(messages.BroadcastInvalidatedIceCandidates, cid, candidates)
                case RelayFailed(is_last=True) if self._is_joined:
                    self._events += [event, ToPortal(NoRelays())]
                case _:
                    self._events.append(event)

    def _tell_portal(self, kind: _Broadcast, cid: str, candidates: tuple[str, ...]) -> None:
        """Whatever is not told because the portal is away is announced when it is back."""
        if self._is_joined:
            self._events.append(ToPortal(kind(client_ids=[cid], candidates=list(candidates))))


_Broadcast = Callable[..., messages.BroadcastIceCandidates | messages.BroadcastInvalidatedIceCandidates]


def _credentials(told: IceCredentials) -> Credentials:
    return Credentials(told.username, told.password)

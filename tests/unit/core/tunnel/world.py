"""Complete clients and gateways without sockets and devices, the portal that they share, and a clock."""

from __future__ import annotations

import ipaddress
from typing import Any, TypeVar

import attrs

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.messages.common import Authorization, Filter, IceCredentials, Interface, Site
from firezone_tunnel.core.packet.superpacket import ICMP as ICMP_PROTOCOL
from firezone_tunnel.core.packet.superpacket import ICMPV6, SuperPacket, parse
from firezone_tunnel.core.packet.superpacket import UDP as UDP_PROTOCOL
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import Role
from firezone_tunnel.core.tunnel import control
from firezone_tunnel.core.tunnel.base import ToPortal
from firezone_tunnel.core.tunnel.client import ClientTunnel
from firezone_tunnel.core.tunnel.gateway import GatewayTunnel
from tests.unit.core.packet.packets import ICMP, IP, TCP, UDP, ICMPv6EchoRequest, IPv6, Packet, built
from tests.unit.core.snownet import world as snownet
from tests.unit.core.snownet.world import LATENCY, stream

SITE = Site(id="hq", name="HQ")

_D = TypeVar("_D", bound="Device")


class Device(snownet.Host):
    """The common half of client and gateway.

    `received` are the packets that its host got out of the tunnel, `reported` the events for its shell without the
    messages to the portal, and `latest` the newest event of each kind.
    """

    tunnel: Any

    def __init__(self, world: World, name: str, role: Role, number: int, *addresses: str) -> None:
        super().__init__(world, name, role, *addresses)
        self.world: World = world
        self.role = role
        self.ipv4, self.ipv6 = f"100.64.0.{number}", f"fd00:2021:1111::{number:x}"
        self.received: list[SuperPacket] = []
        self.reported: list[Any] = []
        self.latest: dict[type, Any] = {}
        self.is_stopped = False
        self.begin()

    @property
    def interface(self) -> Interface:
        return Interface(ipv4=ipaddress.IPv4Address(self.ipv4), ipv6=ipaddress.IPv6Address(self.ipv6))

    def begin(self) -> None:
        """Start the program, with a new key and no memory."""
        raise NotImplementedError

    def packets_in(self, *packets: SuperPacket) -> list[SuperPacket]:
        """Send packets from the host. Returns the immediate answers."""
        world = self.world
        answers = self.tunnel.handle_packets(packets, world.now, world.utc)
        answers = [answer.copy() for answer in answers]
        self.received += answers
        self.drain()
        return answers

    def join(self) -> None:
        """Join the portal, which answers with `init`."""
        self.world.portal.join(self)

    def leave(self) -> None:
        self.world.portal.leave(self)

    def hear(self, message: Any) -> None:
        """Receive a message of the portal now."""
        self.tunnel.handle_message(message, self.world.now, self.world.utc)
        self.drain()

    def of(self, kind: Any) -> list[Any]:
        """The events of one kind for its shell."""
        return [event for event in self.reported if isinstance(event, kind)]

    def texts(self, sender: snownet.Host | None = None) -> list[str]:
        """The payloads of `datagram`s that its host got, in order."""
        return [
            text_of(packet.segment(index))
            for packet in self.received
            if packet.protocol == UDP_PROTOCOL
            for index in range(packet.segments)
        ]

    def errors(self) -> list[tuple[int, int]]:
        """Type and code of the ICMP errors that its host got."""
        found = [packet for packet in self.received if packet.protocol in {ICMP_PROTOCOL, ICMPV6}]
        return [(error.data[error.transport_offset], error.data[error.transport_offset + 1]) for error in found]

    def take_in(
        self, data: bytes, segment_size: int, source: SocketAddress, local: SocketAddress, ecn: int = 0
    ) -> None:
        if self.is_gone:
            return
        self._buffer[: len(data)] = data
        batch = DatagramBatch.received(self._buffer, len(data), segment_size, source, local, ecn)
        packets = self.tunnel.handle_datagrams(batch, self.world.now, self.world.utc)
        self.received += [packet.copy() for packet in packets]
        self.drain()

    def handle_timeout(self) -> None:
        self.tunnel.handle_timeout(self.world.now, self.world.utc)
        self.drain()

    def due_at(self) -> float:
        timeout = None if self.is_gone or self.is_stopped else self.tunnel.next_timeout()
        return float("inf") if timeout is None else timeout.at

    def drain(self) -> None:
        for transmit in self.tunnel.transmits():
            self.world.carry(self, transmit)
            transmit.release()
        for event in self.tunnel.events():
            if isinstance(event, ToPortal):
                self.world.portal.hear(self, event.message)
            else:
                self.reported.append(event)
                self.latest[type(event)] = event
                self.events.append((self.world.now, event))

    def stop(self) -> None:
        """Shut the program down."""
        self.tunnel.close(self.world.now)
        self.drain()
        self.is_stopped = self.is_gone = True
        self.leave()

    def restart(self) -> None:
        """The program is killed and started again."""
        self.leave()
        self.begin()
        self.join()


class Client(Device):
    tunnel: ClientTunnel

    def begin(self) -> None:
        entropy = stream(f"{self.name} {self.world.now}")
        self.tunnel = ClientTunnel(entropy=entropy, now=self.world.now, pool=self.slots)
        self.node = self.tunnel.node
        self.tunnel.set_local_addresses(self.addresses, self.world.now)

    def ask_count(self, rid: str | None = None) -> int:
        """The number of requests for a flow."""
        messages = [heard.message for heard in self.world.portal.heard]
        return sum(isinstance(each, to_client.CreateFlow) and rid in {None, each.resource_id} for each in messages)

    def reset(self, *, paused: float = 0.0) -> None:
        """Its network has changed: say goodbye, and leave the portal to join it with a new key."""
        self.tunnel.reset(self.world.now, paused=paused)
        self.node = self.tunnel.node
        self.drain()
        self.tunnel.set_local_addresses(self.addresses, self.world.now)
        self.drain()
        self.leave()


class Gateway(Device):
    tunnel: GatewayTunnel

    def begin(self) -> None:
        world = self.world
        entropy = stream(f"{self.name} {world.now}")
        self.tunnel = GatewayTunnel(entropy=entropy, now=world.now, utc_now=world.utc, pool=self.slots)
        self.node = self.tunnel.node
        self.tunnel.set_local_addresses(self.addresses, world.now)


@attrs.frozen
class Heard:
    """A message that reached the portal."""

    at: float
    sender: str
    message: Any


@attrs.define
class Access:
    """A resource of a client as the portal stores it, and the gateway that serves it."""

    rid: str
    address: str
    gateway: str
    filters: list[Filter] = attrs.field(factory=list)
    site: Site = SITE
    expires_at: int | None = None

    def for_client(self) -> to_client.CidrResource:
        return to_client.CidrResource(
            id=self.rid, name=self.rid, address=self.address, gateway_groups=[self.site], filters=self.filters
        )

    def for_gateway(self) -> to_gateway.CidrResource:
        return to_gateway.CidrResource(id=self.rid, name=self.rid, address=self.address, filters=self.filters)


class Portal:
    """Introduces clients to gateways according to `resources`.

    `refusals` are reasons, by resource; while it is `mute` it answers nothing. `heard` are the messages it received.
    """

    def __init__(self, world: World) -> None:
        self.resources: dict[str, Access] = {}
        self.refusals: dict[str, str] = {}
        self.heard: list[Heard] = []
        self.mute = False
        self.preshared_key = bytes(range(32))
        self._world = world
        self._joined: dict[str, int] = {}  # the number of a device's current connection
        self._connections = 0
        self._authorized: dict[tuple[str, str], int | None] = {}
        self._waiting: dict[str, tuple[str, str, to_client.FlowCreated]] = {}

    def add(self, access: Access) -> Access:
        self.resources[access.rid] = access
        return access

    def join(self, device: Device) -> None:
        self._connections += 1
        self._joined[device.name] = self._connections
        device.tunnel.handle_joined()
        self.send(device, self.init(device))

    def leave(self, device: Device) -> None:
        """Messages under way are lost."""
        self._joined.pop(device.name, None)
        device.tunnel.handle_left()
        device.drain()

    def init(self, device: Device) -> Any:
        if isinstance(device, Client):
            resources: list[Any] = [access.for_client() for access in self.resources.values()]
            return to_client.Init(interface=device.interface, resources=resources)
        authorizations = [
            Authorization(client_id=cid, resource_id=rid, expires_at=expires_at)
            for (cid, rid), expires_at in self._authorized.items()
        ]
        return to_gateway.Init(interface=device.interface, authorizations=authorizations)

    def send(self, device: Device, message: Any) -> None:
        """Deliver a message, unless the device has left by then."""
        connection = self._joined.get(device.name)

        def arrive() -> None:
            if connection is not None and self._joined.get(device.name) == connection:
                device.hear(message)

        self._world.later(LATENCY, arrive)

    def hear(self, sender: Device, message: Any) -> None:
        connection = self._joined.get(sender.name)

        def arrive() -> None:
            if connection is not None and self._joined.get(sender.name) == connection:
                self.heard.append(Heard(self._world.now, sender.name, message))
                self._answer(sender, message)

        self._world.later(LATENCY, arrive)

    def revoke(self, client: Client, rid: str) -> None:
        """Delete a policy, and inform gateway and client."""
        access = self.resources.pop(rid)
        self._authorized.pop((client.name, rid), None)
        gateway = self._world.devices[access.gateway]
        self.send(gateway, to_gateway.RejectAccess(client_id=client.name, resource_id=rid))
        self.send(client, to_client.ResourceDeleted(id=rid))

    def forget_authorizations(self) -> None:
        self._authorized.clear()

    def flow(self, client: Client, rid: str, **changes: Any) -> tuple[to_gateway.AuthorizeFlow, to_client.FlowCreated]:
        """The messages about a flow to gateway and client."""
        access = self.resources[rid]
        gateway = self._world.devices[access.gateway]
        client_side, gateway_side = _credentials(client, gateway), _credentials(gateway, client)
        authorize = to_gateway.AuthorizeFlow(
            ref=f"{client.name} {rid} {self._world.now}",
            resource=access.for_gateway(),
            client=to_gateway.AuthorizedClient(
                id=client.name,
                public_key=client.tunnel.public_key,
                preshared_key=self.preshared_key,
                ipv4=client.ipv4,
                ipv6=client.ipv6,
            ),
            client_ice_credentials=client_side,
            gateway_ice_credentials=gateway_side,
            expires_at=access.expires_at,
        )
        created: dict[str, Any] = {
            "resource_id": rid,
            "gateway_id": gateway.name,
            "gateway_public_key": gateway.tunnel.public_key,
            "gateway_ipv4": gateway.ipv4,
            "gateway_ipv6": gateway.ipv6,
            "gateway_group_id": access.site.id,
            "preshared_key": self.preshared_key,
            "client_ice_credentials": client_side,
            "gateway_ice_credentials": gateway_side,
        }
        return authorize, to_client.FlowCreated(**(created | changes))

    def _answer(self, sender: Device, message: Any) -> None:
        match message:
            case to_client.CreateFlow() if not self.mute:
                self._introduce(sender, message.resource_id)
            case to_gateway.FlowAuthorized() if not self.mute:
                if message.ref in self._waiting:  # otherwise a test sent the authorization itself
                    cid, rid, created = self._waiting.pop(message.ref)
                    self._authorized[cid, rid] = self.resources[rid].expires_at
                    self.send(self._world.devices[cid], created)
            case to_client.BroadcastIceCandidates() | to_client.BroadcastInvalidatedIceCandidates():
                kind = _PASSED_ON[type(message)]
                for gid in message.gateway_ids:
                    self.send(self._world.devices[gid], kind(client_id=sender.name, candidates=message.candidates))
            case to_gateway.BroadcastIceCandidates() | to_gateway.BroadcastInvalidatedIceCandidates():
                kind = _PASSED_ON[type(message)]
                for cid in message.client_ids:
                    self.send(self._world.devices[cid], kind(gateway_id=sender.name, candidates=message.candidates))

    def _introduce(self, client: Device, rid: str) -> None:
        assert isinstance(client, Client)
        if rid in self.refusals or rid not in self.resources:
            reason = self.refusals.get(rid, "not_found")
            self.send(client, to_client.FlowCreationFailed(resource_id=rid, reason=reason))
            return
        authorize, created = self.flow(client, rid)
        self._waiting[authorize.ref] = (client.name, rid, created)
        self.send(self._world.devices[self.resources[rid].gateway], authorize)


class World(snownet.World):
    """`devices` by name. They must `join` before they can do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.portal = Portal(self)
        self.devices: dict[str, Device] = {}
        self.wall_clock_step = 0.0

    @property
    def utc(self) -> float:
        return super().utc + self.wall_clock_step

    def add_client(self, name: str = "client", number: int = 1, *addresses: str) -> Client:
        return self._add(Client(self, name, Role.CLIENT, number, *(addresses or (f"10.0.1.{number}",))))

    def add_gateway(self, name: str = "gateway", number: int = 200, *addresses: str) -> Gateway:
        return self._add(Gateway(self, name, Role.GATEWAY, number, *(addresses or (f"10.0.2.{number}",))))

    def later(self, seconds: float, call: Any) -> None:
        self._later(seconds, call)

    def _add(self, device: _D) -> _D:
        self.devices[device.name] = self.hosts[device.name] = device
        return device


def joined(*accesses: Access) -> tuple[World, Client, Gateway]:
    """A client and a gateway that have joined the portal; by default there is one resource, 10.20.0.0/24."""
    world = World()
    for access in accesses or (Access("net", "10.20.0.0/24", "gateway"),):
        world.portal.add(access)
    client, gateway = world.add_client(), world.add_gateway()
    client.join()
    gateway.join()
    world.run(2 * LATENCY)
    client.reported.clear()
    gateway.reported.clear()
    return world, client, gateway


def connected(*accesses: Access) -> tuple[World, Client, Gateway]:
    """As `joined`, after a packet to 10.20.0.5 and its answer have passed."""
    world, client, gateway = joined(*accesses)
    client.packets_in(datagram("hello"))
    world.run_until(lambda: gateway.texts() == ["hello"], within=3.0)
    gateway.packets_in(answer("welcome"))
    world.run(LATENCY)
    assert client.texts() == ["welcome"]
    for device in (client, gateway):
        device.received.clear()
        device.reported.clear()
    world.portal.heard.clear()
    return world, client, gateway


def passes(world: World, client: Client, gateway: Gateway, destination: str = "10.20.0.5") -> bool:
    """Whether a packet of the client reaches the gateway's host now, over the existing connection."""
    return arrives(world, client, gateway, datagram("does it pass", destination))


def arrives(world: World, sender: Device, receiver: Device, packet: SuperPacket) -> bool:
    """Whether a packet leaves the tunnel on the other side at once."""
    before = len(receiver.received)
    data = bytes(packet.data)
    sender.packets_in(packet)
    world.run(2 * LATENCY)
    return data in [bytes(arrived.data) for arrived in receiver.received[before:]]


def answers(world: World, client: Client, gateway: Gateway, source: str = "10.20.0.5", *, port: int = 5000) -> bool:
    """Whether a packet from a resource reaches the client's host now."""
    return arrives(world, gateway, client, answer("does it come back", source, port=port))


def announced_candidates(world: World, name: str) -> list[str]:
    """The candidates that one side has sent to the portal."""
    return [
        candidate
        for heard in world.portal.heard
        if heard.sender == name
        and isinstance(heard.message, to_client.BroadcastIceCandidates | to_gateway.BroadcastIceCandidates)
        for candidate in heard.message.candidates
    ]


def datagram(
    text: str,
    destination: str = "10.20.0.5",
    *,
    source: str = "100.64.0.1",
    port: int = 5000,
    source_port: int = 40000,
    size: int = 100,
) -> SuperPacket:
    """A UDP packet from a client's host with a text in it."""
    if ":" in destination and ":" not in source:
        source = "fd00:2021:1111::1"
    header = IPv6(src=source, dst=destination) if ":" in destination else IP(src=source, dst=destination, flags="DF")
    return packet_of(built(header, UDP(sport=source_port, dport=port), text.encode().ljust(size - 28, b".")))


def answer(text: str, source: str = "10.20.0.5", *, to: str = "100.64.0.1", port: int = 5000) -> SuperPacket:
    """A UDP packet from a resource to the client."""
    if ":" in source and ":" not in to:
        to = "fd00:2021:1111::1"
    return datagram(text, to, source=source, port=40000, source_port=port)


def segment(source: str, *, flags: str = "A") -> SuperPacket:
    """A TCP segment to a resource."""
    is_ipv6 = ":" in source
    header = IPv6(src=source, dst="fd00:20::5") if is_ipv6 else IP(src=source, dst="10.20.0.5", flags="DF")
    return packet_of(built(header, TCP(sport=40000, dport=80, flags=flags)))


def icmp_about(packet: SuperPacket, router: str, error: Packet, *, to: str = "100.64.0.1") -> SuperPacket:
    """What a router reports about a packet, to a client."""
    is_ipv6 = ":" in router
    if is_ipv6 and ":" not in to:
        to = "fd00:2021:1111::1"
    header = IPv6(src=router, dst=to) if is_ipv6 else IP(src=router, dst=to)
    return packet_of(built(header, error, bytes(packet.data[:576])))


def ping(destination: str, *, source: str = "100.64.0.1", number: int = 7) -> SuperPacket:
    if ":" in destination:
        own = source if ":" in source else "fd00:2021:1111::1"
        return packet_of(built(IPv6(src=own, dst=destination), ICMPv6EchoRequest(id=number), b"ping"))
    return packet_of(built(IP(src=source, dst=destination), ICMP(id=number), b"ping"))


def fragment(destination: str = "10.20.0.5", *, first: bool = True) -> SuperPacket:
    """A fragment of a UDP packet to port 5000."""
    header = IP(src="100.64.0.1", dst=destination, flags="MF" if first else 0, frag=0 if first else 9)
    if first:
        return packet_of(built(header, UDP(sport=40000, dport=5000, len=100), bytes(64)))
    header.proto = 17
    return packet_of(built(header, bytes(28)))


def inject(world: World, sender: Device, receiver: Device, *packets: SuperPacket) -> None:
    """Send packets through a connection without the sender's checks, and let them arrive."""
    for packet in packets:
        sender.node.encapsulate(receiver.name, packet, world.now, world.utc)
    sender.node.flush(world.now)
    sender.drain()
    world.run(2 * LATENCY)


def control_packet(payload: bytes) -> SuperPacket:
    """A control packet with any payload."""
    header = (6 << 28).to_bytes(4, "big") + len(payload).to_bytes(2, "big") + bytes((control.NEXT_HEADER, 0))
    return packet_of(bytearray(header + bytes(32) + payload))


def text_of(packet: SuperPacket) -> str:
    return bytes(packet.data[packet.transport_offset + 8 :]).rstrip(b".").decode()


def packet_of(data: bytearray) -> SuperPacket:
    packet = parse(data)
    assert packet is not None
    return packet


def _credentials(owner: Device, peer: Device) -> IceCredentials:
    generated = snownet.credentials(owner, peer)
    return IceCredentials(username=generated.ufrag, password=generated.password)


_PASSED_ON: dict[type, Any] = {
    to_client.BroadcastIceCandidates: to_gateway.IceCandidates,
    to_client.BroadcastInvalidatedIceCandidates: to_gateway.InvalidateIceCandidates,
    to_gateway.BroadcastIceCandidates: to_client.IceCandidates,
    to_gateway.BroadcastInvalidatedIceCandidates: to_client.InvalidateIceCandidates,
}

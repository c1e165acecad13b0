"""Nodes on a network that loses, delays and reorders datagrams, the portal that introduces them, and a clock."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.ice.agent import Credentials
from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Transmit
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionFailed,
    InvalidatedCandidates,
    NewCandidates,
    NodeEvent,
    PathChanged,
    Role,
)
from firezone_tunnel.core.snownet.node import Node
from firezone_tunnel.core.wireguard.seal import POOL_SIZE, seal_pool
from tests.unit.core.packet.packets import IP, UDP, built, super_packet, tcp

UTC = 1_790_000_000.0
LATENCY = 0.02
INITIATION, RESPONSE, DATA = 1, 2, 4


class Host:
    """A node. It and its peers know each other by their names."""

    def __init__(self, world: World, name: str, role: Role, *addresses: str) -> None:
        self.world = world
        self.name = name
        self.slots = seal_pool()
        self.node = Node(role=role, entropy=stream(f"{name} {world.now}"), now=world.now, pool=self.slots)
        self.addresses = tuple(SocketAddress(host, 52625) for host in addresses)
        self.node.set_local_addresses(self.addresses, world.now)
        self.events: list[tuple[float, NodeEvent]] = []
        self.packets: list[tuple[str, SuperPacket]] = []
        self.sent: list[tuple[float, bytes]] = []
        self.is_gone = False
        self._buffer = receive_buffer()

    def send(self, peer: Host, *packets: SuperPacket) -> None:
        """Run one turn of the event loop: send packets and flush."""
        for packet in packets:
            self.node.encapsulate(peer.name, packet, self.world.now, self.world.utc)
        self.node.flush(self.world.now)
        self.drain()

    def texts(self, sender: Host | None = None) -> list[str]:
        """The payloads of `datagram`s that arrived, in order."""
        return [
            bytes(packet.segment(index).data[28:]).rstrip(b".").decode()
            for name, packet in self.packets
            if sender is None or name == sender.name
            for index in range(packet.segments)
        ]

    def of(self, kind: Any) -> list[Any]:
        return [event for _, event in self.events if isinstance(event, kind)]

    def is_established(self, peer: Host) -> bool:
        events = [
            event
            for event in self.of(ConnectionEstablished | ConnectionFailed | ConnectionClosed)
            if event.peer_id == peer.name
        ]
        return bool(events) and isinstance(events[-1], ConnectionEstablished)

    def path(self, peer: Host) -> tuple[SocketAddress, SocketAddress]:
        """The local and remote address for a peer, as last reported."""
        events = [event for event in self.of(ConnectionEstablished | PathChanged) if event.peer_id == peer.name]
        return events[-1].local, events[-1].remote

    def failure(self) -> tuple[float, str]:
        """The time and the reason of the only failure."""
        (failed,) = [(at, event) for at, event in self.events if isinstance(event, ConnectionFailed)]
        return failed[0], failed[1].reason

    def messages(self, kind: int) -> list[float]:
        """The times at which WireGuard messages of a kind were sent."""
        return [at for at, datagram in self.sent if datagram[0] == kind and datagram[4:8] != b"\x21\x12\xa4\x42"]

    def move(self, *addresses: str) -> None:
        """Move the host: its former addresses are no longer reachable."""
        self.addresses = tuple(SocketAddress(host, 52625) for host in addresses)
        self.node.set_local_addresses(self.addresses, self.world.now)
        self.drain()

    def handle(self, datagrams: list[bytes], source: SocketAddress, local: SocketAddress, ecn: int = 0) -> None:
        """Receive a batch: datagrams of equal size, the last possibly shorter."""
        self.take_in(b"".join(datagrams), len(datagrams[0]), source, local, ecn)

    def take_in(
        self, data: bytes, segment_size: int, source: SocketAddress, local: SocketAddress, ecn: int = 0
    ) -> None:
        if self.is_gone:
            return
        self._buffer[: len(data)] = data
        batch = DatagramBatch.received(self._buffer, len(data), segment_size, source, local, ecn)
        for received in self.node.handle_datagrams(batch, self.world.now, self.world.utc):
            self.packets += [(received.peer_id, packet.copy()) for packet in received.packets]
        self.drain()

    def handle_timeout(self) -> None:
        self.node.handle_timeout(self.world.now, self.world.utc)
        self.drain()

    def due_at(self) -> float:
        timeout = None if self.is_gone else self.node.next_timeout()
        return float("inf") if timeout is None else timeout.at

    def drain(self) -> None:
        for transmit in self.node.transmits():
            self.world.carry(self, transmit)
            transmit.release()
        for event in self.node.events():
            self.events.append((self.world.now, event))
            self.world.signal(self, event)


class World:
    """`lose(sender, datagram)` and `delay(sender)` are the network; both may draw from a seeded source."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.hosts: dict[str, Host] = {}
        self.lose: Callable[[Host, bytes], bool] = nothing
        self.delay: Callable[[Host], float] = lambda sender: LATENCY
        self.portal_is_up = True
        self._serial = count()
        self._in_flight: list[tuple[float, int, Callable[[], None]]] = []

    @property
    def utc(self) -> float:
        return self.now + UTC

    def client(self, name: str = "client", *addresses: str) -> Host:
        return self._host(name, Role.CLIENT, *(addresses or ("10.0.1.1",)))

    def gateway(self, name: str = "gateway", *addresses: str) -> Host:
        return self._host(name, Role.GATEWAY, *(addresses or ("10.0.2.1",)))

    def introduce(self, client: Host, gateway: Host, *, generation: str = "", preshared_key: bytes = bytes(32)) -> None:
        """Introduce two hosts as the portal does: first the gateway. The same keys give the same credentials."""
        self._upsert(gateway, client, generation, preshared_key)
        self._upsert(client, gateway, generation, preshared_key)

    def introduce_to(self, host: Host, peer: Host, *, generation: str = "", preshared_key: bytes = bytes(32)) -> None:
        self._upsert(host, peer, generation, preshared_key)

    def run(self, seconds: float) -> None:
        """Let time pass, calling every deadline at its exact time."""
        end = self.now + seconds
        for _ in range(200_000):
            at = min([host.due_at() for host in self.hosts.values()] + [entry[0] for entry in self._in_flight[:1]])
            if at > end:
                self.now = end
                return
            self.now = max(self.now, at)
            while self._in_flight and self._in_flight[0][0] <= self.now:
                heapq.heappop(self._in_flight)[2]()
            for host in list(self.hosts.values()):
                if host.due_at() <= self.now:
                    host.handle_timeout()
        raise AssertionError("timers storm")

    def run_until(self, condition: Callable[[], bool], *, within: float) -> float:
        """Run in small steps until a condition is true. Returns the time that it took."""
        start = self.now
        while not condition():
            assert self.now - start < within, f"not within {within} s"
            self.run(0.01)
        return self.now - start

    def carry(self, sender: Host, transmit: Transmit) -> None:
        """Send datagrams over the network: those of a batch that aren't lost arrive as a batch."""
        payload = bytes(transmit.payload)
        size = transmit.segment_size or len(payload)
        datagrams = [payload[start : start + size] for start in range(0, len(payload), size)]
        sender.sent += [(self.now, datagram) for datagram in datagrams]
        arriving = [datagram for datagram in datagrams if not self.lose(sender, datagram)]
        source = transmit.source or sender.addresses[0]
        if not arriving or source not in sender.addresses:
            return
        destination, ecn = transmit.destination, transmit.ecn

        def arrive() -> None:
            for host in self.hosts.values():
                if destination in host.addresses:
                    host.handle(arriving, source, destination, ecn)

        self._later(self.delay(sender), arrive)

    def signal(self, sender: Host, event: NodeEvent) -> None:
        """Pass candidates to the peer, as the portal does."""
        if not self.portal_is_up or not isinstance(event, NewCandidates | InvalidatedCandidates):
            return
        peer = self.hosts[event.peer_id]
        new, candidates = isinstance(event, NewCandidates), event.candidates

        def arrive() -> None:
            apply = peer.node.add_remote_candidate if new else peer.node.remove_remote_candidate
            for candidate in candidates:
                apply(sender.name, candidate, self.now)
            peer.drain()

        self._later(LATENCY, arrive)

    def _host(self, name: str, role: Role, *addresses: str) -> Host:
        host = self.hosts[name] = Host(self, name, role, *addresses)
        return host

    def _upsert(self, host: Host, peer: Host, generation: str, preshared_key: bytes) -> None:
        host.node.upsert_connection(
            peer.name,
            remote_public_key=peer.node.public_key,
            preshared_key=preshared_key,
            local=credentials(host, peer, generation),
            remote=credentials(peer, host, generation),
            now=self.now,
            utc_now=self.utc,
        )
        host.drain()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._in_flight, (self.now + seconds, next(self._serial), call))


def connected(*, seconds: float = 0.0) -> tuple[World, Host, Host]:
    """A client and a gateway that have exchanged a packet each way, and then let some time pass."""
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))
    world.run_until(lambda: gateway.texts() == ["hello"], within=3.0)
    gateway.send(client, datagram("welcome"))
    world.run(LATENCY)
    assert client.texts() == ["welcome"]
    world.run(seconds)
    client.packets.clear()
    gateway.packets.clear()
    return world, client, gateway


def assert_traffic_flows(world: World, client: Host, gateway: Host) -> None:
    for sender, receiver in ((client, gateway), (gateway, client)):
        receiver.packets.clear()
        sender.send(receiver, datagram(f"from {sender.name}"))
        world.run(0.1)
        assert receiver.texts(sender) == [f"from {sender.name}"]


def assert_no_slot_is_lost(hosts: Iterable[Host]) -> None:
    assert [host.slots.free for host in hosts] == [POOL_SIZE for _ in hosts]


def credentials(owner: Host, peer: Host, generation: str = "") -> Credentials:
    """Derive credentials from both public keys, as the portal does."""
    keys = sorted((owner.node.public_key, peer.node.public_key))
    secret = hashlib.sha256(owner.node.public_key + b"".join(keys) + generation.encode()).hexdigest()
    return Credentials(secret[:4], secret[4:26])


def datagram(text: str, *, size: int = 100, ecn: int = 0) -> SuperPacket:
    """A UDP packet over IPv4, `size` bytes long, that contains a text."""
    payload = text.encode().ljust(size - 28, b".")
    raw = built(IP(src="100.64.0.1", dst="10.9.0.1", tos=ecn, flags="DF"), UDP(sport=40000, dport=53), payload)
    packet = parse(raw)
    assert packet is not None
    return packet


def run_of_segments(*, segments: int, segment_size: int = 1000, ecn: int = 0) -> SuperPacket:
    """A TCP super-packet."""
    payload = bytes(index % 251 for index in range(segments * segment_size))
    ip_header = IP(src="100.64.0.1", dst="10.9.0.1", tos=ecn, flags="DF", id=1)
    return super_packet(ip_header, tcp(), payload, segment_size=segment_size)


def nothing(sender: Host, datagram: bytes) -> bool:
    return False


def everything(sender: Host, datagram: bytes) -> bool:
    return True


def stream(name: str) -> Entropy:
    """Deterministic random bytes."""
    calls = count()
    return lambda size: hashlib.shake_256(f"{name} {next(calls)}".encode()).digest(size)

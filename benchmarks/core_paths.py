"""Whole paths without I/O: a super-packet through a client and a gateway, and a batch through a relay.

Client and gateway are connected and have filters. The benchmark passes their datagrams to each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from benchmarks.core_steps import CALLS, SEGMENTS, Case, super_packet
from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.inbound import Received
from firezone_tunnel.core.tunnel.filter import Rules
from tests.unit.core.relay import world as relaying
from tests.unit.core.tunnel.world import Access, Device, connected

SEAL, OPEN = "seal (2 sends)", "open + coalesce"
WHOLE_PATHS = {
    "client, out: route + filter + seal": SEAL,
    "gateway, in: open + filter + coalesce": OPEN,
    "gateway, out: route + filter + seal": SEAL,
    "client, in: open + filter + coalesce": OPEN,
}
"""Whole paths, and the bare step for comparison. The goal is at most 15 % overhead."""

_FILTERS = [
    Filter(protocol="tcp", port_range_start=80, port_range_end=80),
    Filter(protocol="tcp", port_range_start=5000, port_range_end=5000),
    Filter(protocol="udp", port_range_start=5000, port_range_end=5000),
    Filter(protocol="icmp"),
]
_SERVER, _PORT, _CLIENT_PORT = "10.20.0.5", 5000, 49152
_RELAYED_DATAGRAMS = 49
_RELAYED_SIZE = 1312  # an encrypted packet of 1,280 bytes


def path_cases() -> Iterator[Case]:
    _, client, gateway = connected(Access("net", "10.20.0.0/24", "gateway", filters=_FILTERS))
    upwards = super_packet(client.ipv4, _SERVER, _CLIENT_PORT, _PORT)
    downwards = super_packet(_SERVER, client.ipv4, _PORT, _CLIENT_PORT)
    rules = Rules.of(_FILTERS)
    assert rules.permits(upwards, upwards.destination_port)
    yield Case("filter", lambda: rules.permits(upwards, upwards.destination_port))
    whole = iter(WHOLE_PATHS)
    for sender, receiver, packet in ((client, gateway, upwards), (gateway, client, downwards)):
        yield Case(f"{sender.name}, out: route + filter", _routing_only(sender, packet))
        yield Case(next(whole), _sealing(sender, packet))
        arriving = _Arriving(sender, receiver, packet)
        yield Case(next(whole), arriving.open_next, prepare=arriving.seal_all)
        yield Case(f"{receiver.name}, in: filter", _filtering_only(sender, receiver, packet))


def relay_cases() -> Iterator[Case]:
    world = relaying.World()
    client = relaying.Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, relaying.PEER4)
    server, now, utc = world.server, world.now, world.utc
    payload = bytes(_RELAYED_SIZE)
    channel_data = relaying.channel_data(0x4000, payload)
    from_client = _batch(channel_data * _RELAYED_DATAGRAMS, len(channel_data), client.address, relaying.LISTEN4)
    relayed = SocketAddress(relaying.RELAY4, port)
    from_peer = _batch(payload * _RELAYED_DATAGRAMS, _RELAYED_SIZE, relaying.PEER4, relayed)

    def leave() -> None:
        transmits = list(server.transmits())
        assert sum(-(-len(sent.payload) // sent.segment_size) for sent in transmits) == _RELAYED_DATAGRAMS
        for transmit in transmits:
            transmit.release()

    def to_peer() -> None:
        server.handle_client_datagrams(from_client, now, utc)
        leave()

    def to_client() -> None:
        server.handle_peer_datagrams(port, from_peer, now)
        leave()

    yield Case(f"relay, {_RELAYED_DATAGRAMS} datagrams: client to peer", to_peer)
    yield Case(f"relay, {_RELAYED_DATAGRAMS} datagrams: peer to client", to_client)


def _sealing(sender: Device, packet: SuperPacket) -> Callable[[], object]:
    """From the TUN device's super-packet to the datagrams for the socket."""
    tunnel, packets, now, utc = sender.tunnel, [packet], sender.world.now, sender.world.utc

    def run() -> None:
        assert not tunnel.handle_packets(packets, now, utc)
        sent = 0
        for transmit in tunnel.transmits():
            sent += 1
            transmit.release()
        assert sent == 2  # the packet is sent in two halves

    return run


class _Arriving:
    """Datagrams of one sender. Each is opened once, because replays are dropped; `seal_all` creates new datagrams."""

    def __init__(self, sender: Device, receiver: Device, packet: SuperPacket) -> None:
        self._sender = sender
        self._receiver = receiver
        self._packets = [packet]
        self._sealed: deque[list[tuple[bytes, DatagramBatch]]] = deque()

    def seal_all(self) -> None:
        sender = self._sender
        self._sealed.clear()
        for _ in range(CALLS):
            sender.tunnel.handle_packets(self._packets, sender.world.now, sender.world.utc)
            batches = []
            for transmit in sender.tunnel.transmits():
                data = bytes(transmit.payload)
                batch = DatagramBatch.received(
                    _BUFFER, len(data), transmit.segment_size, sender.addresses[0], self._receiver.addresses[0]
                )
                batches.append((data, batch))
                transmit.release()
            self._sealed.append(batches)

    def open_next(self) -> list[SuperPacket]:
        tunnel, now, utc = self._receiver.tunnel, self._receiver.world.now, self._receiver.world.utc
        opened: list[SuperPacket] = []
        segments = 0
        for data, batch in self._sealed.popleft():
            _BUFFER[: len(data)] = data
            opened = tunnel.handle_datagrams(batch, now, utc)
            segments += sum(packet.segments for packet in opened)
        assert segments == SEGMENTS
        return opened


def _routing_only(sender: Device, packet: SuperPacket) -> Callable[[], object]:
    """The tunnel's own work without its node, which is replaced by a node that sends nothing."""
    tunnel, packets, now, utc = sender.tunnel, [packet], sender.world.now, sender.world.utc
    node, idle = tunnel.node, _IdleNode()

    def run() -> None:
        tunnel.node = idle
        tunnel.handle_packets(packets, now, utc)
        tunnel.node = node
        assert idle.carried

    return run


def _filtering_only(sender: Device, receiver: Device, packet: SuperPacket) -> Callable[[], object]:
    tunnel, now, utc = receiver.tunnel, receiver.world.now, receiver.world.utc
    node, idle = tunnel.node, _IdleNode([Received(sender.name, [packet])])
    batch = _batch(b"", 1, sender.addresses[0], receiver.addresses[0])

    def run() -> None:
        tunnel.node = idle
        accepted = tunnel.handle_datagrams(batch, now, utc)
        tunnel.node = node
        assert accepted

    return run


class _IdleNode:
    """A node that encapsulates nothing and returns the given packets as received."""

    has_events = False

    def __init__(self, received: list[Received] | None = None) -> None:
        self.carried = 0
        self._received = received or []

    def encapsulate(self, peer_id: str, packet: SuperPacket, now: float, utc_now: float) -> None:
        self.carried += 1

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        return self._received

    def flush(self, now: float) -> None: ...


_BUFFER = receive_buffer()


def _batch(data: bytes, size: int, source: SocketAddress, local: SocketAddress) -> DatagramBatch:
    buffer = receive_buffer()
    buffer[: len(data)] = data
    return DatagramBatch.received(buffer, len(data), size, source, local)

"""A packet's way in. A batch takes each step once, however many datagrams it has, as long as they belong together.

1. `UdpTransport.doRead` receives what the kernel collected of one sender (UDP_GRO).
2. `TunnelService.batch_received` hands it over.
3. `ClientTunnel.handle_datagrams` or `GatewayTunnel.handle_datagrams` gives it to `Node.handle_datagrams`.
4. `Inbound.handle` takes off a relay's channel headers and finds the session.
5. `Opener.open` authenticates and decrypts in place, `Session.accept` checks for replays.
6. `coalesce` verifies checksums and merges segments into super-packets.
7. Back in the tunnel each super-packet's source is checked, and the gateway's filter.
8. `TunTransport.write` hands each to the host: one system call.

Everything but transport data takes the slow path: `Node` handles STUN and handshakes, `Relays` a relay's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.deadlines import Deadlines
from firezone_tunnel.core.packet.coalesce import Arena, coalesce
from firezone_tunnel.core.packet.rewrite import CE, clamp_segment_size, mark_congestion
from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from firezone_tunnel.core.snownet.connection import Connection
from firezone_tunnel.core.snownet.directory import Directory
from firezone_tunnel.core.snownet.events import NodeCounters
from firezone_tunnel.core.snownet.relays import Relays
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.channel_data import ChannelData, common_channel_data, parse_channel_data
from firezone_tunnel.core.wireguard.open import Opener, open_lone, receiver_of
from firezone_tunnel.core.wireguard.session import Session

TIMER_SLACK = 1.0
"""Seconds after which a connection's timers are looked at when packets went through it. Packets only set timers that
are longer, or that may be late, so this saves looking at them for every batch."""


class Received(NamedTuple):
    """Packets that came through one connection: authentic, new, in order, valid until the next receive."""

    peer_id: str
    packets: list[SuperPacket]


class Inbound:
    """Demultiplexes and opens the batches that arrive at a node."""

    def __init__(
        self,
        directory: Directory,
        relays: Relays,
        deadlines: Deadlines[object],
        counters: NodeCounters,
        *,
        handle_control: Callable[[memoryview, DatagramBatch, float, float], object],
        settle: Callable[[Connection, float, float], object],
    ) -> None:
        """`handle_control(datagram, batch, now, utc_now)` handles a peer's STUN and handshake messages.

        `settle(connection, now, utc_now)` lets a connection act where more than timers and counters changed.
        """
        self._directory = directory
        self._relays = relays
        self._deadlines = deadlines
        self._counters = counters
        self._handle_control = handle_control
        self._settle = settle
        self._arena = Arena()
        self._opener = Opener()

    def handle(self, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        """Handle a batch. Returns the packets in it, by connection.

        WireGuard messages may come over any path: their keys say whose they are (docs/protocol/data-plane.md, 2.7).
        """
        if batch.count > 1:
            self._arena.reset()
        allocation = self._relays.at_socket(batch.source)
        if allocation is None:
            return self._from_peer(batch, now, utc_now)
        return self._from_relay(allocation, batch, now, utc_now)

    def _from_peer(self, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        receiver = self._opener.common_receiver(batch.rows)
        if receiver is None:
            return self._mixed(batch, 0, batch.count, now, utc_now)
        received = self._open(batch, receiver, 0, batch.count, now, utc_now)
        return [] if received is None else [received]

    def _from_relay(self, allocation: Allocation, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        """Handle a batch from a relay's address: mostly the datagrams of one peer, on its channel."""
        data = common_channel_data(batch.rows, exact=True)
        if data is not None:
            return self._from_channel(allocation, batch, data, now, utc_now)
        received: list[Received] = []
        for index in range(batch.count):
            data = parse_channel_data(batch.rows, index, exact=True)
            if data is not None:
                received += self._from_channel(allocation, batch, data, now, utc_now)
                continue
            message = stun.parse(batch.rows.row(index))
            if message is None or not self._relays.handle_message(allocation, message, batch.source, batch.local, now):
                # A peer behind the relay's address sent it, not the relay (docs/decisions.md, 4).
                received += self._mixed(batch, index, index + 1, now, utc_now)
        return received

    def _from_channel(
        self, allocation: Allocation, batch: DatagramBatch, data: ChannelData, now: float, utc_now: float
    ) -> list[Received]:
        unwrapped = self._relays.unwrap(allocation, batch, data, now)
        if unwrapped is None:
            self._counters.unbound_channels += data.payloads.count
            return []
        return self._from_peer(unwrapped, now, utc_now)

    def _mixed(self, batch: DatagramBatch, first: int, after_last: int, now: float, utc_now: float) -> list[Received]:
        """Handle datagrams that are not all of one session; messages of one session in a row are opened together."""
        rows = batch.rows
        received: list[Received] = []
        while first < after_last:
            receiver = receiver_of(rows, first)
            after = first + 1
            if receiver is None:
                self._handle_control(rows.row(first), batch, now, utc_now)
            else:
                while after < after_last and receiver_of(rows, after) == receiver:
                    after += 1
                opened = self._open(batch, receiver, first, after - first, now, utc_now)
                if opened is not None:
                    received.append(opened)
            first = after
        return received

    def _open(
        self, batch: DatagramBatch, receiver: int, first: int, count: int, now: float, utc_now: float
    ) -> Received | None:
        """Decrypt `count` transport data messages of one session, from datagram `first` on."""
        connection = self._directory.by_index(receiver)
        session = None if connection is None else connection.peer.receiving_session(receiver, now)
        if connection is None or session is None:
            self._counters.unknown_sessions += count
            return None
        if count == 1:
            packets, payload_size = self._open_lone(batch, session, first)
        else:
            packets, payload_size = self._open_run(batch, session, first, count)
        if packets is None:
            return None
        unconfirmed = not session.confirmed
        connection.peer.received_data(session, payload_size, now)
        # Everything else that a batch changes can wait: only timers and counters.
        woken = payload_size > 0 and not connection.received(now)
        if woken or unconfirmed or not payload_size:
            self._settle(connection, now, utc_now)
        if not payload_size:
            return None
        self._deadlines.no_later_than(connection, now + TIMER_SLACK, "timers after receiving")
        if batch.ecn == CE:
            for packet in packets:
                mark_congestion(packet)
        for packet in packets:
            clamp_segment_size(packet)
        return Received(connection.peer_id, packets)

    def _open_lone(self, batch: DatagramBatch, session: Session, index: int) -> tuple[list[SuperPacket] | None, int]:
        """The packet in one datagram, and its size; None if the message is forged or a replay."""
        data, counter = open_lone(session.open_cipher, batch.rows, index)
        if not session.accept_lone(counter):
            return None, 0
        packet = parse(data) if data else None
        if packet is not None:
            return [packet], len(data)
        if data:
            self._counters.malformed_packets += 1
        return [], len(data)

    def _open_run(
        self, batch: DatagramBatch, session: Session, first: int, count: int
    ) -> tuple[list[SuperPacket] | None, int]:
        """The packets in `count` datagrams, merged, and the size of one; None if no message is authentic and new."""
        opened = self._opener.open(session.open_cipher, batch.rows, first, count)
        fresh = session.accept(opened.counters, opened.authentic)
        if b"\1" not in fresh.tobytes():
            return None, 0
        rejected = self._arena.rejected
        packets = coalesce(opened.packets, arena=self._arena, keep=fresh)
        self._counters.malformed_packets += self._arena.rejected - rejected
        return packets, opened.packets.size

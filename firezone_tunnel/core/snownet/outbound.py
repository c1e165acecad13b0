"""A packet's way out. One super-packet takes each step once, however many segments it has.

1. `TunTransport.doRead` reads what the host sends, up to 64 KiB a frame, and merges the lone packets of a portion.
2. `TunnelService.packets_received` hands them over, a few super-packets at a time.
3. `ClientTunnel.handle_packets` or `GatewayTunnel.handle_packets` routes, authorizes and filters.
4. `Node.encapsulate` finds the connection, `Connection.encapsulate` its path.
5. `Outbound.send` finds the session; it gathers lone packets of one size until `flush`.
6. `SealBuffer.seal` or `seal_lone` segments and encrypts into a pooled buffer.
7. `Path.send_run` adds a relay's channel headers and makes a `Transmit`.
8. `UdpTransport.send` passes it to `SegmentedSender.send`: one system call.
"""

from __future__ import annotations

from collections import deque

from firezone_tunnel.core.datagrams import BufferPool, send_limit
from firezone_tunnel.core.packet.rewrite import clamp_segment_size
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import Transmit
from firezone_tunnel.core.snownet.events import Outbox
from firezone_tunnel.core.snownet.paths import Path, RelayedPath
from firezone_tunnel.core.snownet.relays import Relays
from firezone_tunnel.core.wireguard.peer import Peer
from firezone_tunnel.core.wireguard.seal import SealBuffer, plan
from firezone_tunnel.core.wireguard.session import Session
from firezone_tunnel.core.wireguard.transport_data import OVERHEAD, seal_message

MAX_WAITING = 128  # docs/protocol/data-plane.md, 2.3
_MIN_POOLED = 4  # fewer lone packets are sealed faster into memory of their own
_RESERVED_BUFFERS = 4  # which a turn of super-packets may need


class Outbound:
    """Sends the packets of one connection, and keeps packets until there is a path and a session."""

    def __init__(self, peer: Peer, *, may_wait: bool, relays: Relays, pool: BufferPool[SealBuffer], outbox: Outbox):
        """Without `may_wait`, packets that can't leave are dropped: a gateway waits for its client's handshake."""
        self.path: Path | None = None
        self._peer = peer
        self._may_wait = may_wait
        self._relays = relays
        self._pool = pool
        self._outbox = outbox
        self._waiting: deque[SuperPacket] = deque(maxlen=MAX_WAITING)
        self._lone: list[SuperPacket] = []  # of one length and ECN, to leave together
        self._lone_limit = 0

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def send(self, packet: SuperPacket, now: float) -> bool:
        """Send a packet, a lone one on `flush`. False: it waits for a session, and a handshake is scheduled."""
        path = self.path
        session = None if path is None else self._peer.sending_session(now)
        if path is None or session is None or self._waiting:
            self.hold(packet)
            return False
        if packet.segment_size:
            if self._lone:
                self.flush(now)
            self._send_run(packet, session, path, now)
        else:
            clamp_segment_size(packet)
            self._gather(packet, path, now)
        return True

    def hold(self, packet: SuperPacket) -> None:
        """Keep a copy until there is a path and a session. The oldest packets are overwritten."""
        counters = self._outbox.counters
        if not self._may_wait:
            counters.packets_unconnected += packet.segments
            return
        if len(self._waiting) == MAX_WAITING:
            counters.packets_overwritten += 1
        self._waiting.append(packet.copy())

    def flush(self, now: float) -> None:
        """Send the lone packets of a turn: they are valid no longer than that."""
        packets = self._lone
        if not packets:
            return
        self._lone = []
        session = self._peer.sending_session(now)
        if session is None or self.path is None:
            for packet in packets:
                self.hold(packet)
            return
        self._send_lone(packets, session, self.path, now)

    def send_waiting(self, now: float) -> None:
        """Send the packets that wait, if there is a session by now."""
        if self.path is None or self._peer.sending_session(now) is None:
            return
        packets = list(self._waiting)
        self._waiting.clear()
        for packet in packets:
            self.send(packet, now)
        self.flush(now)

    def transmit(self, transmit: Transmit | None) -> None:
        """Queue what a path made of a datagram; None if it can't leave."""
        if transmit is not None:
            self._outbox.transmits.append(transmit)
        path = self.path
        if isinstance(path, RelayedPath) and path.allocation.has_transmits:
            self._relays.touch(path.allocation)

    def clear(self) -> None:
        self._lone.clear()
        self._waiting.clear()

    def _gather(self, packet: SuperPacket, path: Path, now: float) -> None:
        """Collect lone packets for one send, as long as they come in one size and with one ECN."""
        lone = self._lone
        if lone:
            first = lone[0]
            fits = len(packet.data) == len(first.data) and packet.ecn == first.ecn and len(lone) < self._lone_limit
            if fits:
                lone.append(packet)
                return
            self.flush(now)
        self._lone = [packet]
        self._lone_limit = send_limit(path.headroom + OVERHEAD + len(packet.data))

    def _send_run(self, packet: SuperPacket, session: Session, path: Path, now: float) -> None:
        headroom = path.headroom
        sent = 0
        for first, count in plan(packet, headroom):
            buffer = self._pool.borrow()
            if buffer is None:
                self._outbox.counters.packets_without_buffer += count
                continue
            payload, size = buffer.seal(
                session.seal_cipher,
                session.peer_index,
                session.take_counters(count),
                packet,
                first_segment=first,
                count=count,
                headroom=headroom,
            )
            self.transmit(path.send_run(payload, segment_size=size, ecn=packet.ecn, pooled=buffer, now=now))
            sent += count
        if sent:
            self._peer.sent_data(session, sent, now)

    def _send_lone(self, packets: list[SuperPacket], session: Session, path: Path, now: float) -> None:
        count = len(packets)
        first = session.take_counters(count)
        buffer = None
        if count >= _MIN_POOLED and self._pool.free > _RESERVED_BUFFERS:
            buffer = self._pool.borrow()
        ecn = packets[0].ecn
        if buffer is not None:
            payload, size = buffer.seal_lone(
                session.seal_cipher, session.peer_index, first, packets, headroom=path.headroom
            )
            self.transmit(path.send_run(payload, segment_size=size, ecn=ecn, pooled=buffer, now=now))
        else:
            sealed = [_sealed(packet, session, first + index) for index, packet in enumerate(packets)]
            self.transmit(path.send(sealed, now=now, ecn=ecn))
        self._peer.sent_data(session, count, now)


def _sealed(packet: SuperPacket, session: Session, counter: int) -> bytes:
    packet.complete()
    return seal_message(session.seal_cipher, session.peer_index, counter, bytes(packet.data))

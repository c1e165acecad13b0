"""All connections of one side: candidates, demultiplexing, and what leaves as datagrams (spec/data-plane.md, 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from firezone_tunnel.datagrams import DatagramBatch
from firezone_tunnel.errors import ProtocolError
from firezone_tunnel.ice.agent import Credentials
from firezone_tunnel.ice.candidate import Candidate, parse_sdp
from firezone_tunnel.packet.coalesce import Arena, coalesce
from firezone_tunnel.packet.rewrite import CE, mark_congestion
from firezone_tunnel.packet.superpacket import SuperPacket
from firezone_tunnel.sansio import Entropy, SocketAddress, Timeout, Transmit
from firezone_tunnel.snownet.connection import Connection, State
from firezone_tunnel.snownet.deadlines import Deadlines
from firezone_tunnel.snownet.directory import Directory
from firezone_tunnel.snownet.events import (
    ConnectionClosed,
    InvalidatedCandidates,
    NewCandidates,
    NodeCounters,
    NodeEvent,
    Outbox,
    Role,
    Terms,
)
from firezone_tunnel.stun import message as stun
from firezone_tunnel.wireguard.cookie import Doorman
from firezone_tunnel.wireguard.handshake import HandshakeInitiation, StaticKey, open_static
from firezone_tunnel.wireguard.seal import SlotPool

_TIMER_SLACK = 1.0
"""Seconds after which a connection's timers are looked at when packets went through it. Packets only set timers that
are longer, or that may be late, so this saves looking at them for every batch."""


class Received(NamedTuple):
    """Packets that came through one connection: authentic, new, in order, valid until the next receive."""

    cid: str
    packets: list[SuperPacket]


class Node:
    """Connections to peers that the portal introduces, over datagrams that somebody else sends and receives.

    After each `handle_*` and after `encapsulate`, which is followed by `flush` before the packets' memory is reused,
    drain `transmits` and `events`.
    """

    def __init__(self, *, role: Role, entropy: Entropy, now: float, slots: SlotPool, worker: int = 0) -> None:
        self._role = role
        self._entropy = entropy
        self._slots = slots
        self._worker = worker
        self._outbox = Outbox()
        self._arena = Arena()
        self._addresses: tuple[SocketAddress, ...] = ()
        self._begin()

    @property
    def public_key(self) -> bytes:
        """What the portal tells our peers; another one after each `reset`."""
        return self._key.public

    @property
    def counters(self) -> NodeCounters:
        return self._outbox.counters

    def has_connection(self, cid: str) -> bool:
        return cid in self._connections

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None:
        """The addresses that our sockets can be reached at, the preferred one of each family first."""
        gone = [address for address in self._addresses if address not in addresses]
        new = [address for address in addresses if address not in self._addresses]
        self._addresses = tuple(addresses)
        for connection in self._connections.values():
            for address in gone:
                self._invalidate(connection, address, now)
            for address in new:
                self._offer(connection, Candidate.host(address), now)
            self._deadlines.no_later_than(connection, now, "other local addresses")

    def upsert_connection(
        self,
        cid: str,
        *,
        remote_public_key: bytes,
        preshared_key: bytes,
        local: Credentials,
        remote: Credentials,
        now: float,
        utc_now: float,
    ) -> bool:
        """Connect to a peer. A connection on the very same terms is kept, one on others is replaced (2.2).

        Returns whether it was kept.

        Raises: ProtocolError if the public key is worthless.
        """
        terms = Terms(remote_public_key, preshared_key, local, remote)
        connection = self._connections.get(cid)
        is_kept = connection is not None and connection.terms == terms
        if connection is not None and is_kept:
            connection.renew(now, utc_now)
            self._announce(connection)
        else:
            connection = self._connect(cid, terms, now)
        self._settle(connection, now, utc_now)
        return is_kept

    def close_connection(self, cid: str, now: float, *, farewell: bytes = b"") -> None:
        """End a connection; `farewell` is a last packet for the other side, if there is a way to it."""
        connection = self._connections.get(cid)
        if connection is not None:
            self._drop(connection, now, farewell)
            self._outbox.events.append(ConnectionClosed(cid))

    def add_remote_candidate(self, cid: str, sdp: str, now: float) -> None:
        """The portal delivered a candidate of the other side. One for no connection is dropped, as are useless ones."""
        connection = self._connections.get(cid)
        if connection is None:
            self.counters.candidates_without_connection += 1
            return
        candidate = parse_sdp(sdp)
        if candidate is None or not connection.add_remote_candidate(candidate, now):
            self.counters.candidates_rejected += 1
            return
        self._deadlines.no_later_than(connection, now, "another remote candidate")

    def remove_remote_candidate(self, cid: str, sdp: str, now: float) -> None:
        """The other side invalidated a candidate. What it never told is ignored."""
        connection = self._connections.get(cid)
        candidate = parse_sdp(sdp)
        if connection is not None and candidate is not None:
            connection.agent.remove_remote_candidate(candidate, now)
            self._deadlines.no_later_than(connection, now, "one remote candidate less")

    def announce(self) -> None:
        """Tell every peer all our candidates again: the portal may have lost what we said while we were away."""
        for connection in self._connections.values():
            self._announce(connection)

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        """Take in what arrived together. Returns the packets in it, by connection.

        WireGuard messages may come over any path: their keys say whose they are (2.7).
        """
        self._arena.reset()
        receiver = batch.buffer.common_receiver(length=batch.length, segment_size=batch.segment_size)
        if receiver is None:
            return self._handle_mixed(batch, now, utc_now)
        received = self._open(batch, receiver, 0, batch.count, now, utc_now)
        return [] if received is None else [received]

    def encapsulate(self, cid: str, packet: SuperPacket, now: float, utc_now: float) -> None:
        """Send a packet, at the latest on `flush`. While there is no way yet, a client keeps it, a gateway drops it."""
        connection = self._connections.get(cid)
        if connection is None:
            self.counters.packets_without_connection += packet.segments
            return
        self._unflushed[connection] = None  # a packet that wakes a connection is gathered like any other
        if connection.encapsulate(packet, now):
            self._deadlines.no_later_than(connection, now + _TIMER_SLACK, "timers after sending")
        else:
            self._settle(connection, now, utc_now)

    def flush(self, now: float) -> None:
        """The turn ends: send the lone packets that were gathered in it."""
        if self._unflushed:
            for connection in self._unflushed:
                connection.flush(now)
            self._unflushed.clear()

    def transmits(self) -> Iterator[Transmit]:
        transmits = self._outbox.transmits
        while transmits:
            yield transmits.popleft()

    def events(self) -> Iterator[NodeEvent]:
        """What has happened; the candidates for each peer come together, the best first."""
        events = self._outbox.events
        while events:
            yield events.popleft()
        for cid, gone in _take(self._invalidated):
            yield InvalidatedCandidates(cid, gone)
        for cid, new in _take(self._new):
            yield NewCandidates(cid, new)

    def next_timeout(self) -> Timeout | None:
        return self._deadlines.first()

    def handle_timeout(self, now: float, utc_now: float) -> None:
        for connection in self._deadlines.due(now):
            connection.handle_timeout(now, utc_now)
            self._settle(connection, now, utc_now)

    def reset(self, now: float, *, farewell: bytes = b"") -> None:
        """Begin anew with another key after the network has changed; all connections are closed.

        What was to be sent is dropped: the sockets are no longer the same.
        """
        for transmit in self.transmits():
            transmit.release()
        for cid in list(self._connections):
            self.close_connection(cid, now, farewell=farewell)
        self._key.wipe()
        self._begin()

    def _begin(self) -> None:
        self._key = StaticKey.generate(self._entropy)
        self._doorman = Doorman(self._key, self._entropy)
        self._directory = Directory(self._entropy, worker=self._worker)
        self._connections: dict[str, Connection] = {}
        self._deadlines: Deadlines[Connection] = Deadlines()
        self._unflushed: dict[Connection, None] = {}
        self._new: dict[str, dict[Candidate, None]] = {}
        self._invalidated: dict[str, dict[Candidate, None]] = {}

    def _connect(self, cid: str, terms: Terms, now: float) -> Connection:
        connection = Connection(
            cid,
            self._role,
            terms,
            key=self._key,
            directory=self._directory,
            slots=self._slots,
            outbox=self._outbox,
            entropy=self._entropy,
            now=now,
        )
        previous = self._connections.get(cid)
        if previous is not None:
            self._drop(previous, now)
        self._connections[cid] = connection
        self._directory.add(connection)
        for address in self._addresses:
            self._offer(connection, Candidate.host(address), now)
        return connection

    def _drop(self, connection: Connection, now: float, farewell: bytes = b"") -> None:
        del self._connections[connection.cid]
        self._directory.remove(connection)
        self._deadlines.set(connection, None)
        self._unflushed.pop(connection, None)
        self._new.pop(connection.cid, None)
        self._invalidated.pop(connection.cid, None)
        connection.close(now, farewell)

    def _settle(self, connection: Connection, now: float, utc_now: float) -> None:
        if connection.state is not State.FAILED:
            connection.settle(now, utc_now)
        if connection.state is State.FAILED:
            self._drop(connection, now)
        else:
            self._deadlines.set(connection, connection.next_timeout())

    def _offer(self, connection: Connection, candidate: Candidate, now: float) -> None:
        added = connection.agent.add_local_candidate(candidate, now)
        if added is not None:
            self._new.setdefault(connection.cid, {})[added] = None

    def _invalidate(self, connection: Connection, base: SocketAddress, now: float) -> None:
        agent = connection.agent
        for present in agent.local_candidates:
            if present.base == base and agent.remove_local_candidate(present, now):
                self._new.get(connection.cid, {}).pop(present, None)
                self._invalidated.setdefault(connection.cid, {})[present] = None

    def _announce(self, connection: Connection) -> None:
        for candidate in connection.agent.local_candidates:
            self._new.setdefault(connection.cid, {})[candidate] = None

    def _open(
        self, batch: DatagramBatch, receiver: int, first: int, count: int, now: float, utc_now: float
    ) -> Received | None:
        """Decrypt `count` transport messages of one session, from datagram `first` on."""
        connection = self._directory.by_index(receiver)
        session = None if connection is None else connection.peer.receiving_session(receiver, now)
        if connection is None or session is None:
            self.counters.unknown_sessions += count
            return None
        buffer = batch.buffer
        opened = buffer.open(
            session.open_cipher, length=batch.length, segment_size=batch.segment_size, first=first, count=count
        )
        fresh = session.accept(opened.counters, opened.authentic)
        if b"\1" not in fresh.tobytes():
            return None
        unconfirmed = not session.confirmed
        payload_size = opened.size if count > 1 else opened.last_size
        connection.peer.received_data(session, payload_size, now)
        # Everything else that a batch changes can wait: only timers (see above) and counters.
        if unconfirmed or not payload_size or not connection.received(now):
            self._settle(connection, now, utc_now)
        if not payload_size:
            return None
        self._deadlines.no_later_than(connection, now + _TIMER_SLACK, "timers after receiving")
        packets = coalesce(
            buffer.view,
            offset=opened.offset,
            stride=opened.stride,
            size=opened.size,
            count=count,
            last_size=opened.last_size,
            arena=self._arena,
            keep=fresh,
        )
        if batch.ecn == CE:
            for packet in packets:
                mark_congestion(packet)
        return Received(connection.cid, packets)

    def _handle_mixed(self, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        """Take in datagrams that are not all messages of one session, each run of those together."""
        received: list[Received] = []
        count, size = batch.count, batch.segment_size
        first = 0
        while first < count:
            receiver = self._receiver(batch, first)
            after = first + 1
            if receiver is None:
                datagram = batch.buffer.view[first * size : min(after * size, batch.length)]
                self._handle_control(datagram, batch, now, utc_now)
            else:
                while after < count and self._receiver(batch, after) == receiver:
                    after += 1
                opened = self._open(batch, receiver, first, after - first, now, utc_now)
                if opened is not None:
                    received.append(opened)
            first = after
        return received

    @staticmethod
    def _receiver(batch: DatagramBatch, index: int) -> int | None:
        return batch.buffer.receiver(index, length=batch.length, segment_size=batch.segment_size)

    def _handle_control(self, datagram: memoryview, batch: DatagramBatch, now: float, utc_now: float) -> None:
        message = stun.parse(datagram)
        if message is not None:
            connection = self._directory.by_stun(message)
            if connection is None or not connection.handle_check(message, batch.source, batch.local, now):
                self.counters.unmatched_stun += 1
                return
        else:
            connection = self._handle_handshake(datagram, batch, now)
            if connection is None:
                return
        self._settle(connection, now, utc_now)

    def _handle_handshake(self, datagram: memoryview, batch: DatagramBatch, now: float) -> Connection | None:
        """Take in a handshake message; returns whose it was."""
        message = self._doorman.admit(datagram, batch.source, now)
        if message is None:
            self.counters.unrecognized += 1
            return None
        if isinstance(message, bytes):
            self._outbox.transmits.append(Transmit(batch.source, message, source=batch.local))
            return None
        if isinstance(message, HandshakeInitiation):
            connection = self._initiator(message)
        else:
            connection = self._directory.by_index(message.receiver_index)
        if connection is None:
            self.counters.unknown_peers += 1
            return None
        return connection if connection.handle_handshake(message, now) else None

    def _initiator(self, message: HandshakeInitiation) -> Connection | None:
        try:
            return self._directory.by_key(open_static(self._key, message))
        except ProtocolError:
            return None


def _take(waiting: dict[str, dict[Candidate, None]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    while waiting:
        cid = next(iter(waiting))
        candidates = waiting.pop(cid)
        yield cid, tuple(one.to_sdp() for one in sorted(candidates, key=_best_first))


def _best_first(candidate: Candidate) -> int:
    return -candidate.priority

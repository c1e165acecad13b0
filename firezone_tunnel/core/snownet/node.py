"""All connections of one side: candidates, demultiplexing, and what leaves as datagrams.

See docs/protocol/data-plane.md, 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from firezone_tunnel.core.datagrams import BufferPool, DatagramBatch
from firezone_tunnel.core.deadlines import Deadlines
from firezone_tunnel.core.ice.agent import MAX_REMOTE_ADDRESSES, Credentials
from firezone_tunnel.core.ice.candidate import Candidate, Identity, parse_sdp
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout, Transmit
from firezone_tunnel.core.snownet.connection import Connection, State
from firezone_tunnel.core.snownet.directory import Directory
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    InvalidatedCandidates,
    LayerCounters,
    NewCandidates,
    NodeCounters,
    NodeEvent,
    Outbox,
    Role,
    Terms,
)
from firezone_tunnel.core.snownet.inbound import TIMER_SLACK, Inbound, Received
from firezone_tunnel.core.snownet.relays import RelayAllocated, Relays, RelayTerms
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.events import CandidateFound, CandidateLost
from firezone_tunnel.core.wireguard.cookie import CookieChecker
from firezone_tunnel.core.wireguard.handshake import HandshakeInitiation, StaticKey, open_static
from firezone_tunnel.core.wireguard.seal import SealBuffer
from firezone_tunnel.errors import ProtocolError


class Node:
    """Connections to the peers that the portal introduces. The caller sends and receives the datagrams.

    After each `handle_*` and after `encapsulate`, which is followed by `flush` before the packets' memory is reused,
    drain `transmits` and `events`.
    """

    def __init__(self, *, role: Role, entropy: Entropy, now: float, pool: BufferPool[SealBuffer]) -> None:
        self._role = role
        self._entropy = entropy
        self._pool = pool
        self._outbox = Outbox()
        self.deadlines: Deadlines[object] = Deadlines()
        """Of connections and allocations. The owner of the node may add keys of its own."""
        self._addresses: tuple[SocketAddress, ...] = ()
        self._begin()

    @property
    def public_key(self) -> bytes:
        """The WireGuard key that the portal passes on to our peers. Each `reset` makes a new one."""
        return self._key.public

    @property
    def counters(self) -> NodeCounters:
        return self._outbox.counters

    @property
    def layers(self) -> LayerCounters:
        """Counters of the protocols below, which include closed connections."""
        return self._outbox.layers

    def has_connection(self, peer_id: str) -> bool:
        return peer_id in self._connections

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
            self.deadlines.no_later_than(connection, now, "other local addresses")
        self._relays.leave(gone, now)
        self._follow_relays(now)

    def update_relays(self, gone: Iterable[str], connected: Iterable[RelayTerms], now: float) -> None:
        """Use other relays: some are gone, these are there (docs/protocol/data-plane.md, 2.10)."""
        self._relays.update(gone, connected, now)
        self._follow_relays(now)

    def restart_relays(self, now: float) -> None:
        """The sockets are others now: what the relays granted to the old ones is of no use."""
        self._relays.restart(now)
        self._follow_relays(now)

    def upsert_connection(
        self,
        peer_id: str,
        *,
        remote_public_key: bytes,
        preshared_key: bytes,
        local: Credentials,
        remote: Credentials,
        now: float,
        utc_now: float,
    ) -> bool:
        """Connect to a peer. A connection on the very same terms is kept, one on others is replaced.

        See docs/protocol/data-plane.md, 2.2.

        Returns whether it was kept.

        Raises: ProtocolError if the public key is worthless.
        """
        terms = Terms(remote_public_key, preshared_key, local, remote)
        connection = self._connections.get(peer_id)
        is_kept = connection is not None and connection.terms == terms
        if connection is not None and is_kept:
            connection.renew(now, utc_now)
            self._announce(connection)
        else:
            connection = self._connect(peer_id, terms, now)
        self._settle(connection, now, utc_now)
        return is_kept

    def close_connection(self, peer_id: str, now: float, *, farewell: bytes = b"") -> None:
        """Close a connection. `farewell` is a last packet for the peer, sent if there is a path and a session."""
        connection = self._connections.get(peer_id)
        if connection is not None:
            self._drop(connection, now, farewell)
            self._outbox.events.append(ConnectionClosed(peer_id))

    def add_remote_candidate(self, peer_id: str, sdp: str, now: float) -> None:
        """The portal delivered a candidate of a peer. It is dropped if it is unusable or the connection is unknown."""
        connection = self._connections.get(peer_id)
        if connection is None:
            self.counters.candidates_without_connection += 1
            return
        candidate = parse_sdp(sdp)
        if candidate is None or not connection.add_remote_candidate(candidate, now):
            self.counters.candidates_rejected += 1
            return
        self.deadlines.no_later_than(connection, now, "another remote candidate")

    def remove_remote_candidate(self, peer_id: str, sdp: str, now: float) -> None:
        """A peer invalidated a candidate. An unknown candidate is ignored."""
        connection = self._connections.get(peer_id)
        candidate = parse_sdp(sdp)
        if connection is not None and candidate is not None:
            connection.agent.remove_remote_candidate(candidate, now)
            self.deadlines.no_later_than(connection, now, "one remote candidate less")

    def announce(self) -> None:
        """Signal all candidates to every peer again, the withdrawn ones too: the portal may have lost messages."""
        for connection in self._connections.values():
            self._announce(connection)
            if withdrawn := self._withdrawn.get(connection.peer_id):
                self._invalidated.setdefault(connection.peer_id, {}).update(dict.fromkeys(withdrawn.values()))

    def probe(self, now: float, utc_now: float) -> None:
        """Time has passed unnoticed: ask every relay and every peer at once whether it still knows us."""
        self._relays.probe(now)
        self._follow_relays(now)
        for connection in list(self._connections.values()):
            connection.probe(now, utc_now)
            self._settle(connection, now, utc_now)

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[Received]:
        """Handle a batch. Returns the packets in it, by connection."""
        received = self._inbound.handle(batch, now, utc_now)
        if self._relays.has_news:
            self._follow_relays(now)
        return received

    def encapsulate(self, peer_id: str, packet: SuperPacket, now: float, utc_now: float) -> None:
        """Send a packet, at the latest on `flush`. Before there is a path, a client keeps it and a gateway drops it."""
        connection = self._connections.get(peer_id)
        if connection is None:
            self.counters.packets_without_connection += packet.segments
            return
        self._unflushed[connection] = None  # a packet that wakes a connection is gathered like any other
        if connection.encapsulate(packet, now):
            self.deadlines.no_later_than(connection, now + TIMER_SLACK, "timers after sending")
        else:
            self._settle(connection, now, utc_now)

    def flush(self, now: float) -> None:
        """The turn ends: send the lone packets that were gathered in it."""
        if self._unflushed:
            for connection in self._unflushed:
                connection.flush(now)
            self._unflushed.clear()

    def transmits(self) -> Iterator[Transmit]:
        if self._relays.has_news:  # first: what goes through a relay may need the channel that is asked for here
            yield from self._relays.transmits()
        transmits = self._outbox.transmits
        while transmits:
            yield transmits.popleft()

    @property
    def has_events(self) -> bool:
        """Whether `events` has any: there are none after most batches."""
        return bool(self._outbox.events or self._new or self._invalidated)

    def events(self) -> Iterator[NodeEvent]:
        """Events in order. The candidates for each peer come in one event, the best first."""
        events = self._outbox.events
        while events:
            yield events.popleft()
        for peer_id, gone in _take(self._invalidated):
            yield InvalidatedCandidates(peer_id, gone)
        for peer_id, new in _take(self._new):
            yield NewCandidates(peer_id, new)

    def next_timeout(self) -> Timeout | None:
        """Drain `transmits` first: a call to a relay may set a deadline there."""
        return self.deadlines.first()

    def handle_timeout(self, now: float, utc_now: float) -> list[object]:
        """Handle every deadline that is due. Returns the keys, the owner's own among them."""
        due = self.deadlines.due(now)
        for key in due:
            if isinstance(key, Allocation):
                self._relays.handle_timeout(key, now)
        self._follow_relays(now)
        for key in due:
            if isinstance(key, Connection):
                key.handle_timeout(now, utc_now)
                self._settle(key, now, utc_now)
        return due

    def reset(self, now: float, *, farewell: bytes = b"") -> None:
        """Start again with a new key after the network has changed. All connections are closed.

        Queued transmits are dropped, as they belong to the old sockets.
        """
        for transmit in self.transmits():
            transmit.release()
        for peer_id in list(self._connections):
            self.close_connection(peer_id, now, farewell=farewell)
        self._relays.abandon()
        self._key.wipe()
        self._begin()

    def close(self, now: float, *, farewell: bytes = b"") -> None:
        """Close all connections and delete the allocations on relays."""
        for peer_id in list(self._connections):
            self.close_connection(peer_id, now, farewell=farewell)
        self._outbox.transmits.extend(self._relays.close())
        self._follow_relays(now)

    def _begin(self) -> None:
        self._key = StaticKey.generate(self._entropy)
        self._cookie_checker = CookieChecker(self._key, self._entropy, self.layers.handshakes)
        self._directory = Directory(self._entropy)
        self._relays = Relays(self._entropy, self.layers.turn, self.deadlines)
        self._inbound = Inbound(
            self._directory,
            self._relays,
            self.deadlines,
            self.counters,
            handle_control=self._handle_control,
            settle=self._settle,
        )
        self._connections: dict[str, Connection] = {}
        self._unflushed: dict[Connection, None] = {}
        self._new: dict[str, dict[Candidate, None]] = {}
        self._invalidated: dict[str, dict[Candidate, None]] = {}
        self._withdrawn: dict[str, dict[Identity, Candidate]] = {}

    def _connect(self, peer_id: str, terms: Terms, now: float) -> Connection:
        connection = Connection(
            peer_id,
            self._role,
            terms,
            key=self._key,
            directory=self._directory,
            relays=self._relays,
            pool=self._pool,
            outbox=self._outbox,
            entropy=self._entropy,
            now=now,
        )
        previous = self._connections.get(peer_id)
        if previous is not None:
            self._drop(previous, now)
        self._connections[peer_id] = connection
        self._directory.add(connection)
        for candidate in (*map(Candidate.host, self._addresses), *self._relays.candidates()):
            self._offer(connection, candidate, now)
        return connection

    def _drop(self, connection: Connection, now: float, farewell: bytes = b"") -> None:
        del self._connections[connection.peer_id]
        self._directory.remove(connection)
        self.deadlines.set(connection, None)
        self._unflushed.pop(connection, None)
        self._new.pop(connection.peer_id, None)
        self._invalidated.pop(connection.peer_id, None)
        self._withdrawn.pop(connection.peer_id, None)
        connection.close(now, farewell)

    def _settle(self, connection: Connection, now: float, utc_now: float) -> None:
        if connection.state is not State.FAILED:
            connection.settle(now, utc_now)
        if connection.state is State.FAILED:
            self._drop(connection, now)
        else:
            self.deadlines.set(connection, connection.next_timeout())

    def _offer(self, connection: Connection, candidate: Candidate, now: float) -> None:
        added = connection.agent.add_local_candidate(candidate, now)
        if added is not None:
            self._new.setdefault(connection.peer_id, {})[added] = None
            self._withdrawn.get(connection.peer_id, {}).pop(added.identity, None)

    def _invalidate(self, connection: Connection, base: SocketAddress, now: float) -> None:
        """A local address is gone: withdraw every candidate based on it."""
        for present in connection.agent.local_candidates:
            if present.base == base:
                self._withdraw(connection, present, now)

    def _withdraw(self, connection: Connection, candidate: Candidate, now: float) -> None:
        for present in connection.agent.local_candidates:
            if present.identity == candidate.identity and present.base == candidate.base:
                connection.agent.remove_local_candidate(present, now)
                self._new.get(connection.peer_id, {}).pop(present, None)
                self._invalidated.setdefault(connection.peer_id, {})[present] = None
                withdrawn = self._withdrawn.setdefault(connection.peer_id, {})
                withdrawn[present.identity] = present
                if len(withdrawn) > MAX_REMOTE_ADDRESSES:  # the other side remembers no more
                    del withdrawn[next(iter(withdrawn))]

    def _follow_relays(self, now: float) -> None:
        """Pass on to the connections which candidates the relays gave and withdrew."""
        for event in self._relays.events():
            match event:
                case CandidateFound(candidate):
                    for connection in self._connections.values():
                        self._offer(connection, candidate, now)
                        self.deadlines.no_later_than(connection, now, "another candidate")
                case CandidateLost(candidate):
                    if candidate.address in self._addresses or candidate in self._relays.candidates():
                        continue  # it is still one of our own addresses, or what another relay sees
                    for connection in self._connections.values():
                        self._withdraw(connection, candidate, now)
                        self.deadlines.no_later_than(connection, now, "one candidate less")
                case RelayAllocated():
                    for connection in self._connections.values():
                        connection.relay_allocated(now)
                    self._outbox.events.append(event)
                case _:
                    self._outbox.events.append(event)

    def _announce(self, connection: Connection) -> None:
        for candidate in connection.agent.local_candidates:
            self._new.setdefault(connection.peer_id, {})[candidate] = None

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
        message = self._cookie_checker.admit(datagram, batch.source, now)
        if message is None:
            self.counters.unrecognized += 1
            return None
        if isinstance(message, bytes):
            reply = self._relays.wrap(Transmit(batch.source, message, source=batch.local), now)
            if reply is not None:
                self._outbox.transmits.append(reply)
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
        peer_id = next(iter(waiting))
        candidates = waiting.pop(peer_id)
        if candidates:
            yield peer_id, tuple(one.to_sdp() for one in sorted(candidates, key=attrgetter("priority"), reverse=True))

"""One peer: ICE finds the path, WireGuard has the keys (spec/data-plane.md, 2.2 to 2.9)."""

from __future__ import annotations

import enum
from collections import deque

from firezone_tunnel.ice.agent import Agent, AgentState, Nominated
from firezone_tunnel.ice.candidate import Candidate
from firezone_tunnel.packet.superpacket import SuperPacket
from firezone_tunnel.sansio import Entropy, SocketAddress, Timeout, Transmit, earliest
from firezone_tunnel.snownet.directory import Directory
from firezone_tunnel.snownet.events import (
    ConnectionEstablished,
    ConnectionFailed,
    Outbox,
    PathChanged,
    Role,
    Terms,
)
from firezone_tunnel.snownet.paths import Path, RelayedPath, direct_path
from firezone_tunnel.snownet.relays import Relays
from firezone_tunnel.stun.message import Message
from firezone_tunnel.wireguard.handshake import CookieReply, HandshakeInitiation, HandshakeResponse, StaticKey
from firezone_tunnel.wireguard.peer import Expired, Peer
from firezone_tunnel.wireguard.seal import SlotPool, plan, seal_message, send_limit
from firezone_tunnel.wireguard.session import Session

NO_CANDIDATES_TIMEOUT = 10.0  # spec/data-plane.md, 0.3, this one and the next two
DISCONNECT_GRACE = 2.0
IDLE_AFTER = 20.0
PROACTIVE_HANDSHAKE_INTERVAL = 20.0  # spec/data-plane.md, 2.9
MAX_WAITING = 128  # spec/data-plane.md, 2.3
_MIN_POOLED = 4  # fewer lone packets are sealed faster into memory of their own
_RESERVED_SLOTS = 4  # which a turn of super-packets may need


class State(enum.Enum):
    """Where a connection is. See `_NEXT` for what may follow."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    IDLE = "idle"
    FAILED = "failed"


_NEXT = {
    State.CONNECTING: (State.CONNECTED, State.FAILED),
    State.CONNECTED: (State.IDLE, State.FAILED),
    State.IDLE: (State.CONNECTED, State.FAILED),
    State.FAILED: (),
}


class Connection:
    """What goes out is put into the node's outbox.

    Whatever is done to a connection but sending and receiving packets takes effect in `settle`, which whoever did
    it calls afterwards. A connection that has failed is to be closed.

    Raises: ProtocolError from the constructor if the other side's public key is worthless.
    """

    def __init__(
        self,
        cid: str,
        role: Role,
        terms: Terms,
        *,
        key: StaticKey,
        directory: Directory,
        relays: Relays,
        slots: SlotPool,
        outbox: Outbox,
        entropy: Entropy,
        now: float,
    ) -> None:
        self.cid = cid
        self.terms = terms
        self.state = State.CONNECTING
        self.path: Path | None = None
        self.peer = Peer(
            local=key,
            remote_public_key=terms.remote_public_key,
            preshared_key=terms.preshared_key,
            allocate_index=lambda _peer: directory.allocate_index(self),
            release_index=directory.release_index,
            entropy=entropy,
            now=now,
            counters=outbox.layers.wireguard,
        )
        self.agent = Agent(
            controlling=role is Role.CLIENT,
            local=terms.local,
            remote=terms.remote,
            entropy=entropy,
            now=now,
            counters=outbox.layers.ice,
        )
        self._is_client = role is Role.CLIENT
        self._relays = relays
        self._slots = slots
        self._outbox = outbox
        self._created_at = now
        self._last_activity = now
        self._disconnected_at: float | None = None
        self._has_had_session = False
        self._announced = False
        self._waiting: deque[SuperPacket] = deque(maxlen=MAX_WAITING)
        self._lone: list[SuperPacket] = []  # of one length and ECN, to leave together
        self._lone_limit = 0

    def encapsulate(self, packet: SuperPacket, now: float, *, alone: bool = False) -> bool:
        """Send a packet, or keep it until that is possible. False: `settle` has something to do.

        `alone`: no other follows in this turn, so there is nothing to gather it with.
        """
        path = self.path
        # A gateway never makes the first handshake: it waits for the client's (2.8).
        if path is None or not (self._is_client or self._has_had_session):
            self._hold(packet)
            return True
        awoken = self._note_activity(now)
        session = self.peer.sending_session(now)
        if session is None or self._waiting:
            self._hold(packet)
            return False
        if packet.segment_size:
            if self._lone:
                self.flush(now)
            self._send_run(packet, session, path, now)
        elif alone:
            self._send_single(packet, session, path, now)
        else:
            self._gather(packet, path, now)
        return not awoken

    def flush(self, now: float) -> None:
        """Send what `encapsulate` has gathered: the packets of a turn are valid no longer than that."""
        packets = self._lone
        if not packets:
            return
        self._lone = []
        session = self.peer.sending_session(now)
        if session is None or self.path is None:
            for packet in packets:
                self._hold(packet)
            return
        self._send_lone(packets, session, self.path, now)

    def received(self, now: float) -> bool:
        """Packets came in. False: `settle` has something to do."""
        return not self._note_activity(now)

    def renew(self, now: float, utc_now: float) -> None:
        """The portal names the same terms again: the other side may have lost what it knew (2.2 and 2.9)."""
        self._note_activity(now)
        if self.path is not None:
            self._handshake(now, utc_now)

    def handle_check(self, message: Message, source: SocketAddress, destination: SocketAddress, now: float) -> bool:
        """A STUN message that names this connection. False: it is not authentic."""
        return self.agent.handle_message(message, source=source, destination=destination, now=now)

    def handle_handshake(self, message: HandshakeInitiation | HandshakeResponse | CookieReply, now: float) -> bool:
        """A WireGuard message that names this connection. False: it is not authentic."""
        match message:
            case HandshakeInitiation():
                return self.peer.handle_initiation(message, now)
            case HandshakeResponse():
                return self.peer.handle_response(message, now)
            case _:
                return self.peer.handle_cookie_reply(message, now)

    def add_remote_candidate(self, candidate: Candidate, now: float) -> bool:
        """False: the agent can't use it."""
        if not self.agent.add_remote_candidate(candidate, now):
            return False
        self._relays.bind_channels(candidate, now)
        return True

    def relay_allocated(self, now: float) -> None:
        """A relay gave us an address: let it forward what comes from the other side."""
        for candidate in self.agent.remote_candidates:
            self._relays.bind_channels(candidate, now)

    def settle(self, now: float, utc_now: float) -> None:
        """Let ICE and WireGuard act on what has happened, and put into the outbox what they have to say."""
        self._follow_agent(now, utc_now)
        due = self.peer.next_timeout()
        if due is not None and due.at <= now:  # an initiation that a packet asked for is only scheduled
            self.peer.handle_timeout(now, utc_now)
        for event in self.peer.events():
            if isinstance(event, Expired):
                self._fail(event.reason)
                return
            self._has_had_session = True
        path = self.path
        if path is None:
            return  # a response to the other side's handshake waits until there is one
        for datagram in self.peer.transmits():
            self._send(path.send((datagram,), now=now), path)
        if self._has_had_session and not self._announced:
            self._announced = True
            event_ = ConnectionEstablished(self.cid, path.name, path.source, path.destination)
            self._outbox.events.append(event_)
        if self._waiting:
            self._send_waiting(now)

    def next_timeout(self) -> Timeout | None:
        own = (self._failure_timeout(), self._idle_timeout())
        return earliest((self.agent.next_timeout(), self.peer.next_timeout(), *own))

    def handle_timeout(self, now: float, utc_now: float) -> None:
        """Do what is due. Calls `settle`."""
        self.agent.handle_timeout(now)
        self.peer.handle_timeout(now, utc_now)
        self._follow_agent(now, utc_now)
        failure = self._failure_timeout()
        if failure is not None and failure.at <= now:
            self._fail(failure.reason)
            return
        idle = self._idle_timeout()
        if idle is not None and idle.at <= now:
            self._become(State.IDLE)
            self.agent.set_idle(True, now)
        self.settle(now, utc_now)

    def close(self, now: float, farewell: bytes = b"") -> None:
        """Release everything. `farewell` is a last packet for the other side, if there is a way to it."""
        session = self.peer.sending_session(now) if farewell and self.path is not None else None
        if session is not None and self.path is not None:
            sealed = seal_message(session.seal_cipher, session.peer_index, session.take_counters(1), farewell)
            transmit = self.path.send((sealed,), now=now)
            if transmit is not None:
                transmit.source = None  # on the way out of a network, that address may be gone already
                self._outbox.transmits.append(transmit)
        self._lone.clear()
        self._waiting.clear()
        self.peer.close()

    def __repr__(self) -> str:
        return f"<Connection {self.cid} {self.state.value} via {self.path}>"

    def _become(self, state: State) -> None:
        assert state in _NEXT[self.state], f"{self.state} can't become {state}"
        self.state = state

    def _fail(self, reason: str) -> None:
        self._become(State.FAILED)
        self._outbox.events.append(ConnectionFailed(self.cid, reason))

    def _note_activity(self, now: float) -> bool:
        """Returns whether this woke the connection."""
        self._last_activity = now
        if self.state is not State.IDLE:
            return False
        self._become(State.CONNECTED)
        self.agent.set_idle(False, now)
        return True

    def _follow_agent(self, now: float, utc_now: float) -> None:
        agent = self.agent
        for event in agent.events():
            if isinstance(event, Nominated):
                self._use(self._path(event), now, utc_now)
            elif event.state is AgentState.DISCONNECTED:
                self._disconnected_at = now
                self._relays.verify(now)
            else:
                self._disconnected_at = None
        for check in agent.transmits():
            wrapped = self._relays.wrap(check, now)
            if wrapped is not None:
                self._outbox.transmits.append(wrapped)

    def _path(self, nominated: Nominated) -> Path:
        allocation = self._relays.at_relayed(nominated.source)
        if allocation is None:
            return direct_path(nominated)
        return RelayedPath(nominated.source, nominated.destination, allocation)

    def _send(self, transmit: Transmit | None, path: Path) -> None:
        if transmit is not None:
            self._outbox.transmits.append(transmit)
        if isinstance(path, RelayedPath) and path.allocation.has_transmits:
            self._relays.touch(path.allocation)

    def _use(self, path: Path, now: float, utc_now: float) -> None:
        """Move to a path. Nothing is lost on the way: sessions and packets that wait have nothing to do with paths."""
        if path == self.path:
            return
        self.path = path
        if self.state is State.CONNECTING:
            self._become(State.CONNECTED)
            self._last_activity = now
        if self._announced:
            self._outbox.events.append(PathChanged(self.cid, path.name, path.source, path.destination))
        self._handshake(now, utc_now)

    def _handshake(self, now: float, utc_now: float) -> None:
        """Synchronize both sides quickly (2.9). As long as there never was a session, each new path gets its chance."""
        if not self._is_client:
            return
        peer = self.peer
        recent = peer.is_handshaking or now < peer.last_initiated_at + PROACTIVE_HANDSHAKE_INTERVAL
        if not (self._has_had_session and recent):
            peer.initiate(now, utc_now)

    def _failure_timeout(self) -> Timeout | None:
        if self._disconnected_at is not None:
            return Timeout(self._disconnected_at + DISCONNECT_GRACE, "no path answers any longer")
        if self.state is State.CONNECTING and not self.agent.remote_candidates:
            return Timeout(self._created_at + NO_CANDIDATES_TIMEOUT, "no candidates of the other side")
        return None

    def _idle_timeout(self) -> Timeout | None:
        if self.state is State.CONNECTED and self.agent.state in _SETTLED:
            return Timeout(self._last_activity + IDLE_AFTER, "no traffic for a while")
        return None

    def _hold(self, packet: SuperPacket) -> None:
        counters = self._outbox.counters
        if not self._is_client:
            counters.packets_unconnected += packet.segments
            return
        if len(self._waiting) == MAX_WAITING:
            counters.packets_overwritten += 1
        self._waiting.append(packet.copy())

    def _send_waiting(self, now: float) -> None:
        if self.peer.sending_session(now) is None:
            return
        packets = list(self._waiting)
        self._waiting.clear()
        for packet in packets:
            self.encapsulate(packet, now)
        self.flush(now)

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
        self._lone_limit = send_limit(len(packet.data), path.headroom)

    def _send_run(self, packet: SuperPacket, session: Session, path: Path, now: float) -> None:
        headroom = path.headroom
        sent = 0
        for first, count in plan(packet, headroom):
            slot = self._slots.borrow()
            if slot is None:
                self._outbox.counters.packets_without_slot += count
                continue
            payload, size = slot.seal(
                session.seal_cipher,
                session.peer_index,
                session.take_counters(count),
                packet,
                first_segment=first,
                count=count,
                headroom=headroom,
            )
            self._send(path.send_run(payload, segment_size=size, ecn=packet.ecn, pooled=slot, now=now), path)
            sent += count
        if sent:
            self.peer.sent_data(session, sent, now)

    def _send_single(self, packet: SuperPacket, session: Session, path: Path, now: float) -> None:
        sealed = _sealed(packet, session, session.take_counters(1))
        self._send(path.send((sealed,), now=now, ecn=packet.ecn), path)
        self.peer.sent_data(session, 1, now)

    def _send_lone(self, packets: list[SuperPacket], session: Session, path: Path, now: float) -> None:
        count = len(packets)
        first = session.take_counters(count)
        slot = None
        if count >= _MIN_POOLED and self._slots.free > _RESERVED_SLOTS:
            slot = self._slots.borrow()
        ecn = packets[0].ecn
        if slot is not None:
            payload, size = slot.seal_lone(
                session.seal_cipher, session.peer_index, first, packets, headroom=path.headroom
            )
            self._send(path.send_run(payload, segment_size=size, ecn=ecn, pooled=slot, now=now), path)
        else:
            sealed = [_sealed(packet, session, first + index) for index, packet in enumerate(packets)]
            self._send(path.send(sealed, now=now, ecn=ecn), path)
        self.peer.sent_data(session, count, now)


_SETTLED = (AgentState.CONNECTED, AgentState.COMPLETED)


def _sealed(packet: SuperPacket, session: Session, counter: int) -> bytes:
    packet.complete()
    return seal_message(session.seal_cipher, session.peer_index, counter, bytes(packet.data))

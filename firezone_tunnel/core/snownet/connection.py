"""One peer: ICE finds the path, WireGuard has the keys (docs/protocol/data-plane.md, 2.2 to 2.9)."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from firezone_tunnel.core.datagrams import BufferPool
from firezone_tunnel.core.ice.agent import Agent, AgentState, Nominated
from firezone_tunnel.core.ice.candidate import Candidate
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout, earliest
from firezone_tunnel.core.snownet.directory import Directory
from firezone_tunnel.core.snownet.events import (
    ConnectionEstablished,
    ConnectionFailed,
    Outbox,
    PairNominated,
    PathChanged,
    Role,
    Terms,
)
from firezone_tunnel.core.snownet.outbound import Outbound
from firezone_tunnel.core.snownet.paths import Path, RelayedPath, direct_path
from firezone_tunnel.core.snownet.relays import Relays
from firezone_tunnel.core.stun.message import Message
from firezone_tunnel.core.wireguard.handshake import CookieReply, HandshakeInitiation, HandshakeResponse, StaticKey
from firezone_tunnel.core.wireguard.peer import Expired, Peer
from firezone_tunnel.core.wireguard.seal import SealBuffer
from firezone_tunnel.core.wireguard.transport_data import seal_message

NO_CANDIDATES_TIMEOUT = 10.0  # docs/protocol/data-plane.md, 0.3, this one and the next two
DISCONNECT_GRACE = 2.0
IDLE_AFTER = 20.0
PROACTIVE_HANDSHAKE_INTERVAL = 20.0  # docs/protocol/data-plane.md, 2.9


class State(enum.Enum):
    """The states of a connection."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    IDLE = "idle"
    FAILED = "failed"


TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    State.CONNECTING: (State.CONNECTED, State.FAILED),
    State.CONNECTED: (State.IDLE, State.FAILED),
    State.IDLE: (State.CONNECTED, State.FAILED),
    State.FAILED: (),
}


class Connection:
    """A connection puts its output into the node's outbox.

    After any call but those that send and receive packets, the caller calls `settle`, which lets ICE and WireGuard
    act. The caller closes a connection that has failed.

    Raises: ProtocolError from the constructor if the peer's public key is invalid.
    """

    def __init__(
        self,
        peer_id: str,
        role: Role,
        terms: Terms,
        *,
        key: StaticKey,
        directory: Directory,
        relays: Relays,
        pool: BufferPool[SealBuffer],
        outbox: Outbox,
        entropy: Entropy,
        now: float,
    ) -> None:
        self.peer_id = peer_id
        self.terms = terms
        self.state = State.CONNECTING
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
        self._outbox = outbox
        self._outbound = Outbound(self.peer, may_wait=self._is_client, relays=relays, pool=pool, outbox=outbox)
        self._created_at = now
        self._last_activity = now
        self._disconnected_at: float | None = None
        self._has_had_session = False
        self._announced = False

    @property
    def path(self) -> Path | None:
        """The way to the peer, None until ICE has found one."""
        return self._outbound.path

    def encapsulate(self, packet: SuperPacket, now: float) -> bool:
        """Send a packet, at the latest on `flush`, or keep it until that is possible.

        False: `settle` has something to do.
        """
        outbound = self._outbound
        # A gateway never makes the first handshake: it waits for the client's (docs/protocol/data-plane.md, 2.8).
        if outbound.path is None or not (self._is_client or self._has_had_session):
            outbound.hold(packet)
            return True
        is_awake = not self._note_activity(now)
        return outbound.send(packet, now) and is_awake

    def flush(self, now: float) -> None:
        """Send what `encapsulate` has gathered: the packets of a turn are valid no longer than that."""
        self._outbound.flush(now)

    def received(self, now: float) -> bool:
        """Packets came in. False: `settle` has something to do."""
        return not self._note_activity(now)

    def renew(self, now: float, utc_now: float) -> None:
        """The portal names the same terms again: the other side may have lost what it knew.

        See docs/protocol/data-plane.md, 2.2 and 2.9.
        """
        self._note_activity(now)
        if self.path is not None:
            self._handshake(now, utc_now)

    def probe(self, now: float, utc_now: float) -> None:
        """Time has passed unnoticed: check at once whether the other side is still there."""
        self.agent.probe(now)
        self.renew(now, utc_now)

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
            self._outbound.transmit(path.send((datagram,), now=now))
        if self._has_had_session and not self._announced:
            self._announced = True
            event_ = ConnectionEstablished(self.peer_id, path.name, path.source, path.destination)
            self._outbox.events.append(event_)
        if self._outbound.has_waiting:
            self._outbound.send_waiting(now)

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
        """Release everything. `farewell` is a last packet for the peer, sent if there is a path and a session."""
        path = self.path
        session = self.peer.sending_session(now) if farewell and path is not None else None
        if session is not None and path is not None:
            sealed = seal_message(session.seal_cipher, session.peer_index, session.take_counters(1), farewell)
            transmit = path.send((sealed,), now=now)
            if transmit is not None:
                transmit.source = None  # on the way out of a network, that address may be gone already
                self._outbox.transmits.append(transmit)
        self._outbound.clear()
        self.peer.close()

    def __repr__(self) -> str:
        return f"<Connection {self.peer_id} {self.state.value} via {self.path}>"

    def _become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} can't become {state}"
        self.state = state

    def _fail(self, reason: str) -> None:
        self._become(State.FAILED)
        self._outbox.events.append(ConnectionFailed(self.peer_id, reason))

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
                local, remote = event.local, event.remote
                pair = (local.kind.value, local.address, remote.kind.value, remote.address)
                self._outbox.events.append(PairNominated(self.peer_id, *pair))
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

    def _use(self, path: Path, now: float, utc_now: float) -> None:
        """Move to a path. Nothing is lost on the way: sessions and packets that wait have nothing to do with paths."""
        if path == self.path:
            return
        self._outbound.path = path
        if self.state is State.CONNECTING:
            self._become(State.CONNECTED)
            self._last_activity = now
        if self._announced:
            self._outbox.events.append(PathChanged(self.peer_id, path.name, path.source, path.destination))
        self._handshake(now, utc_now)

    def _handshake(self, now: float, utc_now: float) -> None:
        """Synchronize both sides quickly. As long as there never was a session, each new path gets its chance.

        See docs/protocol/data-plane.md, 2.9.
        """
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


_SETTLED = (AgentState.CONNECTED, AgentState.COMPLETED)

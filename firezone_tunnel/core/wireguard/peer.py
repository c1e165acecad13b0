"""One WireGuard peer: handshakes, sessions and every timer between them (whitepaper, sections 5 and 6).

Where the whitepaper and docs/protocol/data-plane.md, 2.8, differ, the latter holds: older sessions go on receiving
until they are 180 s old, an attempt ends 15 s after its first initiation, and an idle initiator renews its session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import attrs

from firezone_tunnel.core.sansio import Entropy, Timeout, earliest
from firezone_tunnel.core.wireguard.cookie import MacStamp
from firezone_tunnel.core.wireguard.handshake import (
    CookieReply,
    HandshakeInitiation,
    HandshakeResponse,
    PendingHandshake,
    StaticKey,
    TransportKeys,
    initiate,
    open_initiation,
    wipe,
)
from firezone_tunnel.core.wireguard.session import REJECT_AFTER_TIME, PeerCounters, Session
from firezone_tunnel.core.wireguard.transport_data import seal_message
from firezone_tunnel.errors import ProtocolError

REKEY_TIMEOUT = 5.0  # whitepaper, section 6.1
KEEPALIVE_TIMEOUT = 10.0  # whitepaper, section 6.1
NO_REPLY_TIMEOUT = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT  # whitepaper, section 6.5
REKEY_ON_RECEIVE_AFTER = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT  # whitepaper, section 6.2
REKEY_ATTEMPT_TIME = 15.0  # docs/protocol/data-plane.md, 0.3 and 2.8, as are the next two
NO_SESSION_TIMEOUT = 3 * REJECT_AFTER_TIME
MAX_JITTER = 0.333
FORCED_INTERVAL = 1.0  # longer than any round trip worth waiting for
MAX_SESSIONS = 8  # docs/protocol/data-plane.md, 2.8
_MAX_QUEUED = 16  # messages and events that were not drained; the oldest are dropped


@attrs.frozen
class SessionEstablished:
    """From now on `sending_session` gives this session: the other side has shown that it holds its keys."""

    receiver_index: int
    initiator: bool


@attrs.frozen
class Expired:
    """The peer doesn't answer; all keys are gone. It can be used again, but begins from nothing."""

    reason: str


class Peer:
    """Sans-IO: fed by `handle_*`, `sent_data` and `received_data`; drained by `transmits` and `events`.

    Initiations that a timer or a packet asks for are only scheduled, since they need the wall clock: `next_timeout`
    is then due at once and `handle_timeout` makes the message.

    Raises: ProtocolError from the constructor if the remote public key is invalid.
    """

    def __init__(
        self,
        *,
        local: StaticKey,
        remote_public_key: bytes,
        preshared_key: bytes,
        allocate_index: Callable[[Peer], int],
        release_index: Callable[[int], None],
        entropy: Entropy,
        now: float,
        rekey_attempt_time: float = REKEY_ATTEMPT_TIME,
        counters: PeerCounters | None = None,
    ) -> None:
        """Peers may share `counters`; without any it has its own."""
        self.remote_public_key = remote_public_key
        self.counters = counters or PeerCounters()
        self.last_initiated_at = float("-inf")
        self._local = local
        self._preshared_key = bytearray(preshared_key)
        self._static_secret = bytearray(local.exchange(remote_public_key))
        self._stamp = MacStamp(remote_public_key)
        self._allocate_index = allocate_index
        self._release_index = release_index
        self._entropy = entropy
        self._rekey_attempt_time = rekey_attempt_time
        self._newest_timestamp = b""
        self._serial = 0
        self._sessions: dict[int, Session] = {}  # by our index, oldest first
        self._current: Session | None = None
        self._scheduled: Timeout | None = None  # an initiation to come, while no attempt runs
        self._attempt: _Attempt | None = None
        self._keepalive_at: float | None = None
        self._reply_due_at: float | None = None
        self._forsaken_at: float | None = now + NO_SESSION_TIMEOUT
        self._closed = False
        self._outgoing: deque[bytes] = deque(maxlen=_MAX_QUEUED)
        self._events: deque[SessionEstablished | Expired] = deque(maxlen=_MAX_QUEUED)

    @property
    def is_handshaking(self) -> bool:
        """Whether an initiation of ours awaits its response."""
        return self._attempt is not None

    def initiate(self, now: float, utc_now: float) -> None:
        """Begin a handshake at once, in place of one that runs: that may have been lost on a path we left.

        Ignored within a second of the last initiation, whose response may be on its way.
        """
        if not self._closed and now >= self.last_initiated_at + FORCED_INTERVAL:
            self._abandon_attempt()
            self._send_initiation(now, utc_now, ends_at=now + self._rekey_attempt_time)

    def handle_initiation(self, message: HandshakeInitiation, now: float) -> bool:
        """Answer an initiation that a `CookieChecker` admitted. False: forged, replayed or not from this peer.

        The session exists afterwards, but is used for sending only once data arrives on it.
        """
        if self._closed:
            return False
        try:
            opened = open_initiation(self._local, self.remote_public_key, self._static_secret, message)
        except ProtocolError:
            self.counters.initiations_rejected += 1
            return False
        if opened.timestamp <= self._newest_timestamp:
            opened.wipe()
            self.counters.initiations_replayed += 1
            return False
        index = self._allocate_index(self)
        body, keys = opened.respond(preshared_key=self._preshared_key, sender_index=index, entropy=self._entropy)
        self._newest_timestamp = opened.timestamp
        self._add_session(keys, receiver_index=index, peer_index=message.sender_index, initiator=False, now=now)
        self._outgoing.append(self._stamp.finish(body, now))
        self.counters.responses_sent += 1
        self._reply_due_at = None
        return True

    def handle_response(self, message: HandshakeResponse, now: float) -> bool:
        """Complete our handshake and confirm it with a keepalive. False: forged, late, or from another handshake."""
        attempt = self._attempt
        if attempt is None or message.receiver_index != attempt.pending.sender_index:
            self.counters.responses_rejected += 1
            return False
        try:
            keys = attempt.pending.complete(self._local, self._preshared_key, message)
        except ProtocolError:
            self.counters.responses_rejected += 1
            return False
        attempt.pending.wipe()
        self._attempt = None  # its index lives on in the session
        session = self._add_session(
            keys,
            receiver_index=message.receiver_index,
            peer_index=message.sender_index,
            initiator=True,
            now=now,
        )
        self._use(session)
        self._send_keepalive(session)
        self._reply_due_at = None
        return True

    def handle_cookie_reply(self, message: CookieReply, now: float) -> bool:
        """Keep the cookie for the retransmission, which comes when it is due and no sooner. False: forged."""
        if self._stamp.handle_cookie_reply(message, now):
            return True
        self.counters.cookie_replies_rejected += 1
        return False

    def sending_session(self, now: float) -> Session | None:
        """The session to seal with; None if none is usable, and then a handshake is scheduled."""
        session = self._current
        if session is not None and session.may_send(now):
            return session
        # A responder's newest session is usually confirmed within a round trip: no need for a handshake of our own.
        newest = next(reversed(self._sessions.values()), None)
        awaited = newest is not None and not newest.confirmed
        at = newest.created_at + REKEY_TIMEOUT if newest is not None and awaited else now
        self._schedule(max(at, now), "handshake for data to send")
        return None

    def receiving_session(self, receiver_index: int, now: float) -> Session | None:
        """The session that a transport message names; None if it is unknown or too old."""
        session = self._sessions.get(receiver_index)
        return session if session is not None and session.may_receive(now) else None

    def sent_data(self, session: Session, count: int, now: float) -> None:
        """Note that a batch of `count` messages with packets in them went out; once for each batch."""
        self.counters.messages_sent += count
        self._keepalive_at = None
        if self._reply_due_at is None:
            self._reply_due_at = now + NO_REPLY_TIMEOUT
        if session is self._current and session.wants_rekey_after_sending(now):
            self._schedule_soon(now, "session to renew")

    def received_data(self, session: Session, payload_bytes: int, now: float) -> None:
        """Note that a batch brought messages that were authentic and new; `payload_bytes` is 0 for only keepalives."""
        if session.receiver_index not in self._sessions:
            return
        self._reply_due_at = None
        if not session.confirmed:
            session.confirmed = True
            if self._current is None or session.serial > self._current.serial:
                self._use(session)
        if self._attempt is not None:  # a peer that sends data is alive, even if the handshake fails
            self._attempt = attrs.evolve(self._attempt, ends_at=now + self._rekey_attempt_time)
        if payload_bytes and self._keepalive_at is None:
            self._keepalive_at = now + KEEPALIVE_TIMEOUT
        if session is self._current and session.initiator and now >= session.created_at + REKEY_ON_RECEIVE_AFTER:
            self._schedule_soon(now, "session to renew")

    def transmits(self) -> Iterator[bytes]:
        """Drain the handshake messages and keepalives that are to go to the peer, in order."""
        while self._outgoing:
            yield self._outgoing.popleft()

    def events(self) -> Iterator[SessionEstablished | Expired]:
        while self._events:
            yield self._events.popleft()

    def next_timeout(self) -> Timeout | None:
        oldest = next((session.created_at for session in self._sessions.values()), None)
        return earliest(
            (
                self._scheduled,
                None if self._attempt is None else self._attempt.next_timeout,
                _timeout(self._keepalive_at, "passive keepalive"),
                _timeout(self._reply_due_at, "no reply to data"),
                None if oldest is None else Timeout(oldest + REJECT_AFTER_TIME, "session too old"),
                _timeout(self._forsaken_at, "no new session"),
            )
        )

    def handle_timeout(self, now: float, utc_now: float) -> None:
        """Do what is due. However late the call, each thing is done once: nothing is made up for."""
        if self._forsaken_at is not None and now >= self._forsaken_at:
            self._expire("no session for 540 s")
            return
        self._drop_old_sessions(now)
        if self._keepalive_at is not None and now >= self._keepalive_at:
            self._keepalive_at = None
            if self._current is not None and self._current.may_send(now):
                self._send_keepalive(self._current)
        if self._reply_due_at is not None and now >= self._reply_due_at:
            self._reply_due_at = None
            self._schedule_soon(now, "handshake after no reply")
        if self._attempt is not None:
            self._continue_attempt(self._attempt, now, utc_now)
        elif self._scheduled is not None and now >= self._scheduled.at:
            self._send_initiation(now, utc_now, ends_at=now + self._rekey_attempt_time)

    def close(self) -> None:
        """Wipe all secrets and release all indices. A closed peer stays silent."""
        self._closed = True
        self._forget_all()
        self._stamp.wipe()
        wipe(self._preshared_key)
        wipe(self._static_secret)

    def __repr__(self) -> str:
        return f"<Peer {self.remote_public_key.hex()[:16]} with {len(self._sessions)} sessions>"

    def _add_session(
        self, keys: TransportKeys, *, receiver_index: int, peer_index: int, initiator: bool, now: float
    ) -> Session:
        if len(self._sessions) >= MAX_SESSIONS:
            self._drop(next(session for session in self._sessions.values() if session is not self._current))
        self._serial += 1
        session = Session(
            keys,
            receiver_index=receiver_index,
            peer_index=peer_index,
            initiator=initiator,
            serial=self._serial,
            counters=self.counters,
            now=now,
        )
        self._sessions[receiver_index] = session
        return session

    def _use(self, session: Session) -> None:
        """Send with this session from now on. It also settles whatever handshake we were about to do ourselves."""
        self._current = session
        self._scheduled = None
        self._abandon_attempt()
        self._forsaken_at = session.created_at + NO_SESSION_TIMEOUT
        self.counters.sessions_established += 1
        self._events.append(SessionEstablished(session.receiver_index, session.initiator))

    def _send_keepalive(self, session: Session) -> None:
        self._keepalive_at = None
        self.counters.keepalives_sent += 1
        counter = session.take_counters(1)
        self._outgoing.append(seal_message(session.seal_cipher, session.peer_index, counter, b""))

    def _schedule_soon(self, now: float, reason: str) -> None:
        """Initiate after a jitter, so that both sides rarely do at once. Asking again doesn't draw it again."""
        if self._scheduled is None and self._attempt is None:
            self._schedule(now + self._jitter(), reason)

    def _schedule(self, at: float, reason: str) -> None:
        """Initiate at that time, or earlier if so agreed already; never within 5 s of the last initiation."""
        if self._attempt is not None or self._closed:
            return
        wanted = Timeout(max(at, self.last_initiated_at + REKEY_TIMEOUT), reason)
        self._scheduled = wanted if self._scheduled is None else min(self._scheduled, wanted)

    def _continue_attempt(self, attempt: _Attempt, now: float, utc_now: float) -> None:
        if now >= attempt.ends_at:
            self._expire(f"no answer to a handshake for {self._rekey_attempt_time:g} s")
        elif now >= attempt.retry_at:
            self._abandon_attempt()
            self._send_initiation(now, utc_now, ends_at=attempt.ends_at)

    def _send_initiation(self, now: float, utc_now: float, *, ends_at: float) -> None:
        body, pending = initiate(
            self._local,
            self.remote_public_key,
            self._static_secret,
            sender_index=self._allocate_index(self),
            timestamp=self._local.timestamp(utc_now),
            entropy=self._entropy,
        )
        self._scheduled = None
        self._attempt = _Attempt(pending, retry_at=now + REKEY_TIMEOUT + self._jitter(), ends_at=ends_at)
        self.last_initiated_at = now
        self.counters.initiations_sent += 1
        self._outgoing.append(self._stamp.finish(body, now))

    def _abandon_attempt(self) -> None:
        if self._attempt is not None:
            self._release_index(self._attempt.pending.sender_index)
            self._attempt.pending.wipe()
            self._attempt = None

    def _drop_old_sessions(self, now: float) -> None:
        for session in list(self._sessions.values()):
            if session.may_receive(now):
                return
            # Its initiator renews a session that dies of age even without traffic, so that an idle connection
            # stays ready and the other side's 540 s never pass.
            if session is self._current and session.initiator:
                self._schedule_soon(now, "idle session to renew")
            self._drop(session)

    def _drop(self, session: Session) -> None:
        if session is self._current:
            self._current = None
        del self._sessions[session.receiver_index]
        self._release_index(session.receiver_index)
        session.close()

    def _expire(self, reason: str) -> None:
        self._forget_all()
        self._events.append(Expired(reason))

    def _forget_all(self) -> None:
        self._abandon_attempt()
        for session in list(self._sessions.values()):
            self._drop(session)
        self._outgoing.clear()
        self._scheduled = None
        self._keepalive_at = self._reply_due_at = self._forsaken_at = None

    def _jitter(self) -> float:
        return int.from_bytes(self._entropy(2)) / 0xFFFF * MAX_JITTER


@attrs.frozen
class _Attempt:
    pending: PendingHandshake
    retry_at: float
    ends_at: float

    @property
    def next_timeout(self) -> Timeout:
        if self.retry_at < self.ends_at:
            return Timeout(self.retry_at, "initiation to repeat")
        return Timeout(self.ends_at, "handshake to give up")


def _timeout(at: float | None, reason: str) -> Timeout | None:
    return None if at is None else Timeout(at, reason)

"""The client's side of a Phoenix socket with one topic, over as many WebSockets as it takes.

    connect ─> DIALING ── opened ──> JOINING ── ok ──> JOINED
                  ^ │                 │   ^ └─ phx_error ─┘ │
       retry time │ └─ lost, 15 s ─┐  │ lost, 5 s           │ lost, phx_close, 4 heartbeats without an answer
                  └──────────── WAITING <───────────────────┘
    401, a refused join, an expired token, max_partition_time ─> FAILED             close ─> IDLE

The shell opens a WebSocket on `Dial`, reports what happens to it, and drops it on `HangUp`. It never reports
anything about a WebSocket after its `HangUp`. The rules are upstream's of V2
(docs/protocol/portal-protocol.md, 1.4 to 1.9, column "Today"), without its limit of 15 s for the first join.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import msgspec

from firezone_tunnel.core.phoenix.codec import Form, Frame, MalformedFrame, Ref, decode, encode
from firezone_tunnel.core.sansio import Entropy, Timeout, earliest
from firezone_tunnel.errors import AuthenticationError, PortalError

DIAL_TIMEOUT = 15.0  # TCP, TLS and WebSocket together (docs/protocol/portal-protocol.md, 1.7)
JOIN_TIMEOUT = 5.0  # docs/protocol/portal-protocol.md, 1.7
HEARTBEAT_INTERVAL = 10.0  # whatever else is sent (docs/protocol/portal-protocol.md, 1.8)
PROBE_TIMEOUT = 1.5  # for the answer to a heartbeat after a pause; upstream doesn't ask
MAX_UNANSWERED = 3  # docs/protocol/portal-protocol.md, 1.8
QUEUE_CAPACITY = 128
STALLED_AFTER = 4.0  # the operator learns what an attempt waits for well before it is given up
STEADY_AFTER = 120.0
"""A join that lasts this long ends the backoff between joins. It is twice the longest delay: two devices with one
identity displace each other at most that often."""
REJOIN_INTERVAL = 5.0  # a channel that ends sooner than this after its join gets a new socket, with backoff

IDENTITY_SHARED = "identity_shared"  # of our portal (docs/decisions.md, 25)
_IDENTITY_CONFLICTS = frozenset({"gateway_already_connected", "device_identity_conflict"})

BACKOFF_INITIAL = 0.5  # docs/protocol/portal-protocol.md, 1.9
BACKOFF_MULTIPLIER = 1.5
BACKOFF_JITTER = 0.5
BACKOFF_MAX = 60.0
RETRY_AFTER_MAX = 3600.0  # a portal's error must not keep us away for longer


class ChannelState(enum.Enum):
    """The states of a channel to the portal."""

    IDLE = "idle"
    DIALING = "dialing"
    JOINING = "joining"
    JOINED = "joined"
    WAITING = "waiting"
    FAILED = "failed"


_ENDS = (ChannelState.WAITING, ChannelState.FAILED, ChannelState.DIALING, ChannelState.IDLE)
TRANSITIONS: Mapping[ChannelState, tuple[ChannelState, ...]] = {
    ChannelState.IDLE: (ChannelState.DIALING,),
    ChannelState.DIALING: (ChannelState.JOINING, *_ENDS),
    ChannelState.JOINING: (ChannelState.JOINED, *_ENDS),
    ChannelState.JOINED: (ChannelState.JOINING, *_ENDS),
    ChannelState.WAITING: (ChannelState.DIALING, ChannelState.IDLE),
    ChannelState.FAILED: (ChannelState.DIALING, ChannelState.IDLE),
}


@attrs.frozen
class UpgradeRefused:
    """The portal's answer to the upgrade, if it isn't 101."""

    status: int
    code: str | None = None  # of a problem+json body
    detail: str = ""  # one line for the operator
    retry_after: float | None = None  # seconds

    def __str__(self) -> str:
        code = f" ({self.code})" if self.code else ""
        return f"the portal answered HTTP {self.status}{code}" + (f": {self.detail}" if self.detail else "")


@attrs.frozen
class Dial:
    """Open a WebSocket; `attempt` counts from 1 since the last join or `connect`."""

    attempt: int


@attrs.frozen
class Stalled:
    """The WebSocket is not open after some seconds. The attempt goes on, and waits for `missing`."""

    missing: str


@attrs.frozen
class HangUp:
    """Drop the WebSocket without ceremony, or stop opening it."""

    reason: str


@attrs.frozen
class Joined:
    """Messages can be sent; the portal's first message follows. Also sent after a rejoin."""


@attrs.frozen
class PushReceived:
    """A message on the topic, its payload as decoded JSON."""

    event: str
    payload: Any


@attrs.frozen
class ChannelLost:
    """The portal's side of the channel is gone while the socket is open: it is being rejoined."""

    reason: str


@attrs.frozen
class IdentityShared:
    """The portal has refused another host that has this device's identity; this connection goes on."""


@attrs.frozen
class Lost:
    """The connection was lost or could not be made. The next attempt follows in `delay` seconds.

    `was_joined`: the channel was joined.

    `is_identity_shared`: another host with this device's identity is or was connected.
    """

    reason: str
    attempt: int
    delay: float
    was_joined: bool
    is_identity_shared: bool = False


@attrs.frozen
class Fatal:
    """The portal refused us for good: only another `connect` helps."""

    error: PortalError


Event = Dial | Stalled | HangUp | Joined | PushReceived | ChannelLost | IdentityShared | Lost | Fatal


@attrs.define
class ChannelCounters:
    """Counts since the start; `heartbeat_late_max` is the longest delay of a heartbeat, in seconds."""

    sent: int = 0
    received: int = 0
    heartbeats: int = 0
    heartbeat_late_max: float = 0.0
    refused_not_connected: int = 0
    refused_full: int = 0
    duplicates: int = 0
    malformed: int = 0
    unknown: int = 0
    errors: int = 0


class Channel:
    """Call `handle_*` with the WebSocket's events, and drain `events()` and `transmits()` after each call."""

    def __init__(
        self,
        *,
        topic: str,
        entropy: Entropy,
        join_payload: object = None,
        max_partition_time: float | None = None,
    ) -> None:
        """`max_partition_time` bounds the sum of the delays since the last join, in seconds; None: never give up."""
        self.counters = ChannelCounters()
        self._topic = topic
        self._join_payload = join_payload
        self._backoff = _Backoff(entropy, max_partition_time)  # of attempts that fail
        self._join_backoff = _Backoff(entropy, None)  # of joins that don't last
        self._state = ChannelState.IDLE
        self._attempt = 0
        self._deadline: float | None = None  # its meaning follows from the state
        self._stalled_at = 0.0
        self._missing = ""
        self._joined_at = float("-inf")
        self._link = _Link()
        self._queue: dict[tuple[str, bytes], None] = {}
        self._events: deque[Event] = deque()

    @property
    def state(self) -> ChannelState:
        return self._state

    def connect(self, now: float) -> None:
        """Dial at once, from whatever state, and forget the backoff."""
        if self._state in _ONLINE:
            self._events.append(HangUp("a new connection was requested"))
        self._backoff.reset()
        self._join_backoff.reset()
        self._attempt = 0
        self._dial(now)

    def probe(self, now: float) -> None:
        """Time has passed unnoticed: find out at once whether the portal is still there.

        Elsewhere than in JOINED there is a deadline already.
        """
        link = self._link
        if self._state is ChannelState.JOINED and link.probe is None:
            link.heartbeat_at = now
            self._beat(now)
            link.probe = _Probe(link.next_ref - 1, now + PROBE_TIMEOUT)

    def close(self) -> None:
        """End the connection. The shell closes the WebSocket, if any."""
        if self._state is not ChannelState.IDLE:
            self._enter(ChannelState.IDLE)

    def handle_progress(self, missing: str) -> None:
        """The WebSocket is not open yet, and waits for `missing` now."""
        self._missing = missing

    def handle_open(self, now: float) -> None:
        """The WebSocket is open: join."""
        if self._state is not ChannelState.DIALING:
            return
        self._link = _Link(heartbeat_at=now + HEARTBEAT_INTERVAL)
        self._join(now)

    def handle_text(self, text: bytes | str, now: float) -> None:
        """A text frame arrived. An unreadable frame is counted and dropped; a truncated one ends the connection."""
        if self._state not in _OPEN:
            return
        try:
            frame = decode(text, Form.OBJECT)
        except MalformedFrame as error:
            self.counters.malformed += 1
            if error.is_truncated:
                self._lose("the portal sent a truncated frame", now)
            return
        self.counters.received += 1
        if frame.event == "phx_reply":
            self._handle_reply(frame, now)
        elif frame.topic != self._topic:
            self.counters.unknown += 1
        else:
            self._link.is_heard = True
            self._handle_push(frame, now)

    def handle_lost(self, reason: str, now: float) -> None:
        """The WebSocket was lost, or could not be opened."""
        if self._state in _ONLINE:
            self._lose(reason, now)

    def handle_refused(self, refusal: UpgradeRefused, now: float) -> None:
        """The portal refused the upgrade. Only a 401 is final."""
        if self._state is not ChannelState.DIALING:
            return
        if refusal.status != 401:
            is_shared = refusal.code in _IDENTITY_CONFLICTS
            self._lose(str(refusal), now, retry_after=refusal.retry_after, is_identity_shared=is_shared)
            return
        discard = refusal.code in {"invalid_token", "missing_token"}
        self._fail(AuthenticationError(f"Cannot sign in: {refusal}", requires_sign_in=discard))

    def send(self, event: str, payload: object) -> bool:
        """Queue a message; msgspec encodes the payload.

        True: it will be sent if the connection lasts; a duplicate of a waiting message is not sent twice. False: there
        is no connection to wait for, or the queue is full. The queue does not outlive a connection.
        """
        if self._state not in _OPEN:
            self.counters.refused_not_connected += 1
            return False
        key = (event, msgspec.json.encode(payload))
        if key in self._queue:
            self.counters.duplicates += 1
            return True
        if len(self._queue) >= QUEUE_CAPACITY:
            self.counters.refused_full += 1
            return False
        self._queue[key] = None
        return True

    def transmits(self) -> Iterator[bytes]:
        """Text frames to send, in order. The caller may stop early: the rest stays queued."""
        while self._link.urgent:
            yield self._link.urgent.popleft()
        while self._queue and self._state is ChannelState.JOINED:
            event, payload = next(iter(self._queue))
            del self._queue[event, payload]
            self.counters.sent += 1
            yield self._encode(self._topic, event, msgspec.Raw(payload))

    def events(self) -> Iterator[Event]:
        """The events since the last call, in order."""
        while self._events:
            yield self._events.popleft()

    def next_timeout(self) -> Timeout | None:
        return earliest(
            [
                None if self._deadline is None else Timeout(self._deadline, self._state.value),
                Timeout(self._link.heartbeat_at, "heartbeat") if self._state in _OPEN else None,
                None if self._link.probe is None else Timeout(self._link.probe.deadline, "probe"),
                Timeout(self._stalled_at, "stalled") if self._state is ChannelState.DIALING else None,
            ]
        )

    def handle_timeout(self, now: float) -> None:
        if self._deadline is not None and now >= self._deadline:
            self._handle_deadline(now)
        if self._link.probe is not None and now >= self._link.probe.deadline:
            self._lose(f"no answer within {PROBE_TIMEOUT} s after a pause", now, retry_after=0.0)
        if self._state in _OPEN and now >= self._link.heartbeat_at:
            self._beat(now)
        if self._state is ChannelState.DIALING and now >= self._stalled_at:
            self._stalled_at = float("inf")
            self._events.append(Stalled(self._missing))

    def _handle_deadline(self, now: float) -> None:
        if self._state is ChannelState.WAITING:
            self._dial(now)
        elif self._state is ChannelState.DIALING:
            missing = f": {self._missing} is missing" if self._missing else ""
            self._lose(f"no connection within {DIAL_TIMEOUT:.0f} s{missing}", now)
        else:
            self._lose(f"no answer to the join within {JOIN_TIMEOUT:.0f} s", now)

    def _dial(self, now: float) -> None:
        self._enter(ChannelState.DIALING)
        self._attempt += 1
        self._deadline = now + DIAL_TIMEOUT
        self._stalled_at = now + STALLED_AFTER
        self._missing = ""
        self._events.append(Dial(self._attempt))

    def _join(self, now: float) -> None:
        self._enter(ChannelState.JOINING)
        self._deadline = now + JOIN_TIMEOUT
        self._link.join_ref = self._link.next_ref
        self._link.urgent.append(self._encode(self._topic, "phx_join", self._join_payload))

    def _beat(self, now: float) -> None:
        """Send the heartbeat that is due, keeping the cadence, and leave when too many are out."""
        link = self._link
        self.counters.heartbeat_late_max = max(self.counters.heartbeat_late_max, now - link.heartbeat_at)
        link.heartbeat_at += HEARTBEAT_INTERVAL * (1 + (now - link.heartbeat_at) // HEARTBEAT_INTERVAL)
        if link.is_heard:  # the portal is there: its answers may be behind thousands of other messages
            link.is_heard = False
            link.unanswered.clear()
        if len(link.unanswered) >= MAX_UNANSWERED:  # this one would be one too many
            self._lose("too many unanswered heartbeats", now)
            return
        self.counters.heartbeats += 1
        link.unanswered.append(link.next_ref)
        link.urgent.append(self._encode("phoenix", "heartbeat", {}))

    def _handle_reply(self, frame: Frame, now: float) -> None:
        link = self._link
        if frame.ref in link.unanswered:  # replies come in order: what was sent before it has been read, too
            del link.unanswered[: link.unanswered.index(frame.ref) + 1]
            if link.probe is not None and link.probe.ref not in link.unanswered:
                link.probe = None
            return
        status, reason = _read_reply(frame.payload)
        if self._state is ChannelState.JOINING and frame.ref == link.join_ref and frame.topic == self._topic:
            self._handle_join_reply(status, reason, now)
        elif status == "ok":
            return
        elif status == "error" and isinstance(frame.ref, int):
            self.counters.errors += 1
            is_ours = frame.topic == self._topic and self._state is ChannelState.JOINED and frame.ref > link.join_ref
            if reason == "unmatched topic" and is_ours:
                self._rejoin(reason, now)
        else:
            self.counters.unknown += 1

    def _handle_join_reply(self, status: str | None, reason: str, now: float) -> None:
        # Upstream completes a join with an empty response only; that of a later portal may say more.
        if status == "ok":
            self._enter(ChannelState.JOINED)
            self._joined_at = now
            self._attempt = 0
            self._backoff.reset()
            self._events.append(Joined())
        elif status == "error":
            self._fail(PortalError(f"The portal refused the join: {reason or 'no reason given'}"))

    def _handle_push(self, frame: Frame, now: float) -> None:
        if frame.event == "phx_close":
            self._lose("the portal closed the channel", now)
        elif frame.event == "phx_error":
            self._rejoin("the portal's channel crashed", now)
        elif frame.event == "disconnect":
            self._handle_disconnect(frame.payload, now)
        elif frame.event == IDENTITY_SHARED:
            self._events.append(IdentityShared())
        elif frame.event.startswith("phx_"):
            self.counters.unknown += 1
        else:
            self._events.append(PushReceived(frame.event, frame.payload))

    def _handle_disconnect(self, payload: object, now: float) -> None:
        reason = payload.get("reason") if isinstance(payload, dict) else None
        if reason == "token_expired":
            self._fail(AuthenticationError("The token has expired: sign in again", requires_sign_in=True))
        elif reason == IDENTITY_SHARED:
            self._lose("another host connected with the identity of this device", now, is_identity_shared=True)
        else:
            self.counters.unknown += 1

    def _rejoin(self, reason: str, now: float) -> None:
        if self._state is not ChannelState.JOINED:  # a join is under way already, and has its own time limit
            return
        if now < self._joined_at + REJOIN_INTERVAL:
            self._lose(reason, now)
            return
        self._events.append(ChannelLost(reason))
        self._join(now)

    def _lose(
        self, reason: str, now: float, *, retry_after: float | None = None, is_identity_shared: bool = False
    ) -> None:
        was_joined = self._state is ChannelState.JOINED
        if was_joined and now >= self._joined_at + STEADY_AFTER:
            self._join_backoff.reset()
        backoff = self._join_backoff if was_joined else self._backoff
        delay = backoff.next() if retry_after is None else min(retry_after, RETRY_AFTER_MAX)
        if delay is None:
            self._fail(PortalError(f"Gave up on the portal after {self._attempt} attempts: {reason}"))
            return
        self._enter(ChannelState.WAITING)
        self._deadline = now + delay
        self._events.append(HangUp(reason))
        self._events.append(Lost(reason, self._attempt, delay, was_joined, is_identity_shared))

    def _fail(self, error: PortalError) -> None:
        self._enter(ChannelState.FAILED)
        self._events.append(HangUp(str(error)))
        self._events.append(Fatal(error))

    def _enter(self, state: ChannelState) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} does not lead to {state}"
        self._state = state
        self._deadline = None
        if state not in _OPEN:
            self._link = _Link()
            self._queue.clear()

    def _encode(self, topic: str, event: str, payload: object) -> bytes:
        ref = self._link.next_ref
        self._link.next_ref += 1
        return encode(Frame(topic, event, payload, ref), Form.OBJECT)


@attrs.frozen
class _Probe:
    """A heartbeat that has to be answered before the deadline."""

    ref: int
    deadline: float


class _Link:
    """The state of one WebSocket: its refs, from 0, and its heartbeats."""

    __slots__ = ("heartbeat_at", "is_heard", "join_ref", "next_ref", "probe", "unanswered", "urgent")

    def __init__(self, heartbeat_at: float = 0.0) -> None:
        self.heartbeat_at = heartbeat_at
        self.next_ref = 0
        self.join_ref = 0
        self.probe: _Probe | None = None
        self.unanswered: list[Ref] = []
        self.is_heard = False  # since the last heartbeat
        self.urgent: deque[bytes] = deque()


class _Backoff:
    """Delays that grow by half, each drawn from 0.5 to 1.5 times its place in the sequence."""

    def __init__(self, entropy: Entropy, max_total: float | None) -> None:
        self._entropy = entropy
        self._max_total = max_total
        self.reset()

    def reset(self) -> None:
        self._base = BACKOFF_INITIAL
        self._total = 0.0

    def next(self) -> float | None:
        """The next delay in seconds; None if the sum of all delays would exceed the limit."""
        fraction = int.from_bytes(self._entropy(4), "big") / 2**32
        delay = min(self._base * (1 - BACKOFF_JITTER + 2 * BACKOFF_JITTER * fraction), BACKOFF_MAX)
        self._base = min(self._base * BACKOFF_MULTIPLIER, BACKOFF_MAX)
        self._total += delay
        if self._max_total is not None and self._total > self._max_total:
            return None
        return delay


def _read_reply(payload: object) -> tuple[str | None, str]:
    """The status, None if it is unreadable, and the reason of an error."""
    if not isinstance(payload, dict):
        return None, ""
    status, response = payload.get("status"), payload.get("response")
    reason = response.get("reason") if isinstance(response, dict) else None
    return status if isinstance(status, str) else None, reason if isinstance(reason, str) else ""


_OPEN = (ChannelState.JOINING, ChannelState.JOINED)
_ONLINE = (ChannelState.DIALING, *_OPEN)

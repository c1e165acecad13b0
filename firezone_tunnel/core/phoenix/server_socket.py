"""The portal's side of a Phoenix socket (docs/protocol/portal-protocol.md, 1.5, 1.6): one topic, and a mailbox.

Frames wait in the mailbox until the previous frame is handled: `next_message()` returns a message, `done()` frees the
socket for the next. So a handler may wait for a database and still sees its peer's messages in order.

    handle_text ─> mailbox ─> next_message ─> (handler) ─> accept_join / refuse_join / reply / push ─> done
                                                                  └─> transmits

Heartbeats are answered at once. What is pushed while a join is being handled goes out after that join's first push.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from typing import Any

import attrs

from firezone_tunnel.core.phoenix.codec import Form, Frame, decode, encode, reply

# V1 peers send every 30 s (docs/protocol/portal-protocol.md, 1.8); at least 60 (docs/protocol/portal-protocol.md, 4.1).
IDLE_TIMEOUT = 75.0
MAILBOX_CAPACITY = 256

_PHOENIX = "phoenix"


@attrs.frozen
class JoinRequested:
    """The peer joins the topic; answered by `accept_join` or `refuse_join`."""

    payload: Any
    frame: Frame


@attrs.frozen
class MessageReceived:
    """An event on the joined topic; a `reply` is optional."""

    event: str
    payload: Any
    frame: Frame


@attrs.frozen
class Left:
    """The peer left the topic or joined it again: the old channel is gone."""


Delivery = JoinRequested | MessageReceived | Left


class _Channel(enum.Enum):
    ABSENT = enum.auto()
    JOINING = enum.auto()
    JOINED = enum.auto()


class ServerSocket:
    """One WebSocket of a client, gateway or relay."""

    def __init__(self, *, topic: str, form: Form, now: float) -> None:
        self._topic = topic
        self._form = form
        self._last_heard_at = now
        self._mailbox: deque[Frame] = deque()
        self._is_busy = False
        self._channel = _Channel.ABSENT
        self._join_ref: Any = None
        self._held: list[tuple[str, Any]] = []
        self._transmits: deque[bytes] = deque()

    @property
    def is_joined(self) -> bool:
        return self._channel is _Channel.JOINED

    @property
    def is_full(self) -> bool:
        """Whether the mailbox is full, so that nothing more should be read from the peer."""
        return len(self._mailbox) >= MAILBOX_CAPACITY

    def handle_text(self, text: str, now: float) -> None:
        """One text frame from the peer.

        Raises: ProtocolError if it isn't a Phoenix frame; the caller then closes the socket.
        """
        frame = decode(text, self._form)
        self._last_heard_at = now
        if frame.topic == _PHOENIX and frame.event == "heartbeat":
            self._send(reply(frame, "ok", {}))
            return
        self._mailbox.append(frame)

    def next_message(self) -> Delivery | None:
        """The next message for the handler; None while it is busy or the mailbox is empty."""
        while self._mailbox and not self._is_busy:
            delivery = self._deliver(self._mailbox.popleft())
            if delivery is not None:
                self._is_busy = True
                return delivery
        return None

    def done(self) -> None:
        """The handler has finished with the message that `next_message` returned."""
        self._is_busy = False

    def accept_join(self, request: JoinRequested, event: str, payload: Any) -> None:
        """Reply ok, then push this, then what was pushed in the meantime."""
        self._channel = _Channel.JOINED
        self._join_ref = request.frame.join_ref
        self._send(reply(request.frame, "ok", {}))
        self.push(event, payload)
        held, self._held = self._held, []
        for held_event, held_payload in held:
            self.push(held_event, held_payload)

    def refuse_join(self, request: JoinRequested, reason: str) -> None:
        self._channel = _Channel.ABSENT
        self._held.clear()
        self._send(reply(request.frame, "error", {"reason": reason}))

    def reply(self, message: MessageReceived, response: Any = None) -> None:
        self._send(reply(message.frame, "ok", {} if response is None else response))

    def refuse(self, message: MessageReceived, reason: str) -> None:
        self._send(reply(message.frame, "error", {"reason": reason}))

    def push(self, event: str, payload: Any) -> None:
        """Send an event. It is dropped without a joined channel, and held while a join is handled."""
        if self._channel is _Channel.JOINED:
            self._send(Frame(topic=self._topic, event=event, payload=payload, ref=None, join_ref=self._join_ref))
        elif self._channel is _Channel.JOINING:
            self._held.append((event, payload))

    def close_channel(self) -> None:
        """Close the channel: `phx_close`."""
        self.push("phx_close", {})
        self._channel = _Channel.ABSENT
        self._held.clear()

    def crash_channel(self) -> None:
        """The handler failed: send `phx_error` and end the channel."""
        self.push("phx_error", {})
        self._channel = _Channel.ABSENT
        self._held.clear()

    def transmits(self) -> Iterator[bytes]:
        """Text frames to send, in order."""
        while self._transmits:
            yield self._transmits.popleft()

    def is_idle(self, now: float) -> bool:
        """Whether the peer has been silent for so long that the socket should be closed."""
        return now >= self._last_heard_at + IDLE_TIMEOUT

    def _deliver(self, frame: Frame) -> Delivery | None:
        """None: it was answered here."""
        if frame.topic != self._topic or (self._channel is _Channel.ABSENT and frame.event != "phx_join"):
            self._send(reply(frame, "error", {"reason": "unmatched topic"}))
            return None
        if frame.event == "phx_leave":
            self._send(reply(frame, "ok", {}))
            self.close_channel()
            return Left()
        if frame.event != "phx_join":
            return MessageReceived(frame.event, frame.payload, frame)
        if self._channel is _Channel.JOINED:  # the old channel ends first; then this join is handled like any other
            self.close_channel()
            self._mailbox.appendleft(frame)
            return Left()
        self._channel = _Channel.JOINING
        return JoinRequested(frame.payload, frame)

    def _send(self, frame: Frame) -> None:
        self._transmits.append(encode(frame, self._form))

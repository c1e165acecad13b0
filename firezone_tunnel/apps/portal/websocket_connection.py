"""One open WebSocket: its Phoenix socket, its channel, and the loop that empties its mailbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.apps.portal.channels import ChannelHandler, JoinAccepted, UnknownMessage
from firezone_tunnel.core.phoenix.codec import Form
from firezone_tunnel.core.phoenix.server_socket import Delivery, JoinRequested, Left, MessageReceived, ServerSocket
from firezone_tunnel.errors import PlatformError, ProtocolError, one_line
from firezone_tunnel.shell.logs import events as log


class WebSocket(Protocol):
    """The WebSocket of a connection."""

    def send(self, text: bytes) -> None: ...

    def close(self, *, is_failure: bool = False) -> None: ...

    def pause_reading(self, *, paused: bool) -> None: ...

    def probe(self) -> None: ...


class WebSocketConnection:
    """A peer's connection; implements `PeerSocket`."""

    def __init__(
        self,
        web_socket: WebSocket,
        *,
        topic: str,
        form: Form,
        now: Callable[[], float],
        on_lost: Callable[[], None],
        on_handled: Callable[[], None],
    ) -> None:
        self.channel: ChannelHandler | None = None
        self.fields: dict[str, str] = {"role": topic}
        self._web_socket = web_socket
        self._socket = ServerSocket(topic=topic, form=form, now=now())
        self._now = now
        self._on_lost = on_lost
        self._on_handled = on_handled
        self._is_working = False
        self._is_paused = False
        self._is_closed = False

    def text_received(self, text: str) -> None:
        """One text frame from the peer."""
        if self._is_closed:
            return
        try:
            self._socket.handle_text(text, self._now())
        except ProtocolError as error:
            log.info("portal:frame_rejected", **self.fields, reason=one_line(error))
            self.close(is_failure=True)
            return
        self._flush()
        if not self._is_working:
            Deferred.fromCoroutine(self._work()).addErrback(self._work_failed)
        self._balance_reading()

    def push(self, event: str, payload: Any) -> None:
        if not self._is_closed:
            self._socket.push(event, payload)
            self._flush()

    def disconnect(self, reason: str) -> None:
        self.push("disconnect", {"reason": reason})
        self._socket.close_channel()
        self._flush()
        self.close()

    def probe(self) -> None:
        if not self._is_closed:
            self._web_socket.probe()

    def close(self, *, is_failure: bool = False) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._web_socket.close(is_failure=is_failure)

    def close_if_idle(self, now: float) -> None:
        if self._socket.is_idle(now) and not self._is_closed:
            log.info("portal:connection_idle", **self.fields)
            self.close()

    def lost(self) -> None:
        """The WebSocket is closed, by either side."""
        self._is_closed = True
        self._on_lost()

    async def _work(self) -> None:
        self._is_working = True
        try:
            while not self._is_closed and (delivery := self._socket.next_message()) is not None:
                await self._deal_with(delivery)
                self._socket.done()
                self._flush()
        finally:
            self._is_working = False
        self._flush()
        self._balance_reading()
        self._on_handled()

    async def _deal_with(self, delivery: Delivery) -> None:
        """A service's boundary: a failure ends this connection, and nothing else."""
        assert self.channel is not None
        try:
            if isinstance(delivery, Left):
                self.channel.left()
            elif isinstance(delivery, JoinRequested):
                await self._join(self.channel, delivery)
            else:
                await self._handle(self.channel, delivery)
        except PlatformError as error:
            log.error("portal:store_failed", **self.fields, reason=one_line(error))
            self._crash(delivery)
        except Exception:  # noqa: BLE001  # a service's boundary: one peer's message must not end the others'
            self._log_crash(Failure())
            self._crash(delivery)

    def _work_failed(self, failure: Failure) -> None:
        """The socket itself failed: close without a message."""
        self._log_crash(failure)
        self.close(is_failure=True)

    def _log_crash(self, failure: Failure) -> None:
        reason, traceback = failure.getErrorMessage(), failure.getTraceback()
        log.error("portal:channel_crashed", **self.fields, reason=reason, traceback=traceback)

    async def _join(self, channel: ChannelHandler, request: JoinRequested) -> None:
        outcome = await channel.join(request)
        if isinstance(outcome, JoinAccepted):
            self._socket.accept_join(request, outcome.event, outcome.payload)
            return
        self._socket.refuse_join(request, outcome.reason)

    async def _handle(self, channel: ChannelHandler, message: MessageReceived) -> None:
        try:
            refusal = await channel.handle(message)
        except UnknownMessage as error:
            log.info("portal:message_unknown", **self.fields, event=message.event, reason=str(error))
            self._socket.refuse(message, "unknown_message")
            return
        if refusal is not None:
            self._socket.refuse(message, refusal)
        elif channel.answers(message.event):
            self._socket.reply(message)

    def _crash(self, delivery: Delivery) -> None:
        """Close after `phx_error`, so that the peer reconnects: V1 peers don't rejoin by themselves.

        See docs/protocol/portal-protocol.md, 3.14.
        """
        assert self.channel is not None
        self.channel.left()
        if isinstance(delivery, JoinRequested):
            self._socket.refuse_join(delivery, "join crashed")
        self._socket.crash_channel()
        self._flush()
        self.close(is_failure=True)

    def _flush(self) -> None:
        for text in self._socket.transmits():
            self._web_socket.send(text)

    def _balance_reading(self) -> None:
        if self._socket.is_full is not self._is_paused and not self._is_closed:
            self._is_paused = self._socket.is_full
            self._web_socket.pause_reading(paused=self._is_paused)

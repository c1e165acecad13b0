"""One WebSocket to the portal, on Autobahn.

The upgrade request is ours because Autobahn logs its own, with the token. Reading a refusal is ours because Autobahn
drops a refusal whose body comes in a second segment.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import msgspec
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from twisted.internet.interfaces import IHandshakeListener, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.core.phoenix.channel import UpgradeRefused
from firezone_tunnel.shell.portal_link.failures import Explanation, explain_tls
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, call_later

MAX_MESSAGE = 16 << 20
HEADER_LIMIT = 16 << 10
REFUSAL_LIMIT = 16 << 10
REFUSAL_TIMEOUT = 2.0


class Listener(Protocol):
    """Gets the events of a `PortalLinkProtocol`. `refused` or `closed` is the last."""

    def secured(self) -> None:
        """TLS is established, where there is TLS."""

    def opened(self) -> None: ...

    def text_received(self, text: bytes) -> None: ...

    def writable(self) -> None:
        """The written data has left, after `is_writable` was False."""

    def refused(self, refusal: UpgradeRefused) -> None: ...

    def closed(self, reason: str | None, advice: str = "") -> None:
        """`reason` is None where the portal dropped the connection before it had answered the upgrade."""


@implementer(IHandshakeListener, IPushProducer)
class PortalLinkProtocol(WebSocketClientProtocol):  # type: ignore[misc]  # Autobahn has no types
    """Upgrades, then carries text frames. Pings and close frames are answered by Autobahn."""

    def __init__(self, request: bytes, key: bytes, listener: Listener, utc_clock: Callable[[], float]) -> None:
        super().__init__()
        self.log = _NullLogger()
        self.is_writable = True
        self._is_lost = False
        self._request = request
        self._listener: Listener | None = listener
        self._utc_clock = utc_clock
        self._refusal: _RefusalReader | None = None
        self._refusal_timer: BoottimeTimer | None = None
        self._tls_failure: Explanation | None = None
        self._was_dropped = False
        self.websocket_key = key

    @property
    def is_upgraded(self) -> bool:
        """Whether text frames and a close frame can be sent."""
        return bool(self.state == self.STATE_OPEN)

    def abort(self) -> None:
        """Drop the connection at once; the listener hears nothing more."""
        self._listener = None
        self._stop_reading_refusal()
        if not self._is_lost:
            self.transport.abortConnection()

    def close(self) -> None:
        """Close 1000; the listener hears `closed` when the portal has answered, and calls `abort` if it never does."""
        self.sendClose(self.CLOSE_STATUS_CODE_NORMAL)

    def connectionLost(self, reason: Failure) -> None:
        self._is_lost = True
        self._tls_failure = explain_tls(reason.value)
        self._was_dropped = self.state == self.STATE_CONNECTING and self.wasNotCleanReason is None
        self._stop_reading_refusal()
        super().connectionLost(reason)

    def handshakeCompleted(self) -> None:
        if self._listener is not None:
            self._listener.secured()

    def startHandshake(self) -> None:
        self.sendData(self._request)
        self._request = b""

    def dataReceived(self, data: bytes) -> None:
        if self._refusal is None:
            super().dataReceived(data)
        else:
            self._read_refusal(data)

    def processHandshake(self) -> None:
        """Parse the portal's answer. Autobahn has no limit for the header, and raises for bytes that aren't UTF-8."""
        if not self.data[: len(_HTTP)].startswith(_HTTP[: len(self.data)]):
            super().failHandshake(f"what answers is not HTTP: {_clean(self.data[:40].decode('latin-1'))}")
            return
        if len(self.data) > HEADER_LIMIT and b"\r\n\r\n" not in self.data[:HEADER_LIMIT]:
            super().failHandshake("the header of the portal's answer is too long")
            return
        try:
            super().processHandshake()
        except UnicodeDecodeError:
            super().failHandshake("the header of the portal's answer is not UTF-8")

    def failHandshake(self, reason: str) -> None:
        """The response is not the upgrade: wait for the refusal's body, if it is HTTP at all."""
        status = _STATUS_LINE.match(getattr(self, "http_status_line", ""))
        if status is None or status[1] == "101":
            super().failHandshake(reason)
            return
        _, _, body = self.data.partition(b"\r\n\r\n")
        self._refusal = _RefusalReader(int(status[1]), self.http_headers)
        self._refusal_timer = call_later(self.factory.reactor, REFUSAL_TIMEOUT, self._refuse)
        self._read_refusal(body)

    def onOpen(self) -> None:
        self.transport.registerProducer(self, True)  # `dropConnection` takes it back
        if self._listener is not None:
            self._listener.opened()

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        if self._listener is not None and not isBinary:
            self._listener.text_received(payload)

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        if self._refusal is not None:
            self._refuse()
            return
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        if self._tls_failure is not None:
            listener.closed(*self._tls_failure)
        elif self._was_dropped:
            listener.closed(None)
        elif wasClean:
            listener.closed(f"the portal closed the WebSocket: {code or 'no code'} {_clean(reason or '')}".rstrip())
        else:
            listener.closed(_clean(self.wasNotCleanReason or "the connection broke"))

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self.is_writable = False

    def resumeProducing(self) -> None:
        self.is_writable = True
        if self._listener is not None:
            self._listener.writable()

    def stopProducing(self) -> None:
        """The transport is gone: `onClose` follows."""
        self.is_writable = False

    def _read_refusal(self, data: bytes) -> None:
        assert self._refusal is not None
        if self._refusal.feed(data):
            self._refuse()

    def _refuse(self) -> None:
        """Report what has come of the refusal, and drop the connection."""
        self._stop_reading_refusal()
        if self._listener is None or self._refusal is None:
            return
        listener, self._listener = self._listener, None
        listener.refused(self._refusal.finish(self._utc_clock()))
        self.abort()

    def _stop_reading_refusal(self) -> None:
        if self._refusal_timer is not None:
            self._refusal_timer.close()


class PortalLinkFactory(WebSocketClientFactory):  # type: ignore[misc]  # Autobahn has no types
    """Makes the protocol of one attempt."""

    noisy = False

    def __init__(
        self,
        reactor: Any,
        *,
        target: str,
        headers: tuple[tuple[str, str], ...],
        listener: Listener,
        utc_clock: Callable[[], float],
    ) -> None:
        super().__init__(reactor=reactor)
        self.log = _NullLogger()
        self.setProtocolOptions(
            openHandshakeTimeout=0,  # on the wall clock; the channel has a limit for the whole attempt
            closeHandshakeTimeout=0,  # 1 s may be over before the frame has left; the caller has a limit of its own
            maxFramePayloadSize=MAX_MESSAGE,
            maxMessagePayloadSize=MAX_MESSAGE,
            autoPingInterval=0,
        )
        self._target = target
        self._headers = headers
        self._listener = listener
        self._utc_clock = utc_clock

    def buildProtocol(self, addr: object) -> PortalLinkProtocol:
        key = base64.b64encode(os.urandom(16))
        request = _upgrade_request(self._target, self._headers, key)
        protocol = PortalLinkProtocol(request, key, self._listener, self._utc_clock)
        protocol.factory = self
        return protocol


def parse_retry_after(value: str, utc_now: float) -> float | None:
    """Seconds to wait, of a Retry-After header (RFC 9110, section 10.2.3). A past date is 0, garbage None."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    if not _HTTP_DATE.fullmatch(value):
        return None
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - utc_now)
    except (ValueError, OverflowError):
        return None


class _RefusalReader:
    """Collects the body of a refusal, by its Content-Length or until it is long enough."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        self._headers = headers
        self._body = b""
        length = headers.get("content-length", "").strip()
        self._length = min(int(length), REFUSAL_LIMIT) if re.fullmatch(r"[0-9]{1,18}", length) else REFUSAL_LIMIT

    def feed(self, data: bytes) -> bool:
        """Whether it is complete."""
        self._body = (self._body + data)[: self._length]
        return len(self._body) >= self._length

    def finish(self, utc_now: float) -> UpgradeRefused:
        media_type = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        code, detail = None, ""
        if media_type == "application/problem+json":
            code, detail = _read_problem(self._body)
        elif media_type == "text/plain":
            detail = self._body.decode("utf-8", "replace")
        return UpgradeRefused(
            status=self._status,
            code=code,
            detail=_clean(detail),
            retry_after=parse_retry_after(self._headers.get("retry-after", ""), utc_now),
        )


def _read_problem(body: bytes) -> tuple[str | None, str]:
    """`code` and `detail` (or `title`) of a problem document (RFC 9457), as far as they are texts."""
    problem: Any = None
    with contextlib.suppress(msgspec.DecodeError, UnicodeError, RecursionError):
        problem = msgspec.json.decode(body)
    if not isinstance(problem, dict):
        return None, ""
    code, detail, title = (problem.get(name) for name in ("code", "detail", "title"))
    text = next((one for one in (detail, title) if isinstance(one, str)), "")
    return _clean(code) if isinstance(code, str) else None, text


def _upgrade_request(target: str, headers: tuple[tuple[str, str], ...], key: bytes) -> bytes:
    """RFC 6455, section 4.1; without subprotocol, origin and extensions (docs/protocol/portal-protocol.md, 1.1)."""
    lines = [
        f"GET {target} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers),
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key.decode()}",
    ]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def _clean(text: str) -> str:
    """One short printable line of what the portal sent."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())[:200]


class _NullLogger:
    """Replaces Autobahn's logger, which would log every request, and what the service logs anyway."""

    def _ignore(self, *arguments: object, **fields: object) -> None:
        pass

    trace = debug = info = warn = error = critical = failure = _ignore


_HTTP = b"HTTP/"
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: |$)")
_DAY, _TIME = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)", r"[0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
_HTTP_DATE = re.compile(rf"{_DAY}, [0-9]{{2}} [A-Z][a-z]{{2}} [0-9]{{4}} {_TIME}")

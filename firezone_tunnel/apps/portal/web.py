"""The WebSocket server: upgrades and refusals over HTTP, and text frames between Autobahn and the Phoenix socket."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import txaio
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket.types import ConnectionDeny, ConnectionRequest
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from firezone_tunnel.core.portal.admission import Refused, UpgradeRequest

if TYPE_CHECKING:
    from firezone_tunnel.apps.portal.hub import Hub, Registered
    from firezone_tunnel.apps.portal.websocket_connection import WebSocketConnection

HEALTH_PATH = "/healthz"
_HEADER_LIMIT = 16 * 1024  # bytes of a request before its empty line
_MESSAGE_LIMIT = 16 * 1024 * 1024  # bytes, both ways: no `init` comes near it
_BACKLOG_LIMIT = 16 * 1024 * 1024  # bytes waiting for a peer that doesn't read
_NO_LOG = txaio.make_logger(level="none")  # Autobahn's own would write whole requests, tokens included
_PROBE = (
    (socket.TCP_KEEPIDLE, 1),
    (socket.TCP_KEEPINTVL, 1),
    (socket.TCP_KEEPCNT, 4),
    (socket.TCP_USER_TIMEOUT, 5000),  # milliseconds; for a peer that has yet to acknowledge something
)
_GOING_AWAY_LATER = 1012  # "service restart": come back soon (RFC 6455's registry)


@implementer(IPushProducer)
class PortalProtocol(WebSocketServerProtocol):  # type: ignore[misc]  # Autobahn has no types
    """One HTTP request, which is upgraded to a WebSocket or refused."""

    log = _NO_LOG
    factory: PortalFactory

    _refused: Refused | None = None
    _registered: Registered | None = None
    _connection: WebSocketConnection | None = None
    _is_congested = False
    _is_producing = False

    def onConnect(self, request: ConnectionRequest) -> Deferred[None]:
        return Deferred.fromCoroutine(self._connect(request))

    async def _connect(self, request: ConnectionRequest) -> None:
        asked = UpgradeRequest(request.path, request.params, request.headers, self._remote_ip())
        try:
            self._registered = await self.factory.hub.register(asked)
        except Refused as refused:
            self._refused = refused
            raise ConnectionDeny(refused.status, refused.detail) from refused

    def onOpen(self) -> None:
        assert self._registered is not None
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._is_producing = True
        self.transport.setTcpNoDelay(True)  # else each small frame may wait 40 ms for the peer's delayed ACK
        self.transport.registerProducer(self, True)
        self._connection = self.factory.hub.open(self._registered, self)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        assert self._connection is not None
        if isBinary:
            self.close()
            return
        self._connection.text_received(payload.decode())

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.lost()

    def send(self, text: bytes) -> None:
        """Send a text frame. A peer that doesn't read is disconnected when its backlog is too long."""
        if not self._is_congested:
            self.sendMessage(text)
            return
        self._backlog.append(text)
        self._backlog_bytes += len(text)
        if self._backlog_bytes > _BACKLOG_LIMIT:
            self.dropConnection(abort=True)

    def close(self, *, is_failure: bool = False) -> None:
        """Close the WebSocket: normally, or (`is_failure`) so that the peer reconnects soon."""
        if self.state != self.STATE_OPEN:
            return
        if is_failure:
            self.sendCloseFrame(code=_GOING_AWAY_LATER, isReply=False)
            return
        self.sendClose(code=self.CLOSE_STATUS_CODE_NORMAL)

    def probe(self) -> None:
        """Let TCP ask whether the peer's host is still there: one that is gone ends the connection within seconds."""
        transport: Any = self.transport
        tcp = getattr(transport, "transport", transport).getHandle()  # the TCP transport below TLS, if there is TLS
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBE:
            tcp.setsockopt(socket.IPPROTO_TCP, option, value)

    def pause_reading(self, *, paused: bool) -> None:
        if paused:
            self.transport.pauseProducing()
        else:
            self.transport.resumeProducing()

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._is_congested = True

    def resumeProducing(self) -> None:
        self._is_congested = False
        while self._backlog and not self._is_congested:
            text = self._backlog.popleft()
            self._backlog_bytes -= len(text)
            self.sendMessage(text)

    def stopProducing(self) -> None:
        """The transport is gone: `onClose` follows."""

    def dropConnection(self, abort: bool = False) -> None:
        if self._is_producing:  # a transport with a producer never closes
            self._is_producing = False
            with contextlib.suppress(AttributeError):  # its own transport may be gone already
                self.transport.unregisterProducer()
        super().dropConnection(abort)

    def processHandshake(self) -> None:
        """Limit the header: Autobahn has no limit."""
        if len(self.data) > _HEADER_LIMIT and b"\r\n\r\n" not in self.data[:_HEADER_LIMIT]:
            self.failHandshake("The request's header is too large.", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        super().processHandshake()

    def failHandshake(self, reason: str, code: int = 400, responseHeaders: Any = None) -> None:
        """Answer with a problem document (RFC 9457) in place of Autobahn's bare status line."""
        refused = self._refused
        if refused is None and code == HTTPStatus.UPGRADE_REQUIRED:
            if self.http_request_path == HEALTH_PATH:
                self._answer(HTTPStatus.OK, "text/plain", b"ok\n")
                self.dropConnection(abort=False)
                return
            refused = Refused(code, "upgrade_required", "Only WebSockets are served here.")
        if refused is None:
            status = 400 if code == HTTPStatus.METHOD_NOT_ALLOWED else code
            refused = Refused(status, "bad_request", reason)
        self._answer_refusal(refused)
        self.dropConnection(abort=False)

    def _answer_refusal(self, refused: Refused) -> None:
        extra = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
        body = json.dumps(refused.document()).encode()
        self._answer(HTTPStatus(refused.status), "application/problem+json", body, extra)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, extra: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(extra or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.sendData(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode() + body)

    def _remote_ip(self) -> str:
        host = getattr(self.transport.getPeer(), "host", "127.0.0.1")
        address = ipaddress.ip_address(host.partition("%")[0])
        return str(getattr(address, "ipv4_mapped", None) or address)


class PortalFactory(WebSocketServerFactory):  # type: ignore[misc]  # Autobahn has no types
    """Makes a protocol for each connection to the portal's port."""

    log = _NO_LOG
    protocol = PortalProtocol

    def __init__(self, reactor: Any, hub: Hub) -> None:
        super().__init__(reactor=reactor, server=None)
        self.hub = hub
        # No pings: V1 peers parse an empty one as a broken document, and reconnect
        # (docs/protocol/portal-protocol.md, 1.5).
        self.setProtocolOptions(
            versions=[13],
            webStatus=False,  # it parses parameters of its own, and answers none that it can't read
            autoPingInterval=0,
            openHandshakeTimeout=15,
            closeHandshakeTimeout=2,
            maxMessagePayloadSize=_MESSAGE_LIMIT,
            maxFramePayloadSize=_MESSAGE_LIMIT,
        )

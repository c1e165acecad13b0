"""A portal on loopback that misbehaves on demand, and the environment that a `PortalLink` needs."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from twisted.internet import reactor as any_reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import DefaultOpenSSLContextFactory

from firezone_tunnel.shell.portal_link.service import PortalLink
from firezone_tunnel.shell.portal_link.url import LoginUrl

TOKEN = "n.s3cret-T0ken"
PATIENCE = 10.0  # seconds of real time after which a test fails rather than waits

_reactor: Any = any_reactor
_T = TypeVar("_T")


class Signal:
    """A queue of items that tests wait for. Like our own queues, it wakes its reader in a later turn."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self._waiting: Deferred[None] | None = None

    def add(self, item: Any) -> None:
        self.items.append(item)
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            _reactor.callLater(0, waiting.callback, None)

    async def next(self, wanted: Callable[[Any], bool] = lambda _: True) -> Any:
        """Return the next wanted item, and drop the items before it."""
        while True:
            while self.items:
                item = self.items.popleft()
                if wanted(item):
                    return item
            self._waiting = Deferred()
            await self._waiting.addTimeout(PATIENCE, _reactor)


class Inbox(Signal):
    """The queue towards the tunnel service, which can be full."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity: int | None = None

    def put(self, item: Any, /) -> bool:
        if self.capacity is not None and len(self.items) >= self.capacity:
            return False
        self.add(item)
        return True

    async def next_of(self, kind: type[_T]) -> _T:
        found: _T = await self.next(lambda item: isinstance(item, kind))
        return found


class Clock:
    """A boot-time clock that a test advances, and the only timer on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._deadline: float | None = None
        self._callback: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now

    def make_timer(self, callback: Callable[[], object]) -> Clock:
        self._callback = callback
        return self

    def set(self, deadline: float | None) -> None:
        self._deadline = deadline

    def close(self) -> None:
        self._deadline = None

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._deadline is not None and self._deadline <= end:
            self.now, self._deadline = max(self.now, self._deadline), None
            self._callback()
        self.now = end


class Peer(WebSocketServerProtocol):  # type: ignore[misc]  # Autobahn has no types
    """A WebSocket of the portal. By default it accepts every join."""

    answers_join = True
    answers_close = True

    def __init__(self, portal: UnrulyPortal) -> None:
        super().__init__()
        self._portal = portal
        self.frames = Signal()
        self.pongs = Signal()
        self.closes = Signal()

    def onConnect(self, request: Any) -> None:
        self._portal.requests.add(request)

    def onOpen(self) -> None:
        self._portal.peers.add(self)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        frame = json.loads(payload)
        if frame["event"] == "phx_join" and self.answers_join:
            self.reply(frame["ref"])
        self.frames.add(frame)

    def onPong(self, payload: bytes) -> None:
        self.pongs.add(payload)

    def onCloseFrame(self, code: int, reasonRaw: bytes) -> Any:
        self.closes.add(code)
        return super().onCloseFrame(code, reasonRaw) if self.answers_close else None

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        self.closes.add("gone")

    def reply(self, ref: Any, status: str = "ok", response: Any = None) -> None:
        self.push("phx_reply", {"status": status, "response": response or {}}, ref=ref)

    def push(self, event: str, payload: Any, *, ref: Any = None) -> None:
        self.say(json.dumps({"topic": "client", "event": event, "payload": payload, "ref": ref}).encode())

    def say(self, text: bytes) -> None:
        self.sendMessage(text)

    async def next_event(self, event: str) -> Any:
        return await self.frames.next(lambda frame: frame["event"] == event)


class SilentPeer(Peer):
    """Never answers a join."""

    answers_join = False


class RudePeer(Peer):
    """Never answers a close frame."""

    answers_close = False


class HastyPeer(Peer):
    """Breaks the connection right after the upgrade: when the first frame shows that its answer has arrived."""

    def onOpen(self) -> None:
        """Hide this peer from the tests."""

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.transport.abortConnection()


class Script(Protocol):
    """Answers the first bytes with these parts, each in its own segment. None closes the connection."""

    def __init__(self, portal: UnrulyPortal, *parts: bytes | None) -> None:
        self._portal = portal
        self._parts = deque(parts)
        self._heard = b""

    def dataReceived(self, data: bytes) -> None:
        is_first = not self._heard
        self._heard += data
        if is_first:
            self._portal.requests.add(self)
            self._go_on()

    def connectionLost(self, reason: Any = None) -> None:
        self._parts.clear()
        self._portal.losses.add(self)

    def _go_on(self) -> None:
        if not self._parts:
            return
        part = self._parts.popleft()
        transport: Any = self.transport
        if part is None:
            transport.loseConnection()
            return
        transport.write(part)
        _reactor.callLater(0.02, self._go_on)


class UnrulyPortal(Factory):
    """Listens on loopback. `script` makes the protocols of the next connections; then follow well-behaved `Peer`s."""

    def __init__(self, tls: DefaultOpenSSLContextFactory | None = None) -> None:
        self.script: deque[Callable[[UnrulyPortal], Any]] = deque()
        self.requests = Signal()
        self.peers = Signal()
        self.losses = Signal()
        self._websockets = WebSocketServerFactory(reactor=_reactor)
        # Autobahn cuts its timeouts to whole seconds of the clock: a timeout of 1 s may expire at once.
        self._websockets.setProtocolOptions(
            openHandshakeTimeout=0, closeHandshakeTimeout=PATIENCE, maxMessagePayloadSize=1 << 24
        )
        self._port = (
            _reactor.listenTCP(0, self, interface="127.0.0.1")
            if tls is None
            else _reactor.listenSSL(0, self, tls, interface="127.0.0.1")
        )
        self._number = int(self._port.getHost().port)  # a port that has stopped listening no longer knows its number

    @property
    def port(self) -> int:
        return self._number

    def buildProtocol(self, addr: Any) -> Any:
        protocol = self.script.popleft()(self) if self.script else Peer(self)
        protocol.factory = self._websockets if isinstance(protocol, Peer) else self
        return protocol

    async def stop(self) -> None:
        await self._port.stopListening()

    def answer(self, *parts: bytes | None) -> None:
        """Answer the next connection's request with these parts."""
        self.script.append(lambda portal: Script(portal, *parts))


class World:
    """A portal, a service that connects to it, and their clock."""

    def __init__(self, portal: UnrulyPortal, *, host: str = "127.0.0.1", scheme: str = "ws", **options: Any) -> None:
        self.portal = portal
        self.inbox = Inbox()
        self.clock = Clock()
        self.resolved: list[str] = []
        self.addresses = ["127.0.0.1"]
        self.resolve: Callable[[str], Deferred[list[str]]] = lambda _: succeed(self.addresses)
        options.setdefault("entropy", bytes)
        self.service = PortalLink(
            _reactor,
            url=LoginUrl.client(f"{scheme}://{host}:{portal.port}", TOKEN, device_id="d", name="n"),
            topic="client",
            events=self.inbox,
            resolve=self._resolve,
            clock=self.clock,
            utc_clock=lambda: 1_800_000_000.0,
            make_timer=self.clock.make_timer,
            **options,
        )

    def start(self, public_key: bytes = bytes(32)) -> None:
        self.service.connect(public_key)
        self.service.startService()

    async def stop(self) -> None:
        await self.service.stopService()
        await self.portal.stop()

    def _resolve(self, host: str) -> Deferred[list[str]]:
        self.resolved.append(host)
        return self.resolve(host)


def write_certificates(directory: Path, *names: str) -> Path:
    """A throw-away CA in `ca.pem`, and a server's certificate for these names and 127.0.0.1 in the path returned."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test CA")])
    ca = _certificate(ca_name, ca_key.public_key(), ca_name, ca_key, x509.BasicConstraints(ca=True, path_length=None))
    (directory / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "portal")])
    general = [x509.DNSName(name) for name in names]
    alternative = x509.SubjectAlternativeName([*general, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = _certificate(subject, key.public_key(), ca_name, ca_key, alternative)
    path = directory / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + server.public_bytes(serialization.Encoding.PEM))
    return path


def tls_server(path: Path) -> DefaultOpenSSLContextFactory:
    return DefaultOpenSSLContextFactory(str(path), str(path))


def _certificate(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(extension, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )

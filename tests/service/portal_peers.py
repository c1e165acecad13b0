"""A portal in this process, and peers that connect to it over ordinary WebSockets."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import attrs
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater

from firezone_tunnel.apps.portal.service import PortalService
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.shell.reactor.clock import boottime, utc

CLIENT_TOKEN = "n.client-token-of-the-tests"
OTHER_CLIENT_TOKEN = "n.other-client-token-of-the-tests"
GATEWAY_TOKEN = ".gateway-token-of-the-tests"
RELAY_TOKEN = ".relay-token-of-the-tests"
SITE_ID = "2b7e1516-28ae-4d2a-a6ab-f7158809cf03"
LAB_ID = "0a6e2f91-4c1d-4f5e-b1b2-6e8f9d3c1a05"
WIKI_ID = "9c4f1d20-3e55-4b7a-8c11-5a7d2e6f0b04"

SEED = f"""\
[account]
name = "Acme"
slug = "acme"

[[sites]]
id = "{SITE_ID}"
name = "HQ"

[[groups]]
name = "Everyone"

[[groups]]
name = "Nobody"

[[actors]]
name = "Dev User"
groups = ["Everyone"]

[[actors]]
name = "Other User"
groups = ["Everyone"]

[[tokens]]
kind = "client"
actor = "Dev User"
token = "{CLIENT_TOKEN}"

[[tokens]]
kind = "client"
actor = "Other User"
token = "{OTHER_CLIENT_TOKEN}"

[[tokens]]
kind = "gateway"
site = "HQ"
token = "{GATEWAY_TOKEN}"

[[tokens]]
kind = "relay"
token = "{RELAY_TOKEN}"

[[resources]]
id = "{LAB_ID}"
name = "Lab"
type = "cidr"
address = "172.20.0.0/16"
address_description = "lab network"
site = "HQ"

[[resources]]
id = "{WIKI_ID}"
name = "Wiki"
type = "dns"
address = "*.wiki.corp.example"
site = "HQ"
filters = ["tcp/443", "icmp"]

[[policies]]
group = "Everyone"
resource = "Lab"

[[policies]]
group = "Everyone"
resource = "Wiki"
"""

V1_AGENT = "Debian/12.0.0 connlib/{version} (x86_64; 6.18.44)"
V2_AGENTS = {"client": "Debian/12.0.0 headless-client/1.5.12 (x86_64)", "gateway": "Debian/12.0.0 gateway/1.6.1"}
_VERSIONS = {"client": "1.5.3", "gateway": "1.4.16"}
_TOKENS = {"client": CLIENT_TOKEN, "gateway": GATEWAY_TOKEN, "relay": RELAY_TOKEN}


def key(number: int) -> str:
    """A public key as it goes over the wire."""
    return base64.b64encode(bytes([number] * 32)).decode()


@attrs.define
class Portal:
    """A running portal, its seed file, and clocks that a test may push forward."""

    service: PortalService
    directory: Path
    address: SocketAddress
    clock: Clock
    peers: list[Peer] = attrs.Factory(list)

    @property
    def seed(self) -> Path:
        return self.directory / "portal.toml"

    async def reseed(self, *changes: tuple[str, str]) -> bool:
        """Replace texts in the seed file and reload it."""
        text = self.seed.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        self.seed.write_text(text)
        return await self.service.reload()

    def advance(self, seconds: float) -> None:
        self.clock.offset += seconds
        self.service.handle_timeout()

    async def connect(self, path: str, agent: str, *, headers: dict[str, str] | None = None) -> Peer:
        """Open a WebSocket. Raises the refusal if the portal refuses it."""
        peer = await Peer.open(self.address, path, agent, headers or {})
        self.peers.append(peer)
        return peer

    async def join(
        self, role: str, *, v2: bool = False, agent: str | None = None, token: str | None = None, **parameters: Any
    ) -> Peer:
        """Connect as a client, gateway or relay of either generation, join, and take the `init`."""
        stamp_secret = parameters.pop("stamp_secret", "0" * 64)
        defaults = {"external_id": f"{role}-1", "name": role, "public_key": key(1 if role == "client" else 2)}
        if role == "relay":
            defaults = {"ipv4": "198.51.100.10"}
        query = urlencode({"token": token or _TOKENS[role], **defaults, **parameters})
        version = "v2/" if v2 and role != "relay" else ""
        usual = "relay/0.1.0" if role == "relay" else V1_AGENT.format(version=_VERSIONS.get(role))
        agent = agent or (V2_AGENTS.get(role) if v2 else None) or usual
        peer = await self.connect(f"/{role}/{version}websocket?{query}", agent)
        peer.topic = role
        peer.send("phx_join", {"stamp_secret": stamp_secret} if role == "relay" else None)
        reply = await peer.receive("phx_reply")
        assert reply == {"status": "ok", "response": {}}, reply
        peer.init = await peer.receive("init")
        return peer


@attrs.define
class Clock:
    offset: float = 0.0

    def now(self) -> float:
        return boottime() + self.offset

    def utc_now(self) -> float:
        return utc() + self.offset


async def start_portal(directory: Path, seed: str = SEED, **options: Any) -> Portal:
    """A portal on a free port of the loopback interface."""
    (directory / "portal.toml").write_text(seed)
    clock = Clock()
    service = PortalService(
        reactor,
        listen=SocketAddress("127.0.0.1", 0),
        seed_path=str(directory / "portal.toml"),
        database=str(directory / "portal.sqlite3"),
        now=clock.now,
        utc_now=clock.utc_now,
        **options,
    )
    service.startService()
    port: Any = await service.ready
    return Portal(service, directory, SocketAddress("127.0.0.1", port.getHost().port), clock)


async def stop_portal(portal: Portal) -> None:
    for peer in portal.peers:
        peer.abort()
    await portal.service.stopService()
    await until(lambda: all(peer.closed_with is not None for peer in portal.peers))


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until the condition holds. Fails after `seconds`."""
    deadline = boottime() + seconds
    while not condition():
        assert boottime() < deadline, "it did not come true in time"
        await deferLater(reactor, 0.005, lambda: None)


class Refusal(Exception):
    """The portal's HTTP answer instead of a WebSocket."""

    def __init__(self, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        super().__init__(lines[0])
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self.body = body
        self.problem = json.loads(body) if self.headers.get("content-type") == "application/problem+json" else None


class Peer:
    """A WebSocket that speaks Phoenix's object form and keeps the frames that it receives, by event."""

    def __init__(self, protocol: _PeerProtocol) -> None:
        self.topic = ""
        self.init: Any = None
        self.frames: list[dict[str, Any]] = []
        self.closed_with: int | None = None
        self._protocol = protocol
        self._references = itertools.count()
        self._waiting: list[tuple[str, Deferred[Any]]] = []
        protocol.peer = self

    @classmethod
    async def open(
        cls, address: SocketAddress, path: str, agent: str, headers: dict[str, str], endpoint: Any = None
    ) -> Peer:
        """
        Raises: Refusal.
        """
        factory = WebSocketClientFactory(f"ws://{address}{path}", useragent=agent or None, headers=headers)
        factory.protocol = _PeerProtocol
        endpoint = endpoint or TCP4ClientEndpoint(reactor, address.host, address.port)
        protocol: Any = await endpoint.connect(factory)
        protocol = getattr(protocol, "wrappedProtocol", protocol)
        peer = cls(protocol)
        await protocol.opened
        return peer

    def send(self, event: str, payload: Any, *, topic: str | None = None) -> int:
        reference = next(self._references)
        self.send_frame({"topic": topic or self.topic, "event": event, "payload": payload, "ref": reference})
        return reference

    def send_frame(self, frame: dict[str, Any]) -> None:
        self.send_text(json.dumps(frame))

    def send_text(self, text: str) -> None:
        self._protocol.sendMessage(text.encode())

    async def receive(self, event: str, seconds: float = 5.0) -> Any:
        """The payload of the next frame of this event, which is then taken out."""
        return (await self.receive_frame(event, seconds))["payload"]

    async def receive_frame(self, event: str, seconds: float = 5.0) -> dict[str, Any]:
        await until(lambda: any(frame["event"] == event for frame in self.frames), seconds)
        number = next(place for place, frame in enumerate(self.frames) if frame["event"] == event)
        return self.frames.pop(number)

    async def settle(self) -> list[str]:
        """The frames that were received and not taken, by event, once the portal has handled every sent frame."""
        reference = self.send("heartbeat", {}, topic="phoenix")
        await until(lambda: any(frame["ref"] == reference for frame in self.frames))
        self.frames = [frame for frame in self.frames if frame["ref"] != reference]
        return [frame["event"] for frame in self.frames]

    async def closed(self) -> int:
        """The code of the Close frame that the portal sent."""
        await until(lambda: self.closed_with is not None)
        assert self.closed_with is not None
        return self.closed_with

    def stop_reading(self) -> None:
        self._protocol.transport.pauseProducing()

    def start_reading(self) -> None:
        self._protocol.transport.resumeProducing()

    def abort(self) -> None:
        self._protocol.dropConnection(abort=True)


class _PeerProtocol(WebSocketClientProtocol):  # type: ignore[misc]  # Autobahn has no types
    peer: Peer | None = None

    def __init__(self) -> None:
        super().__init__()
        self.opened: Deferred[None] = Deferred()
        self._answer = b""

    def onOpen(self) -> None:
        self.transport.setTcpNoDelay(True)
        self.opened.callback(None)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        assert self.peer is not None
        self.peer.frames.append(json.loads(payload))

    def failHandshake(self, reason: str) -> None:
        self._answer = self._answer or self.data or b""

    def processHandshake(self) -> None:
        self._answer = self.data
        if self.data.startswith(b"HTTP/1.1 101"):
            super().processHandshake()

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        if self.peer is not None:
            self.peer.closed_with = self.remoteCloseCode or 1006
        if not self.opened.called:
            self.opened.errback(Refusal(self._answer) if self._answer else ConnectionError("closed without an answer"))


async def http(address: SocketAddress, request: str) -> Refusal:
    """The answer to a plain HTTP request, until the portal closes the connection."""
    protocol = await connectProtocol(TCP4ClientEndpoint(reactor, address.host, address.port), Collector())
    protocol.transport.write(request.replace("\n", "\r\n").encode())
    return Refusal(await protocol.finished)


class Collector(Protocol):
    def __init__(self) -> None:
        self.finished: Deferred[bytes] = Deferred()
        self._data = b""

    def dataReceived(self, data: bytes) -> None:
        self._data += data

    def connectionLost(self, reason: Any = None) -> None:
        self.finished.callback(self._data)


def recorded(path: Path) -> Iterator[dict[str, Any]]:
    """The portal's rows of a recorded session."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["at"] == "portal":
            yield row

"""A portal without a reactor: the real hub and store, peers that send frames, and every answer checked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast
from zoneinfo import ZoneInfo

import attrs
from twisted.internet.defer import Deferred, fail, succeed

from firezone_tunnel.apps.portal.hub import Hub
from firezone_tunnel.apps.portal.state import PortalState
from firezone_tunnel.apps.portal.store import Store
from firezone_tunnel.apps.portal.websocket_connection import WebSocketConnection
from firezone_tunnel.core.portal.account import Account
from firezone_tunnel.core.portal.admission import Refused, UpgradeRequest
from firezone_tunnel.core.portal.flows import FlowAuthorizer
from firezone_tunnel.core.portal.seed import SeedContext, parse_seed
from firezone_tunnel.errors import PlatformError
from tests.unit.apps.portal.message_table import MessageTable, Receiver, Violation

TOKENS = {role: f"{role}-token" for role in ("client", "gateway", "relay")}
UTC_NOW = 1_790_000_000

_AGENTS = {
    ("client", 1): "Debian/12.0.0 connlib/1.5.3 (x86_64; 6.18.44)",
    ("client", 2): "Debian/12.0.0 headless-client/1.5.12 (x86_64; 6.18.44)",
    ("gateway", 1): "Debian/12.0.0 connlib/1.4.16 (x86_64; 6.18.44)",
    ("gateway", 2): "Debian/12.0.0 gateway/1.6.1 (x86_64; 6.18.44)",
    ("relay", 1): "relay/0.1.0",
    ("relay", 2): "Debian/12.0.0 relay/0.1.0 (x86_64; 6.18.44)",
}
OURS = "Linux/6.18 connlib/1.5.12 (x86_64; firezone_tunnel/0.1.0)"

_T = TypeVar("_T")


class SynchronousStore(Store):
    """The store, with its work done in the calling thread. `is_broken`: every call fails."""

    is_broken = False

    def _in_thread(self, work: Callable[[], _T]) -> Deferred[_T]:
        return fail(PlatformError("the disk is full")) if self.is_broken else succeed(work())


@attrs.define(eq=False)
class Peer:
    """A peer's end of a WebSocket. `frames` are those that it received, in object form."""

    world: World
    receiver: Receiver
    is_array: bool = False
    frames: list[dict[str, Any]] = attrs.Factory(list)
    is_closed: bool = False
    connection: WebSocketConnection | None = None
    _references: int = 0

    def send(self, text: bytes) -> None:
        """A frame from the portal; implements `WebSocket`."""
        frame = json.loads(text)
        if self.is_array:
            _, ref, topic, event, payload = frame
            frame = {"topic": topic, "event": event, "payload": payload, "ref": ref}
        self.frames.append(frame)
        self.world.crashes += frame["event"] == "phx_error"
        try:
            self.world.table.check_frame(frame, self.receiver)
        except Violation as violation:
            self.world.violations.append(f"{self.receiver}: {violation}")

    def close(self, *, is_failure: bool = False) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.world.peers.remove(self)
            assert self.connection is not None
            self.connection.lost()

    def pause_reading(self, *, paused: bool) -> None:
        """Nothing is read: each frame is handled at once."""

    def say(self, event: str, payload: Any, *, topic: str | None = None) -> None:
        """Send a frame to the portal, which handles it before this returns."""
        if self.is_closed:
            return
        self._references += 1
        topic = topic or self.receiver.role
        frame: Any = {"topic": topic, "event": event, "payload": payload, "ref": self._references}
        if self.is_array:
            frame = ["1", str(self._references), topic, event, payload]
        assert self.connection is not None
        self.connection.text_received(json.dumps(frame))

    def received(self, *events: str) -> list[Any]:
        """The payloads of these events, oldest first."""
        return [frame["payload"] for frame in self.frames if frame["event"] in events]


class World:
    """One portal, whose clocks the test moves."""

    def __init__(self, directory: Path, table: MessageTable, seed: str, *, entropy: int = 0) -> None:
        self.table = table
        self.violations: list[str] = []
        self.crashes = 0
        self.peers: list[Peer] = []
        self.elapsed = 0.0
        self.refused: list[Refused] = []
        stream = random.Random(entropy).randbytes
        self.store = SynchronousStore(cast(Any, None), str(directory / "portal.sqlite3"), stream)
        self.store._in_thread(self.store._open)
        flows = FlowAuthorizer(reference_key=b"r" * 32, ingest_key=b"i" * 32, entropy=stream)
        self.state = PortalState(
            account(seed), self.store, flows, stream, lambda: self.elapsed, lambda: UTC_NOW + self.elapsed
        )
        self.hub = Hub(self.state, lambda: None)

    def close(self) -> None:
        for peer in list(self.peers):
            peer.close()
        self.store._in_thread(self.store._close)

    def connect(
        self,
        role: str,
        *,
        v2: bool = False,
        agent: str | None = None,
        is_array: bool = False,
        path: str | None = None,
        **parameters: str,
    ) -> Peer | None:
        """Open a WebSocket, without joining. None if the portal refuses it."""
        generation = 2 if v2 else 1
        agent = agent or _AGENTS[role, generation]
        version = "v2/" if v2 and role != "relay" else ""
        defaults = {"token": TOKENS[role], "external_id": f"{role}-1", "public_key": "A" * 43 + "="}
        if role == "relay":
            defaults = {"token": TOKENS[role], "ipv4": "198.51.100.10"}
        query = defaults | parameters | ({"vsn": "2.0.0"} if is_array else {})
        request = UpgradeRequest(
            path or f"/{role}/{version}websocket",
            {name: [value] for name, value in query.items()},
            {"user-agent": agent},
            "192.0.2.7",
        )
        receiver = Receiver(role, generation, is_ours="firezone_tunnel/" in agent)
        try:
            registered = run(self.hub.register(request))
        except Refused as refused:
            self.refused.append(refused)
            try:
                self.table.check(refused.document(), "Refusal", receiver, "refusal")
            except Violation as violation:
                self.violations.append(f"{receiver}: {violation}")
            return None
        peer = Peer(self, receiver, is_array)
        self.peers.append(peer)
        peer.connection = self.hub.open(registered, peer)
        return peer

    def join(self, role: str, *, stamp_secret: str = "0" * 64, **options: Any) -> Peer | None:
        """Connect and join."""
        peer = self.connect(role, **options)
        if peer is not None:
            peer.say("phx_join", {"stamp_secret": stamp_secret} if role == "relay" else None)
        return peer

    def reload(self, seed: str) -> None:
        run(self.hub.apply(account(seed)))

    def advance(self, seconds: float) -> None:
        """Let time pass, with every deadline on the way."""
        end = self.elapsed + seconds
        while (due := self.hub.next_timeout().at) <= end:
            self.elapsed = max(self.elapsed, due)
            run(self.hub.handle_timeout(self.elapsed))
        self.elapsed = end

    def client_id(self, external_id: str = "client-1") -> str:
        """The id of a connected client."""
        return next(
            one.device.id for one in self.state.presence.all() if one.device.identity.external_id == external_id
        )


def account(seed: str) -> Account:
    """Read a seed file.

    Raises: ConfigurationError.
    """
    return parse_seed(seed, SeedContext(lambda name: name, ZoneInfo)).account


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that has nothing to wait for. Raises its exception."""
    results: list[Any] = []
    Deferred.fromCoroutine(work).addBoth(results.append)
    (result,) = results
    if hasattr(result, "raiseException"):
        result.raiseException()
    return cast(_T, result)

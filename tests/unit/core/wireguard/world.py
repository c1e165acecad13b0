"""Two peers on a network without delay: what the tests of handshakes and timers run in."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from itertools import count

from cryptography.exceptions import InvalidTag

from firezone_tunnel.core.sansio import Entropy, SocketAddress
from firezone_tunnel.core.wireguard.cookie import HANDSHAKES_PER_SECOND, CookieChecker, MacStamp
from firezone_tunnel.core.wireguard.handshake import HandshakeInitiation, HandshakeResponse, StaticKey, parse
from firezone_tunnel.core.wireguard.peer import Expired, Peer, SessionEstablished
from firezone_tunnel.core.wireguard.session import Session
from firezone_tunnel.core.wireguard.transport_data import seal_message

INITIATION, RESPONSE, COOKIE, DATA = 1, 2, 3, 4
UTC = 1_790_000_000.0


class World:
    """Two hosts, a network without delay that may lose messages, and a clock."""

    def __init__(self, *, preshared_key: bytes = bytes(32)) -> None:
        self.now = 0.0
        self.utc_offset = UTC
        self.lose: Callable[[Host, int], bool] = nothing
        self.log: list[tuple[float, str, int]] = []
        self.datagrams: list[bytes] = []
        keys = StaticKey(b"\1" * 32), StaticKey(b"\2" * 32)
        self.client = Host(self, "client", keys[0], keys[1].public, preshared_key)
        self.gateway = Host(self, "gateway", keys[1], keys[0].public, preshared_key)

    def connect(self) -> None:
        self.client.initiate()
        self.settle()

    def settle(self) -> None:
        """Deliver messages until none is left."""
        for _ in range(50):
            if not (self.client.flush() | self.gateway.flush()):
                return
        raise AssertionError("the two sides never stop talking")

    def advance(self, until: float) -> None:
        self.now = until

    def run_until(self, until: float) -> None:
        """Call each side's timers exactly when they are due."""
        self.settle()
        for _ in range(20_000):
            due = [host for host in (self.client, self.gateway) if host.due_at() <= max(until, self.now)]
            if not due:
                self.now = max(self.now, until)
                return
            host = min(due, key=Host.due_at)
            self.now = max(self.now, host.due_at())
            host.handle_timeout()
            assert host.due_at() > self.now, "handle_timeout left something due"
            self.settle()
        raise AssertionError("timers storm")

    def exchange_every_second(self, *, until: float) -> None:
        while self.now < until:
            self.run_until(self.now + 1.0)
            self.client.send(b"ping")
            self.settle()
            self.gateway.send(b"pong")
            self.settle()

    def assert_traffic_flows(self) -> None:
        for sender, receiver in ((self.client, self.gateway), (self.gateway, self.client)):
            sender.send(b"are you there?")
            self.settle()
            assert receiver.received[-1:] == [b"are you there?"]

    def times(self, kind: int) -> list[float]:
        return [at for at, _, logged in self.log if logged == kind]

    def initiations(self) -> int:
        return len(self.times(INITIATION))


class Host:
    def __init__(
        self, world: World, name: str, local: StaticKey, remote_public_key: bytes, preshared_key: bytes
    ) -> None:
        self.world = world
        self.name = name
        self.local = local
        self.entropy = stream(name)
        self.checker = CookieChecker(local, self.entropy)
        self.address = SocketAddress("192.0.2.1" if name == "client" else "192.0.2.2", 52625)
        self.indices: set[int] = set()
        self.received: list[bytes] = []
        self.events: list[SessionEstablished | Expired] = []
        self.expired_at: list[float] = []
        self._numbers = count(1)
        self._waiting: list[bytes] = []
        self._replies: list[bytes] = []
        self._sealed: list[bytes] = []
        self._vanished = False
        self._remote_public_key = remote_public_key
        self._preshared_key = preshared_key
        self.peer = self._make_peer()

    def _make_peer(self, rekey_attempt_time: float = 15.0) -> Peer:
        return Peer(
            local=self.local,
            remote_public_key=self._remote_public_key,
            preshared_key=self._preshared_key,
            allocate_index=self._allocate,
            release_index=self.indices.remove,
            entropy=self.entropy,
            now=self.world.now,
            rekey_attempt_time=rekey_attempt_time,
        )

    def replace_peer(
        self,
        *,
        rekey_attempt_time: float = 15.0,
        remote_public_key: bytes | None = None,
        preshared_key: bytes | None = None,
    ) -> None:
        """A new peer. Given keys replace the default keys."""
        self._remote_public_key = remote_public_key or self._remote_public_key
        self._preshared_key = preshared_key or self._preshared_key
        self.peer = self._make_peer(rekey_attempt_time)

    def vanish(self) -> None:
        self._vanished = True

    def initiate(self) -> None:
        self.peer.initiate(self.world.now, self.world.now + self.world.utc_offset)

    def handle_timeout(self) -> None:
        self.peer.handle_timeout(self.world.now, self.world.now + self.world.utc_offset)

    def due_at(self) -> float:
        timeout = None if self._vanished else self.peer.next_timeout()
        return float("inf") if timeout is None else timeout.at

    def retry_at(self) -> float:
        timeout = self.peer.next_timeout()
        assert timeout is not None
        assert timeout.reason == "initiation to repeat"
        return timeout.at

    def flood(self) -> None:
        """Receive so many handshakes of others that this second counts as load."""
        body = b"\1\0\0\0" + bytes(112)
        stamp = MacStamp(self.local.public)
        for _ in range(HANDSHAKES_PER_SECOND):
            self.checker.admit(stamp.finish(body, 0.0), SocketAddress("198.51.100.1", 1), self.world.now)

    def send(self, packet: bytes) -> None:
        self._waiting.append(packet)
        self._encapsulate()

    def seal(self, packet: bytes) -> bytes:
        session = self.peer.sending_session(self.world.now)
        assert session is not None
        return seal_message(session.seal_cipher, session.peer_index, session.take_counters(1), packet)

    def only_session(self) -> Session:
        (index,) = self.indices
        session = self.peer.receiving_session(index, self.world.now)
        assert session is not None
        return session

    def flush(self) -> bool:
        """Deliver everything queued to the other side. Returns False if nothing was queued."""
        self.handle_due_initiation()
        other = self.world.gateway if self is self.world.client else self.world.client
        sent = False
        for datagram in list(self._outgoing()):
            sent = True
            self.world.log.append((self.world.now, self.name, datagram[0]))
            self.world.datagrams.append(datagram)
            if not self.world.lose(self, datagram[0]):
                other.handle(datagram)
        return sent

    def handle_due_initiation(self) -> None:
        if self.due_at() <= self.world.now:
            self.handle_timeout()

    def handle(self, datagram: bytes) -> None:
        if self._vanished:
            return
        if datagram[0] == DATA:
            self._handle_data(datagram)
            return
        other = self.world.gateway if self is self.world.client else self.world.client
        match self.checker.admit(datagram, other.address, self.world.now):
            case bytes() as reply:
                self._replies.append(reply)
            case HandshakeInitiation() as message:
                self.peer.handle_initiation(message, self.world.now)
            case HandshakeResponse() as message:
                self.peer.handle_response(message, self.world.now)
            case None:
                raise AssertionError("a message of the other side was turned away")
            case reply:
                self.peer.handle_cookie_reply(reply, self.world.now)
        self._collect_events()

    def _handle_data(self, datagram: bytes) -> None:
        index, counter = struct.unpack_from("<IQ", datagram, 4)
        session = self.peer.receiving_session(index, self.world.now)
        if session is None:
            return
        try:
            packet = session.open_cipher.decrypt(struct.pack("<4xQ", counter), datagram[16:], None)
        except InvalidTag:
            raise AssertionError("a data message of the other side is not authentic") from None
        if session.accept([counter], [True]).all():
            self.peer.received_data(session, len(packet), self.world.now)
            if packet:
                self.received.append(packet)
        self._collect_events()

    def _outgoing(self) -> Iterator[bytes]:
        self._collect_events()
        if self._vanished:
            return
        yield from self.peer.transmits()
        yield from self._replies
        self._replies = []
        yield from self._sealed
        self._sealed = []

    def _encapsulate(self) -> None:
        while self._waiting and (session := self.peer.sending_session(self.world.now)):
            datagram = seal_message(
                session.seal_cipher, session.peer_index, session.take_counters(1), self._waiting.pop(0)
            )
            self._sealed.append(datagram)
            self.peer.sent_data(session, 1, self.world.now)

    def _collect_events(self) -> None:
        for event in self.peer.events():
            self.events.append(event)
            if isinstance(event, Expired):
                self.expired_at.append(self.world.now)
            else:
                self._encapsulate()

    def _allocate(self, peer: Peer) -> int:
        index = next(self._numbers)
        self.indices.add(index)
        return index


def nothing(sender: Host, kind: int) -> bool:
    return False


def everything(sender: Host, kind: int) -> bool:
    return True


def initiation_from(local: StaticKey, remote: StaticKey, utc_now: float = UTC) -> HandshakeInitiation:
    peer = Peer(
        local=StaticKey(bytes(local.private)),
        remote_public_key=remote.public,
        preshared_key=bytes(32),
        allocate_index=lambda peer: 99,
        release_index=lambda index: None,
        entropy=stream("initiation"),
        now=0.0,
    )
    peer.initiate(0.0, utc_now)
    message = parse(next(peer.transmits()))
    assert isinstance(message, HandshakeInitiation)
    return message


def stream(name: str) -> Entropy:
    """Deterministic random bytes."""
    calls = count()
    return lambda size: hashlib.shake_256(f"{name} {next(calls)}".encode()).digest(size)

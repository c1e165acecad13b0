"""An allocation under test, with its clock, its requests and events, and a relay that answers on demand."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from firezone_tunnel.core.ice.candidate import CandidateKind
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Attribute, ErrorCode, Kind, Message, Method, long_term_key
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.events import AllocationEvent, CandidateFound, CandidateLost, Failed, FailureReason
from firezone_tunnel.core.turn.state import State

RELAY4, RELAY6 = SocketAddress("198.51.100.1", 3478), SocketAddress("2001:db8:51::1", 3478)
LOCAL4, LOCAL6 = SocketAddress("192.0.2.20", 52625), SocketAddress("2001:db8:2::20", 52625)
MAPPED4, MAPPED6 = SocketAddress("203.0.113.20", 40000), SocketAddress("2001:db8:2::20", 52625)
RELAYED4, RELAYED6 = SocketAddress("198.51.100.1", 50000), SocketAddress("2001:db8:51::1", 50000)
PEER4, OTHER4 = SocketAddress("203.0.113.99", 52625), SocketAddress("203.0.113.98", 52625)
PEER6 = SocketAddress("2001:db8:99::1", 52625)
USERNAME, PASSWORD = "2145916800:salt", "secret"
KEY = long_term_key(USERNAME, "firezone", PASSWORD)
START = 1000.0


class Sent(NamedTuple):
    at: float
    destination: SocketAddress
    message: Message

    @property
    def names(self) -> list[str]:
        """The names of its attributes in order, including MESSAGE-INTEGRITY."""
        names = [attribute.name for attribute, _ in self.message.attributes]
        return [*names, "MESSAGE-INTEGRITY"] if self.message.has_integrity else names


class Client:
    def __init__(
        self,
        *,
        ipv4: SocketAddress | None = RELAY4,
        ipv6: SocketAddress | None = RELAY6,
        realm: str | None = "firezone",
    ) -> None:
        self.now = START
        self.sent: list[Sent] = []
        """Every datagram so far; `take` empties it."""
        self.events: list[AllocationEvent] = []
        self.answers_keepalives = True
        """The relay answers keepalives at once, and `sent` leaves them out."""
        self._entropy = _Stream()
        self.allocation = Allocation(
            "relay",
            ipv4=ipv4,
            ipv6=ipv6,
            username=USERNAME,
            password=PASSWORD,
            realm=realm,
            entropy=self._entropy,
            now=self.now,
        )
        self._drain()

    def take(self, method: Method | None = None) -> list[Sent]:
        """The messages sent since the last call. With a method, only requests of that method."""
        taken, self.sent = self.sent, []
        return [sent for sent in taken if method is None or sent.message.method == method]

    def take_one(self, method: Method) -> Message:
        """The only datagram that was sent since the last call."""
        (sent,) = self.take()
        assert sent.message.method == method
        return sent.message

    def take_events(self) -> list[AllocationEvent]:
        taken, self.events = self.events, []
        return taken

    def changes(self) -> list[tuple[str, CandidateKind | FailureReason, SocketAddress | None]]:
        """The events since the last call, in short form."""
        lines: list[tuple[str, CandidateKind | FailureReason, SocketAddress | None]] = []
        for event in self.take_events():
            match event:
                case CandidateFound(candidate):
                    lines.append(("found", candidate.kind, candidate.address))
                case CandidateLost(candidate):
                    lines.append(("lost", candidate.kind, candidate.address))
                case Failed(reason):
                    lines.append(("failed", reason, None))
        return lines

    def run_until(self, now: float) -> None:
        """Let time pass, in seconds since the start; every timer is served when it is due."""
        end = START + now
        while (timeout := self.allocation.next_timeout()) is not None and timeout.at <= end:
            assert timeout.at >= self.now, "a deadline in the past"
            progress = len(self.sent) + len(self.events), self.allocation.next_timeout()
            self.now = timeout.at
            self.allocation.handle_timeout(self.now)
            self._drain()
            assert (len(self.sent) + len(self.events), self.allocation.next_timeout()) != progress, timeout
        self.now = max(self.now, end)

    def run_for(self, seconds: float) -> None:
        self.run_until(self.now - START + seconds)

    def sleep_until(self, now: float) -> None:
        """The machine sleeps: timers are late."""
        self.now = START + now
        self.allocation.handle_timeout(self.now)
        self._drain()

    def answer(
        self,
        request: Message,
        *attributes: tuple[Attribute[Any], Any],
        error: int | None = None,
        key: bytes | None = KEY,
        source: SocketAddress = RELAY4,
        local: SocketAddress | None = None,
    ) -> bool:
        """Let the relay answer a request; `key` None leaves the answer unsigned."""
        if error is not None:
            attributes = ((stun.ERROR_CODE, ErrorCode(error)), *attributes)
        kind = Kind.SUCCESS if error is None else Kind.ERROR
        message = Message(request.method, kind, request.transaction_id, attributes)
        datagram = message.encode(key=None if request.method == Method.BINDING else key)
        parsed = stun.parse(datagram)
        assert parsed is not None
        local = local or (LOCAL6 if source.is_ipv6 else LOCAL4)
        handled = self.allocation.handle_message(parsed, source, local, self.now)
        self._drain()
        return handled

    def bind(self, *peers: SocketAddress) -> None:
        for peer in peers:
            self.allocation.bind_channel(peer, self.now)
        self._drain()

    def refresh(self) -> None:
        self.allocation.refresh(self.now)
        self._drain()

    def probe(self) -> None:
        self.allocation.probe(self.now)
        self._drain()

    def restart(self) -> None:
        self.allocation.restart(self.now)
        self._drain()

    def answer_binding(self, *, ipv6: bool = False, mapped: SocketAddress | None = None) -> None:
        """Answer the BINDING of that family that was sent last."""
        source = RELAY6 if ipv6 else RELAY4
        request = [sent.message for sent in self.take(Method.BINDING) if sent.destination == source][-1]
        mapped = mapped or (MAPPED6 if ipv6 else MAPPED4)
        assert self.answer(request, (stun.XOR_MAPPED_ADDRESS, mapped), source=source)

    def challenge(self, request: Message, *, nonce: str = "nonce", error: int = 401, key: bytes | None = KEY) -> None:
        assert self.answer(request, (stun.REALM, "firezone"), (stun.NONCE, nonce), error=error, key=key)

    def grant(self, request: Message, *relayed: SocketAddress, lifetime: int = 600) -> None:
        addresses = [(stun.XOR_RELAYED_ADDRESS, address) for address in relayed or (RELAYED4, RELAYED6)]
        assert self.answer(request, *addresses, (stun.LIFETIME, lifetime))

    def _drain(self) -> None:
        for transmit in self.allocation.transmits():
            is_active = transmit.destination == self.allocation.active_socket
            assert transmit.source == (self.allocation.active_source if is_active else None)
            message = stun.parse(transmit.payload)
            assert message is not None
            sent = Sent(self.now - START, transmit.destination, message)
            if self.answers_keepalives and self._is_keepalive(sent):
                mapped = MAPPED6 if sent.destination.is_ipv6 else MAPPED4
                assert self.answer(message, (stun.XOR_MAPPED_ADDRESS, mapped), source=sent.destination)
            else:
                self.sent.append(sent)
        self.events += self.allocation.events()

    def _is_keepalive(self, sent: Sent) -> bool:
        kept_alive = self.allocation.state is State.ALLOCATED and sent.destination == self.allocation.active_socket
        return kept_alive and sent.message.method == Method.BINDING


def reach_allocate(**options: Any) -> tuple[Client, Message]:
    """A client whose relay answered over IPv4, and its first ALLOCATE."""
    client = Client(**options)
    client.answer_binding()
    return client, client.take_one(Method.ALLOCATE)


def allocated(*relayed: SocketAddress, lifetime: int = 600) -> Client:
    """A client with an allocation at an IPv4 relay; all requests and events so far are taken."""
    client, request = reach_allocate(ipv6=None)
    client.challenge(request)
    client.grant(client.take_one(Method.ALLOCATE), *relayed, lifetime=lifetime)
    client.take_events()
    return client


def bound(*peers: SocketAddress) -> Client:
    """A client with confirmed channels to these peers, from 0x4000 on."""
    client = allocated()
    client.bind(*peers)
    for sent in client.take(Method.CHANNEL_BIND):
        assert client.answer(sent.message)
    return client


class _Stream:
    """Different bytes in each call, the same in each run."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, size: int) -> bytes:
        self._calls += 1
        return hashlib.shake_128(self._calls.to_bytes(8, "big")).digest(size)

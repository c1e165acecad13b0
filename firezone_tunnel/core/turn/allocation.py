"""One relay, as its client sees it: which candidates it gives us, and the channels through it.

Sources: docs/protocol/data-plane.md, 3 and 12.4; RFC 8656. Differences to upstream are named where they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from firezone_tunnel.core.ice.candidate import Candidate, is_usable
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout, Transmit, earliest
from firezone_tunnel.core.stun.message import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    ERROR_CODE,
    FAMILY_IPV6,
    FIREZONE_REALM,
    LIFETIME,
    REQUESTED_TRANSPORT,
    SOFTWARE,
    TRANSACTION_ID_SIZE,
    UDP,
    XOR_MAPPED_ADDRESS,
    XOR_PEER_ADDRESS,
    XOR_RELAYED_ADDRESS,
    Attribute,
    Kind,
    Message,
    Method,
)
from firezone_tunnel.core.stun.transaction import BACKOFF, Transactions
from firezone_tunnel.core.turn.channel import ChannelBindings
from firezone_tunnel.core.turn.credentials import LongTermCredentials
from firezone_tunnel.core.turn.events import (
    AllocationCounters,
    AllocationEvent,
    CandidateFound,
    CandidateLost,
    Failed,
    FailureReason,
)
from firezone_tunnel.core.turn.request import Request

KEEPALIVE_INTERVAL = 25.0  # docs/protocol/data-plane.md, 3.6
PROBE = (1.0,)  # docs/protocol/data-plane.md, 3.6: a proactive REFRESH is sent once and has a second to be answered
DEFAULT_LIFETIME = 600  # RFC 8656, section 3.2; for a relay that doesn't say
MAX_BUFFERED_PEERS = 100  # docs/protocol/data-plane.md, 3.1
MAX_CHALLENGES = 3  # a relay that finds every nonce stale gets the next transmission when it is due, not at once
MAX_MISMATCHES = 4  # in a row: a relay that denies what it has just granted is left alone

_SOFTWARE: tuple[Attribute[Any], Any] = (SOFTWARE, "firezone_tunnel")


class Allocation:
    """Relayed addresses at one relay, kept alive until it fails, is closed, or the relay goes silent.

    Feed it messages that came from the relay's `sockets`, and time; drain `transmits` and `events` after each. After
    a `Failed` event it does nothing any more.
    """

    def __init__(
        self,
        rid: str,
        *,
        ipv4: SocketAddress | None,
        ipv6: SocketAddress | None,
        username: str,
        password: str,
        realm: str | None = FIREZONE_REALM,
        entropy: Entropy,
        now: float,
        counters: AllocationCounters | None = None,
    ) -> None:
        """A `realm` of None is for a standard TURN server, whose first challenge names it. Allocations may share
        `counters`; without any it has its own.

        Raises: ValueError, without any address, or if no message could carry the credentials.
        """
        self.rid = rid
        self.sockets = tuple(address for address in (ipv4, ipv6) if address is not None)
        if not self.sockets:
            raise ValueError(f"relay {rid} has no address")
        self.credentials = LongTermCredentials(username, password, realm)
        self.counters = counters or AllocationCounters()
        self._entropy = entropy
        self._transmits: deque[Transmit] = deque()
        self._events: deque[AllocationEvent] = deque()
        self._transactions: Transactions[Request] = Transactions()
        self._channels = ChannelBindings()
        self._waiting_peers: dict[SocketAddress, None] = {}
        self._observed: dict[tuple[str, bool], Candidate] = {}
        self._grant: _Grant | None = None
        self._active: SocketAddress | None = None
        self._refresh_at: float | None = None
        self._keepalive_at = now
        self._mismatches = 0
        self._expects_unsigned = realm is None
        self._distrusted = False
        self._ended = False
        self._now = now
        self._begin(now)

    @property
    def active_socket(self) -> SocketAddress | None:
        """The relay's address that we talk to: that which answered first."""
        return self._active

    @property
    def has_allocation(self) -> bool:
        return self._grant is not None

    @property
    def is_suspended(self) -> bool:
        """The relay answers, but grants nothing, and isn't being asked: `refresh` or `restart` lead out of this."""
        if self._grant is not None or self._active is None:
            return False
        return all(request.method == Method.BINDING for request in self._transactions)

    @property
    def has_transmits(self) -> bool:
        """Whether there is something to be sent: most channel data needs no request before it."""
        return bool(self._transmits)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What to offer to a new peer: host and reflexive candidates, then relayed ones."""
        return (*self._observed.values(), *(self._grant.candidates if self._grant else ()))

    def relayed(self, is_ipv6: bool) -> SocketAddress | None:
        """Our address of that family at the relay."""
        if self._grant is not None:
            for candidate in self._grant.candidates:
                if candidate.address.is_ipv6 == is_ipv6:
                    return candidate.address
        return None

    def channel_to(self, peer: SocketAddress, now: float) -> int | None:
        """The channel number to send to this peer on; None where `bind_channel` has to come first."""
        return self._channels.channel_to(peer, now)

    def channel_for(self, peer: SocketAddress, now: float) -> int | None:
        """The channel number to send to this peer on, right now; one that isn't there is asked for.

        Whoever sends on it lets what `transmits` has go first. None where there is no way to that peer.
        """
        channel = self._channels.channel_to(peer, now)
        if channel is None:
            self.bind_channel(peer, now)
            channel = self._channels.channel_to(peer, now)
        if channel is not None:
            self.sent_channel_data(now)
        return channel

    def peer_of(self, channel: int, now: float) -> SocketAddress | None:
        """Data arrived on this channel: who sent it? None for a channel that the relay has not confirmed."""
        return self._channels.received(channel, now)

    def sent_channel_data(self, now: float) -> None:
        """Channel data left for the relay: no keepalive is needed for a while."""
        self._keepalive_at = now + KEEPALIVE_INTERVAL

    def bind_channel(self, peer: SocketAddress, now: float) -> None:
        """Ask for a channel to this peer, as soon as there is an allocation; does nothing where one is asked for."""
        self._now = now
        if self._ended or self.is_suspended:
            self.counters.binds_refused += 1
        elif self._grant is None:
            self._queue(peer)
        elif self.relayed(peer.is_ipv6) is None:
            self.counters.binds_refused += 1
        else:
            number = self._channels.bind(peer, now)
            if number is not None:
                self._request_channel(number, peer)

    def refresh(self, now: float) -> None:
        """Find out within a second whether the relay still knows us; a suspended allocation begins anew."""
        self._now = now
        if self.is_suspended:
            self._begin(now)
        elif self._grant is not None:
            self._start_refresh(PROBE)

    def verify(self, now: float) -> None:
        """Find out whether the relay still knows us, with more patience than `refresh` has."""
        self._now = now
        if self._grant is not None:
            self._start_refresh(BACKOFF)

    def restart(self, now: float) -> None:
        """The network has changed, and our sockets with it: take back all candidates and begin anew."""
        if self._ended:
            return
        self._transmits.clear()
        self._lose(*self._observed.values())
        self._observed.clear()
        self._drop_grant()
        self._begin(now)

    def close(self) -> Transmit | None:
        """End it. Returns the datagram that tells the relay, where it has granted something."""
        self._transmits.clear()
        farewell = None
        if self._grant is not None and self._active is not None:
            request = Request(Method.REFRESH, self._active, (_SOFTWARE, (LIFETIME, 0)))
            farewell = Transmit(self._active, self._encode(request, self._entropy(TRANSACTION_ID_SIZE)))
        self._drop_grant()
        self._finish_all()
        self._active = None
        self._ended = True
        return farewell

    def transmits(self) -> Iterator[Transmit]:
        """Take what is to be sent; the system chooses the source."""
        while self._transmits:
            yield self._transmits.popleft()

    def events(self) -> Iterator[AllocationEvent]:
        """Take what happened since the last call, in order."""
        while self._events:
            yield self._events.popleft()

    def next_timeout(self) -> Timeout | None:
        """When something is due; never earlier than the time of the last call."""
        deadlines = [(self._transactions.next_due(), "turn:retransmission")]
        if self._grant is not None:
            deadlines += [
                (self._grant.expires_at, "turn:expiry"),
                (self._refresh_at, "turn:refresh"),
                (self._keepalive_at, "turn:keepalive"),
                (self._channels.next_refresh(), "turn:channel refresh"),
            ]
        return earliest(Timeout(max(at, self._now), reason) for at, reason in deadlines if at is not None)

    def handle_timeout(self, now: float) -> None:
        self._now = now
        if self._grant is not None and now >= self._grant.expires_at:
            self._drop_grant()
            self._finish_all()
        for request in self._transactions.due(now):
            if request in self._transactions:  # giving up on one may have ended others
                if request.is_exhausted:
                    self._give_up(request)
                else:
                    self._send(request)
        if self._grant is not None:
            self._maintain(now)
        self._settle()

    def handle_message(self, message: Message, source: SocketAddress, local: SocketAddress, now: float) -> bool:
        """Take a STUN message that came from `source` to our socket `local`.

        Returns whether it belongs to a request of ours, also where it wasn't believed.
        """
        request = self._transactions.waiting_for(message.transaction_id)
        if (
            request is None
            or message.kind not in {Kind.SUCCESS, Kind.ERROR}
            or (message.method, source) != (request.method, request.destination)
            or local.is_ipv6 != source.is_ipv6
        ):
            self.counters.unexpected += 1
            return False
        self._now = now
        if message.method == Method.BINDING:
            self._handle_binding(request, message, local)
        elif self.credentials.key is not None and message.is_authentic(self.credentials.key):
            self._handle_authentic(request, message)
        elif not self._handle_unsigned(request, message):
            # It stays open: else anybody who sees our requests could end them. So wrong credentials look like silence.
            self.counters.unauthentic += 1
            self._distrusted = True
        self._settle()
        return True

    def _begin(self, now: float) -> None:
        """Ask all addresses of the relay at once which of them answers (docs/protocol/data-plane.md, 3.2)."""
        self._now = now
        self._active = None
        self._mismatches = 0
        self._distrusted = False
        self._finish_all()
        for address in self.sockets:
            self._send(Request(Method.BINDING, address, (_SOFTWARE,), is_signed=False))

    def _handle_binding(self, request: Request, message: Message, local: SocketAddress) -> None:
        """Nobody signs these: all that a forged one can do is to name a candidate that doesn't work."""
        mapped = message.get(XOR_MAPPED_ADDRESS)
        if message.kind is Kind.ERROR or mapped is None or mapped.is_ipv6 != local.is_ipv6:
            self.counters.unexpected += 1
            return
        self._finish(request)
        self._observe("host", Candidate.host(local))
        self._observe("reflexive", Candidate.server_reflexive(mapped, local))
        if self._active is None:
            self._active = request.destination
            self._keepalive_at = self._now + KEEPALIVE_INTERVAL
            self._allocate()

    def _handle_unsigned(self, request: Request, message: Message) -> bool:
        """A standard TURN server doesn't sign its challenges. Returns whether this is one that we can afford to follow.

        It may begin an attempt, and its nonce may be tried, but it ends nothing: the relay's own answer to what it
        claims to answer is still accepted, and what the relay says to that nonce proves nothing.
        """
        error = message.get(ERROR_CODE)
        if message.kind is not Kind.ERROR or message.has_integrity or error is None:
            return False
        if message.transaction_id != request.latest_id:
            return False
        if (
            error.code in {401, 438}
            and request.nonce is None
            and self._challenge(request, message, first=True, is_vouched=False)
        ):
            self._expects_unsigned = True
            return True
        if error.code == 438 and request.nonce is not None and (self._expects_unsigned or self._grant is None):
            return self._challenge(request, message, first=False, is_vouched=False)
        if error.code in {400, 401, 438} and request.is_signed and request.nonce is None:
            # coturn takes a request with credentials but without nonce for a bad one (docs/decisions.md, 4).
            request.is_signed = False
            request.start_over()
            self._send(request)
            return True
        may_be_standard = self._expects_unsigned or request.nonce is None
        if error.code == 437 and request.method == Method.ALLOCATE and may_be_standard:
            self._handle_mismatch(request)
            return True
        return False

    def _handle_authentic(self, request: Request, message: Message) -> None:
        error = message.get(ERROR_CODE)
        if message.kind is Kind.SUCCESS:
            # Upstream ignores answers to earlier transmissions; where one takes more than a second it never succeeds.
            self._finish(request)
            self._handle_success(request, message)
        elif error is None or message.transaction_id != request.latest_id:
            self.counters.unexpected += 1
        elif error.code == 401 and request.nonce is not None and request.nonce == self.credentials.vouched_nonce:
            self._fail(FailureReason.CREDENTIALS_REJECTED)
        elif error.code in {401, 438}:
            if not self._challenge(request, message, first=False, is_vouched=True):
                self.counters.unexpected += 1
        elif error.code == 420:
            self._fail(FailureReason.PROTOCOL)
        elif error.code == 437:
            self._handle_mismatch(request)
        else:
            self._finish(request)
            self._handle_refusal(request)

    def _handle_success(self, request: Request, message: Message) -> None:
        if request.method == Method.ALLOCATE:
            self._handle_allocated(message)
        elif request.method == Method.CHANNEL_BIND:
            self._mismatches = 0
            self._channels.confirm(request.channel, self._now)
        elif request.is_deletion:
            self._allocate(after_deletion=True)
        else:
            self._handle_refreshed(message)

    def _handle_allocated(self, message: Message) -> None:
        candidates: dict[bool, Candidate] = {}
        for address in message.get_all(XOR_RELAYED_ADDRESS):
            if is_usable(address) and self._active is not None:
                other_family = address.is_ipv6 != self._active.is_ipv6
                candidates.setdefault(address.is_ipv6, Candidate.relayed(address, other_family=other_family))
        lifetime = _lifetime(message)
        if not candidates or not lifetime:
            self.counters.unexpected += 1
            self._waiting_peers.clear()
            return
        self._grant = _Grant(tuple(candidates.values()), self._now + lifetime)
        self._refresh_at = self._now + lifetime / 2
        self._events.extend(CandidateFound(candidate) for candidate in self._grant.candidates)
        waiting = tuple(self._waiting_peers)
        self._waiting_peers.clear()
        for peer in waiting:
            self.bind_channel(peer, self._now)

    def _handle_refreshed(self, message: Message) -> None:
        if self._grant is None:
            return
        lifetime = _lifetime(message)
        if not lifetime:
            self._reallocate()
            return
        self._mismatches = 0
        self._grant = self._grant._replace(expires_at=self._now + lifetime)
        self._refresh_at = self._now + lifetime / 2

    def _challenge(self, request: Request, message: Message, *, first: bool, is_vouched: bool) -> bool:
        """Sign the request with what a 401 or 438 told us, and send it again."""
        if not self.credentials.take_challenge(message, first=first, is_vouched=is_vouched):
            return False
        request.is_signed = True
        request.challenges += 1
        if request.challenges <= MAX_CHALLENGES:
            request.start_over()
            self._send(request)
        return True

    def _handle_mismatch(self, request: Request) -> None:
        """437: what the relay knows of us is not what we know. Begin from nothing on both sides."""
        self._mismatches += 1
        if request.method == Method.ALLOCATE:
            # coturn takes a second to delete; until a third transmission is refused, this one may be too early.
            too_early = request.after_deletion and request.transmissions < 3
            if not too_early and self._mismatches <= MAX_MISMATCHES:
                self._transactions.finish(request)
                self._start(Method.REFRESH, _SOFTWARE, (LIFETIME, 0))
            return
        for pending in self._transactions:
            if pending.method == Method.CHANNEL_BIND:
                self._queue(pending.peer)
        self._reallocate()

    def _reallocate(self) -> None:
        """The relay has forgotten us. Host and reflexive candidates are still being asked for."""
        self._drop_grant()
        for pending in self._transactions:
            if pending.method != Method.BINDING:
                self._transactions.finish(pending)
        if self._mismatches <= MAX_MISMATCHES:
            self._allocate()
        else:
            self._waiting_peers.clear()

    def _handle_refusal(self, request: Request) -> None:
        """Any other error: of a REFRESH it means nothing, the allocation lives until it expires."""
        if request.method == Method.CHANNEL_BIND:
            self._channels.remove(request.channel)
        elif request.method == Method.ALLOCATE or request.is_deletion:
            self._waiting_peers.clear()

    def _give_up(self, request: Request) -> None:
        self._transactions.finish(request)
        if self._active is not None and request.destination.is_ipv6 == self._active.is_ipv6:
            self._active = None
            self._drop_grant()
            self._finish_all()

    def _maintain(self, now: float) -> None:
        """What an allocation needs from time to time (docs/protocol/data-plane.md, 3.6 and 3.7)."""
        if self._refresh_at is not None and now >= self._refresh_at:
            self._refresh_at = None
            self._start_refresh(BACKOFF)
        if now >= self._keepalive_at and self._active is not None:
            self._keepalive_at = now + KEEPALIVE_INTERVAL
            self._send(Request(Method.BINDING, self._active, (_SOFTWARE,), is_signed=False))
        for number, peer in self._channels.take_refreshes(now):
            self._request_channel(number, peer)

    def _allocate(self, *, after_deletion: bool = False) -> None:
        attributes = ((REQUESTED_TRANSPORT, UDP), (ADDITIONAL_ADDRESS_FAMILY, FAMILY_IPV6), _SOFTWARE)
        self._start(Method.ALLOCATE, *attributes, after_deletion=after_deletion)

    def _start_refresh(self, schedule: tuple[float, ...]) -> None:
        if any(request.method == Method.REFRESH for request in self._transactions):
            return  # its answer will do
        # Without REQUESTED-TRANSPORT and ADDITIONAL-ADDRESS-FAMILY, which upstream sends: coturn answers 420.
        self._start(Method.REFRESH, _SOFTWARE, schedule=schedule)

    def _request_channel(self, number: int, peer: SocketAddress) -> None:
        self._start(Method.CHANNEL_BIND, (XOR_PEER_ADDRESS, peer), (CHANNEL_NUMBER, number), _SOFTWARE)

    def _start(self, method: Method, *attributes: tuple[Attribute[Any], Any], **more: Any) -> None:
        """Send an authenticated request to the active socket."""
        if self._active is not None:
            is_signed = self.credentials.key is not None
            self._send(Request(method, self._active, attributes, is_signed=is_signed, **more))

    def _send(self, request: Request) -> None:
        # A BINDING keeps its id; what is signed anew is a new request to the relay (docs/protocol/data-plane.md, 3.4).
        reused = request.latest_id if request.method == Method.BINDING else None
        transaction_id = reused or self._entropy(TRANSACTION_ID_SIZE)
        self._transmits.append(Transmit(request.destination, self._encode(request, transaction_id)))
        self._transactions.sent(request, transaction_id, self._now)
        self.counters.requests_sent += 1

    def _encode(self, request: Request, transaction_id: bytes) -> bytes:
        if not request.is_signed:
            request.nonce = None
            return Message(request.method, Kind.REQUEST, transaction_id, request.attributes).encode()
        request.nonce = self.credentials.nonce
        attributes = request.attributes + self.credentials.attributes()
        return Message(request.method, Kind.REQUEST, transaction_id, attributes).encode(key=self.credentials.key)

    def _finish(self, request: Request) -> None:
        self.counters.answers_received += 1
        self._distrusted = False
        self._transactions.finish(request)

    def _finish_all(self) -> None:
        for request in self._transactions:
            self._transactions.finish(request)

    def _queue(self, peer: SocketAddress) -> None:
        """Bind a channel to this peer once there is an allocation; the longest waiting one makes room."""
        if peer not in self._waiting_peers and len(self._waiting_peers) >= MAX_BUFFERED_PEERS:
            del self._waiting_peers[next(iter(self._waiting_peers))]
            self.counters.binds_refused += 1
        self._waiting_peers[peer] = None

    def _observe(self, kind: str, candidate: Candidate) -> None:
        """A BINDING showed where we are; another place than before replaces it."""
        previous = self._observed.get((kind, candidate.base.is_ipv6))
        if previous != candidate:
            self._observed[kind, candidate.base.is_ipv6] = candidate
            self._events.append(CandidateFound(candidate))
            if previous is not None:
                self._lose(previous)

    def _drop_grant(self) -> None:
        if self._grant is not None:
            self._lose(*self._grant.candidates)
            self._grant = None
        self._channels = ChannelBindings()

    def _lose(self, *candidates: Candidate) -> None:
        self._events.extend(CandidateLost(candidate) for candidate in candidates)

    def _settle(self) -> None:
        """Fail where nothing is left that could still succeed."""
        if not self._ended and self._active is None and not self._transactions:
            self._fail(FailureReason.NO_AUTHENTIC_RESPONSE if self._distrusted else FailureReason.NO_RESPONSE)

    def _fail(self, reason: FailureReason) -> None:
        self._drop_grant()
        self._finish_all()
        self._active = None
        self._ended = True
        self._events.append(Failed(reason))


class _Grant(NamedTuple):
    """What the relay gave us, and until when."""

    candidates: tuple[Candidate, ...]
    expires_at: float


def _lifetime(message: Message) -> int:
    """Seconds; 0 means that it was deleted."""
    lifetime = message.get(LIFETIME)
    return DEFAULT_LIFETIME if lifetime is None else lifetime

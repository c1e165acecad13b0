"""The life of one allocation at a relay, with the candidates and channels that it gives us.

Sources: docs/protocol/data-plane.md, 3 and 12.4; RFC 8656. Comments mark where it differs from upstream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import attrs

from firezone_tunnel.core.ice.candidate import Candidate
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout, Transmit, earliest
from firezone_tunnel.core.stun.message import FIREZONE_REALM, XOR_MAPPED_ADDRESS, Kind, Message, Method
from firezone_tunnel.core.stun.transaction import BACKOFF
from firezone_tunnel.core.turn.credentials import LongTermCredentials
from firezone_tunnel.core.turn.events import (
    AllocationCounters,
    AllocationEvent,
    CandidateFound,
    CandidateLost,
    Failed,
    FailureReason,
)
from firezone_tunnel.core.turn.exchange import Exchange, Outcome
from firezone_tunnel.core.turn.grant import Grant, granted_lifetime
from firezone_tunnel.core.turn.observed import ObservedCandidates
from firezone_tunnel.core.turn.request import Request, allocate, binding, channel_bind, deletion, refresh
from firezone_tunnel.core.turn.state import ENDED, UNDECIDED, UNREACHED, State

KEEPALIVE_INTERVAL = 25.0  # docs/protocol/data-plane.md, 3.6
PROBE = (1.0,)  # docs/protocol/data-plane.md, 3.6: a proactive REFRESH is sent once and has a second to be answered
MAX_BUFFERED_PEERS = 100  # docs/protocol/data-plane.md, 3.1
MAX_MISMATCHES = 4  # in a row: a relay that denies what it has just granted is left alone


class Allocation:
    """Relayed addresses at one relay, kept alive until it fails, is closed, or the relay goes silent.

    Feed it messages that came from the relay's `sockets`, and time; drain `transmits` and `events` after each. It does
    nothing after a `Failed` event.
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
        `counters`; by default each has its own.

        Raises: ValueError, without any address, or if no message could carry the credentials.
        """
        self.rid = rid
        self.sockets = tuple(address for address in (ipv4, ipv6) if address is not None)
        if not self.sockets:
            raise ValueError(f"relay {rid} has no address")
        self.state = State.SEARCHING
        self.credentials = LongTermCredentials(username, password, realm)
        self.counters = counters or AllocationCounters()
        self._exchange = Exchange(self.credentials, entropy, self.counters)
        self._events: deque[AllocationEvent] = deque()
        self._observed = ObservedCandidates()
        self._waiting_peers: dict[SocketAddress, None] = {}
        self._contact: _Contact | None = None
        self._grant: Grant | None = None
        self._mismatches = 0
        self._now = now
        self._search()

    @property
    def active_socket(self) -> SocketAddress | None:
        """The relay's address that we talk to: the first to answer."""
        return None if self._contact is None else self._contact.socket

    @property
    def active_source(self) -> SocketAddress | None:
        """Our address that the relay knows us by: it takes what leaves from another for a stranger's."""
        return None if self._contact is None else self._contact.source

    @property
    def has_transmits(self) -> bool:
        """Whether there is something to be sent: most channel data needs no request before it."""
        return bool(self._exchange.transmits)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates to offer to a new peer: host and reflexive, then relayed."""
        return (*self._observed, *(() if self._grant is None else self._grant.candidates))

    def relayed(self, is_ipv6: bool) -> SocketAddress | None:
        """Our address of that family at the relay."""
        return None if self._grant is None else self._grant.relayed(is_ipv6)

    def channel_to(self, peer: SocketAddress, now: float) -> int | None:
        """The channel number to send to this peer on; None where `bind_channel` has to come first."""
        return None if self._grant is None else self._grant.channels.channel_to(peer, now)

    def channel_for(self, peer: SocketAddress, now: float) -> int | None:
        """The channel number to send to this peer on right now, requested if necessary.

        The caller sends `transmits` before the data. None where the peer can't be reached.
        """
        channel = self.channel_to(peer, now)
        if channel is None:
            self.bind_channel(peer, now)
            channel = self.channel_to(peer, now)
        if channel is not None:
            self.sent_channel_data(now)
        return channel

    def peer_of(self, channel: int, now: float) -> SocketAddress | None:
        """The sender of data that arrived on this channel; None for a channel that the relay has not confirmed."""
        return None if self._grant is None else self._grant.channels.received(channel, now)

    def sent_channel_data(self, now: float) -> None:
        """Channel data left for the relay: no keepalive is needed for a while."""
        if self._contact is not None:
            self._contact.keepalive_at = now + KEEPALIVE_INTERVAL

    def bind_channel(self, peer: SocketAddress, now: float) -> None:
        """Request a channel to this peer, as soon as there is an allocation. Does nothing if that was done already."""
        self._now = now
        if self.state in UNDECIDED:
            self._queue(peer)
        elif self._grant is None or self._grant.relayed(peer.is_ipv6) is None:
            self.counters.binds_refused += 1
        else:
            number = self._grant.channels.bind(peer, now)
            if number is not None:
                self._request_channel(number, peer)

    def refresh(self, now: float) -> None:
        """Find out within a second whether the relay still knows us; one suspended or expired begins anew."""
        self._find_out(PROBE, now)

    def probe(self, now: float) -> None:
        """The same with more patience: after a pause, the network may not be there yet."""
        self._find_out(BACKOFF, now)

    def verify(self, now: float) -> None:
        """Find out whether the relay still knows us, with more patience than `refresh` has."""
        self._now = now
        if self.state is State.ALLOCATED:
            self._request_refresh(BACKOFF)

    def restart(self, now: float) -> None:
        """The network has changed, and our sockets with it: take back all candidates and begin anew."""
        if self.state in ENDED:
            return
        self._now = now
        self._exchange.transmits.clear()
        self._events.extend(self._observed.clear())
        self._search()

    def close(self) -> Transmit | None:
        """End the allocation. Returns the datagram that deletes it at the relay, if the relay has granted it."""
        if self.state is State.CLOSED:
            return None
        self._exchange.transmits.clear()
        farewell = None
        if self.state is State.ALLOCATED:
            farewell = self._from_our_source(self._exchange.encode_unanswered(deletion(self._relay)))
        self._become(State.CLOSED)
        return farewell

    def transmits(self) -> Iterator[Transmit]:
        """Take what is to be sent. The system chooses the source until the relay has answered, and keeps to it then."""
        while self._exchange.transmits:
            yield self._from_our_source(self._exchange.transmits.popleft())

    def events(self) -> Iterator[AllocationEvent]:
        """Take what happened since the last call, in order."""
        while self._events:
            yield self._events.popleft()

    def next_timeout(self) -> Timeout | None:
        """The next deadline; never earlier than the time of the last call."""
        deadlines = [(self._exchange.open.next_due(), "turn:retransmission")]
        if self._grant is not None and self._contact is not None:
            deadlines += [
                (self._grant.expires_at, "turn:expiry"),
                (self._grant.refresh_at, "turn:refresh"),
                (self._contact.keepalive_at, "turn:keepalive"),
                (self._grant.channels.next_refresh(), "turn:channel refresh"),
            ]
        return earliest(Timeout(max(at, self._now), reason) for at, reason in deadlines if at is not None)

    def handle_timeout(self, now: float) -> None:
        self._now = now
        if self._grant is not None and now >= self._grant.expires_at:
            self._exchange.drop_all()
            self._become(State.SUSPENDED)
        for request in self._exchange.open.due(now):
            if request not in self._exchange.open:
                continue  # giving up another has ended it
            if request.is_exhausted:
                self._give_up(request)
            else:
                self._exchange.send(request, now)
        if self._grant is not None and self._contact is not None:
            self._maintain(self._grant, self._contact)

    def handle_message(self, message: Message, source: SocketAddress, local: SocketAddress, now: float) -> bool:
        """Take a STUN message that came from `source` to our socket `local`.

        Returns whether it answers a request of ours, even if it was not believed.
        """
        request = self._exchange.open.waiting_for(message.transaction_id)
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
        else:
            self._handle_answer(request, message)
        return True

    def _search(self) -> None:
        """Ask all addresses at once; the first that answers becomes active (docs/protocol/data-plane.md, 3.2)."""
        self._become(State.SEARCHING)
        self._mismatches = 0
        for address in self.sockets:
            self._exchange.start(binding(address), self._now)

    def _handle_binding(self, request: Request, message: Message, local: SocketAddress) -> None:
        """These answers are not signed: the worst that a forged one can do is to name a candidate that doesn't work."""
        mapped = message.get(XOR_MAPPED_ADDRESS)
        if message.kind is Kind.ERROR or mapped is None or mapped.is_ipv6 != local.is_ipv6:
            self.counters.unexpected += 1
            return
        self._exchange.finish(request)
        self._events.extend(self._observed.update(mapped, local))
        if self.state is State.SEARCHING:
            self._contact = _Contact(request.destination, local, self._now + KEEPALIVE_INTERVAL)
            self._allocate()

    def _handle_answer(self, request: Request, message: Message) -> None:
        match self._exchange.judge(request, message, self._now, is_allocated=self._grant is not None):
            case Outcome.SUCCEEDED:
                self._handle_success(request, message)
            case Outcome.REFUSED:
                self._handle_refusal(request)
            case Outcome.MISMATCHED:
                self._handle_mismatch(request)
            case Outcome.CREDENTIALS_REJECTED:
                self._fail(FailureReason.CREDENTIALS_REJECTED)
            case Outcome.NOT_UNDERSTOOD:
                self._fail(FailureReason.PROTOCOL)

    def _handle_success(self, request: Request, message: Message) -> None:
        if request.method == Method.ALLOCATE:
            self._handle_allocated(message)
        elif request.is_deletion:
            self._allocate(after_deletion=True)
        elif self._grant is None:
            return
        elif request.method == Method.CHANNEL_BIND:
            self._mismatches = 0
            self._grant.channels.confirm(request.channel, self._now)
        else:
            self._handle_refreshed(self._grant, message)

    def _handle_allocated(self, message: Message) -> None:
        grant = Grant.from_answer(message, self._relay, self._now)
        if grant is None:
            self.counters.unexpected += 1
            self._become(State.SUSPENDED)
            return
        self._become(State.ALLOCATED)
        self._grant = grant
        self._events.extend(CandidateFound(candidate) for candidate in grant.candidates)
        waiting = tuple(self._waiting_peers)
        self._waiting_peers.clear()
        for peer in waiting:
            self.bind_channel(peer, self._now)

    def _handle_refreshed(self, grant: Grant, message: Message) -> None:
        lifetime = granted_lifetime(message)
        if not lifetime:
            self._reallocate()
            return
        self._mismatches = 0
        grant.extend(lifetime, self._now)

    def _handle_refusal(self, request: Request) -> None:
        """Any other error. A refused REFRESH changes nothing: the allocation lives until it expires."""
        if self._grant is None:
            self._become(State.SUSPENDED)
        elif request.method == Method.CHANNEL_BIND:
            self._grant.channels.remove(request.channel)

    def _handle_mismatch(self, request: Request) -> None:
        """437: the relay and we disagree whether there is an allocation. Begin from nothing on both sides."""
        self._mismatches += 1
        if request.method == Method.ALLOCATE:
            # coturn takes a second to delete; until a third transmission is refused, this one may be too early.
            too_early = request.after_deletion and request.transmissions < 3
            if not too_early and self._mismatches <= MAX_MISMATCHES:
                self._delete(request)
            return
        for pending in self._exchange.open:
            if pending.method == Method.CHANNEL_BIND:
                self._queue(pending.peer)
        self._reallocate()

    def _reallocate(self) -> None:
        """The relay has forgotten us. Host and reflexive candidates are still being asked for."""
        self._exchange.drop_authenticated()
        if self._mismatches <= MAX_MISMATCHES:
            self._allocate()
        else:
            self._become(State.SUSPENDED)

    def _allocate(self, *, after_deletion: bool = False) -> None:
        self._become(State.ALLOCATING)
        self._exchange.start(allocate(self._relay, after_deletion=after_deletion), self._now)

    def _delete(self, refused: Request) -> None:
        """The relay remembers an allocation that we know nothing of."""
        self._exchange.open.finish(refused)
        self._become(State.DELETING)
        self._exchange.start(deletion(self._relay), self._now)

    def _give_up(self, request: Request) -> None:
        """A request stays unanswered. That of the other address family only costs its candidates."""
        self._exchange.open.finish(request)
        if self._contact is None:
            is_silent = not self._exchange.open
        else:
            is_silent = request.destination.is_ipv6 == self._contact.socket.is_ipv6
        if is_silent:
            self._fail(self._exchange.reason_for_silence)

    def _maintain(self, grant: Grant, contact: _Contact) -> None:
        """Send the periodic requests of an allocation that are due (docs/protocol/data-plane.md, 3.6 and 3.7)."""
        if grant.refresh_at is not None and self._now >= grant.refresh_at:
            grant.refresh_at = None
            self._request_refresh(BACKOFF)
        if self._now >= contact.keepalive_at:
            contact.keepalive_at = self._now + KEEPALIVE_INTERVAL
            self._exchange.start(binding(contact.socket), self._now)
        for number, peer in grant.channels.take_refreshes(self._now):
            self._request_channel(number, peer)

    def _request_refresh(self, schedule: tuple[float, ...]) -> None:
        if any(request.method == Method.REFRESH for request in self._exchange.open):
            return  # its answer will do
        self._exchange.start(refresh(self._relay, schedule=schedule), self._now)

    def _request_channel(self, number: int, peer: SocketAddress) -> None:
        self._exchange.start(channel_bind(self._relay, number, peer), self._now)

    def _find_out(self, schedule: tuple[float, ...], now: float) -> None:
        self._now = now
        has_expired = self._grant is not None and now >= self._grant.expires_at
        if self.state is State.SUSPENDED or has_expired:
            self._search()
        elif self.state is State.ALLOCATED:
            self._request_refresh(schedule)

    def _from_our_source(self, transmit: Transmit) -> Transmit:
        if self._contact is not None and transmit.destination == self._contact.socket:
            transmit.source = self._contact.source
        return transmit

    @property
    def _relay(self) -> SocketAddress:
        """The active socket, where authenticated requests go."""
        assert self._contact is not None, f"no address of the relay has answered while {self.state}"
        return self._contact.socket

    def _queue(self, peer: SocketAddress) -> None:
        """Bind a channel to this peer once there is an allocation; a full queue drops the peer that waits longest."""
        if peer not in self._waiting_peers and len(self._waiting_peers) >= MAX_BUFFERED_PEERS:
            del self._waiting_peers[next(iter(self._waiting_peers))]
            self.counters.binds_refused += 1
        self._waiting_peers[peer] = None

    def _fail(self, reason: FailureReason) -> None:
        self._become(State.FAILED)
        self._events.append(Failed(reason))

    def _become(self, state: State) -> None:
        """Enter a state, and drop what belongs to the previous one only."""
        assert self.state.may_become(state), f"{self.state} can't become {state}"
        self.state = state
        if self._grant is not None:
            self._events.extend(CandidateLost(candidate) for candidate in self._grant.candidates)
            self._grant = None
        if state in UNREACHED:
            self._contact = None
            self._exchange.drop_all()
        elif state is State.SUSPENDED:
            self._waiting_peers.clear()


@attrs.define(eq=False)
class _Contact:
    """The relay's address that answered first, ours that it answered to, and when the next keepalive is due."""

    socket: SocketAddress
    source: SocketAddress
    keepalive_at: float

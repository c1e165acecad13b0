"""A full ICE agent, compatible with Firezone's peers (docs/protocol/data-plane.md, 2.4.7 and 2.5; RFC 8445).

It has one component over UDP, trickled candidates, roles fixed by the portal, and no restart. Every working pair is
checked for the agent's lifetime. The controlling side always nominates the best pair that answers, and the controlled
side follows.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from typing import Any

import attrs

from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind, is_usable
from firezone_tunnel.core.ice.checklist import DEFAULT_TIMINGS, NEVER, Checklist, Pair, Timings
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout, Transmit
from firezone_tunnel.core.stun.message import (
    ICE_CONTROLLED,
    ICE_CONTROLLING,
    PRIORITY,
    TRANSACTION_ID_SIZE,
    USE_CANDIDATE,
    USERNAME,
    XOR_MAPPED_ADDRESS,
    Attribute,
    Kind,
    Message,
    Method,
    short_term_key,
)

MAX_REMOTE_ADDRESSES = 100  # the maximum number of pairs, too: more addresses would never be checked
MAX_OPTIMISTIC = 2  # docs/protocol/data-plane.md, 2.4.7
# After so many missed checks the controlling side leaves a pair, if another answers (docs/decisions.md, 3).
MISSES_TO_LEAVE = 3
# The controlling peer checks every 1.5 s, or every 25 s when idle. Upstream keeps sending USE-CANDIDATE on all pairs it
# has ever nominated, so the newest check alone must not decide. A nomination is valid for 1 1/3 check intervals.
NOMINATION_LIFETIME = 2.0
IDLE_NOMINATION_LIFETIME = 33.0

TRANSACTION_PREFIX_SIZE = 4


@attrs.frozen
class Credentials:
    """One side's ICE credentials, which the portal gives to both sides. The other side uses them in its checks."""

    ufrag: str
    password: str = attrs.field(repr=False)


class AgentState(enum.Enum):
    NEW = "new"
    """There are no pairs yet."""
    CHECKING = "checking"
    """There are pairs, but none is nominated."""
    CONNECTED = "connected"
    """There is a nominated pair, and other pairs are still checked."""
    COMPLETED = "completed"
    """The nominated pair is the only pair."""
    DISCONNECTED = "disconnected"
    """No pair is left, although both sides have candidates. A new pair leads back to CHECKING."""


@attrs.frozen
class StateChanged:
    state: AgentState
    at: float


@attrs.frozen
class Nominated:
    """The path to use from now on."""

    local: Candidate
    remote: Candidate

    @property
    def source(self) -> SocketAddress:
        """A local socket's address, or our relayed address if `local.kind` is RELAYED."""
        return self.local.base

    @property
    def destination(self) -> SocketAddress:
        return self.remote.address


@attrs.define
class AgentCounters:
    checks_sent: int = 0
    answers_received: int = 0
    checks_answered: int = 0
    unauthentic: int = 0
    """Messages for this agent with an invalid MESSAGE-INTEGRITY."""
    unexpected: int = 0
    """Authentic messages that were dropped, for example to an unknown local or from a removed remote address."""
    role_conflicts: int = 0


class Agent:
    """One side of one connection.

    Feed it candidates, STUN messages and time; drain `transmits()` and `events()` after each call. A transmit's
    `source` is the base of a local candidate. If that is a relayed address, the node sends the payload as channel data.
    """

    def __init__(
        self,
        *,
        controlling: bool,
        local: Credentials,
        remote: Credentials,
        entropy: Entropy,
        now: float,
        timings: Timings = DEFAULT_TIMINGS,
        counters: AgentCounters | None = None,
    ) -> None:
        """Agents may share `counters`. By default an agent has its own."""
        self.controlling = controlling
        self.local = local
        self.remote = remote
        self.transaction_prefix = entropy(TRANSACTION_PREFIX_SIZE)
        """The prefix of all transaction ids of this agent, by which a node looks up the agent for a response."""
        self.state = AgentState.NEW
        self.counters = counters or AgentCounters()
        self._entropy = entropy
        self._tie_breaker = int.from_bytes(entropy(8), "big")
        self._local_key = short_term_key(local.password)
        self._remote_key = short_term_key(remote.password)
        self._now = now
        self._timings = timings
        self._idle = False
        self._locals: list[Candidate] = []
        self._bases: dict[SocketAddress, Candidate] = {}
        self._remotes: dict[SocketAddress, list[Candidate]] = {}
        self._optimistic: dict[SocketAddress, Candidate] = {}
        self._discarded: dict[SocketAddress, None] = {}
        self._checklist = Checklist(controlling=controlling, schedule=timings.active)
        self._nominated: Pair | None = None
        self._transmits: deque[Transmit] = deque()
        self._events: deque[Nominated | StateChanged] = deque()

    @property
    def local_candidates(self) -> tuple[Candidate, ...]:
        """The local candidates in the order they were added, with the priority and ufrag to signal to the peer."""
        return tuple(self._locals)

    @property
    def remote_candidates(self) -> tuple[Candidate, ...]:
        """All remote candidates: signalled, peer-reflexive and optimistic."""
        return tuple(candidate for known in self._remotes.values() for candidate in known)

    @property
    def nominated(self) -> Nominated | None:
        """The path in use, or None."""
        return None if self._nominated is None else Nominated(self._nominated.local, self._nominated.remote)

    def owns_transaction(self, transaction_id: bytes) -> bool:
        """Whether this is the id of a check that is waiting for its response."""
        return self._checklist.waiting_for(transaction_id) is not None

    def add_local_candidate(self, candidate: Candidate, now: float) -> Candidate | None:
        """Add a local candidate. Returns the candidate to signal to the peer; None if it is redundant or unusable.

        The priority drops by one step for each earlier candidate of the same kind and family.
        """
        if not is_usable(candidate.address) or self._has_local(candidate.address, candidate.base):
            return None
        taken = [present.priority for present in self._locals]
        while candidate.priority in taken:
            candidate = candidate.lowered()
        candidate = attrs.evolve(candidate, ufrag=self.local.ufrag)
        self._locals.append(candidate)
        # Packets from a reflexive address are sent from its base, which is a separate host candidate.
        if candidate.kind in {CandidateKind.HOST, CandidateKind.RELAYED}:
            self._bases[candidate.base] = candidate
            for address in tuple(self._remotes):
                remote = self._remote_at(address)
                if remote is not None and remote.kind is not CandidateKind.PEER_REFLEXIVE:
                    self._checklist.add(candidate, remote, now, spare=self._nominated)
        self._advance(now)
        return candidate

    def remove_local_candidate(self, candidate: Candidate, now: float) -> bool:
        """Remove a local candidate and its pairs. Returns whether it was known, so that the peer has to be notified."""
        for present in self._locals:
            if present.identity == candidate.identity and present.base == candidate.base:
                self._locals.remove(present)
                break
        else:
            return False
        if self._bases.get(present.base) == present:
            del self._bases[present.base]
            self._remove_pairs([pair for pair in self._checklist if pair.local.base == present.base])
        self._advance(now)
        return True

    def add_remote_candidate(self, candidate: Candidate, now: float) -> bool:
        """Add a signalled candidate. Returns whether it is new. Candidates of another session are rejected."""
        guessed = self._optimistic.get(candidate.address)
        known = [present for present in self._remotes.get(candidate.address, ()) if present is not guessed]
        if candidate.ufrag not in {None, self.remote.ufrag} or not is_usable(candidate.address):
            return False
        if any(candidate.identity == present.identity for present in known):
            return False
        if candidate.address not in self._remotes and len(self._remotes) >= MAX_REMOTE_ADDRESSES:
            return False
        self._discarded.pop(candidate.address, None)
        self._optimistic.pop(candidate.address, None)
        signalled = [present for present in known if present.kind is not CandidateKind.PEER_REFLEXIVE]
        self._remotes[candidate.address] = [*signalled, candidate]
        self._pair_up(candidate.address, now)
        self._guess(now)
        self._advance(now)
        return True

    def remove_remote_candidate(self, candidate: Candidate, now: float) -> bool:
        """Remove the candidate with the same kind, address and related address. Returns whether it was known.

        Checks from its address are ignored until it is signalled again.
        """
        known = self._remotes.get(candidate.address, [])
        remaining = [present for present in known if present.identity != candidate.identity]
        if len(remaining) == len(known):
            return False
        if remaining:
            self._remotes[candidate.address] = remaining
            self._pair_up(candidate.address, now)
        else:
            self._remove_remote(candidate.address)
            self._discarded[candidate.address] = None
            if len(self._discarded) > MAX_REMOTE_ADDRESSES:
                del self._discarded[next(iter(self._discarded))]
        self._guess(now)
        self._advance(now)
        return True

    def handle_message(self, message: Message, source: SocketAddress, destination: SocketAddress, now: float) -> bool:
        """Process a STUN message from `source` to `destination`, a local address or one of our relayed addresses.

        Returns whether the message belongs to this agent: it is an authentic check from the peer for our ufrag, or an
        authentic response to one of our checks.
        """
        if message.method != Method.BINDING:
            return False
        if message.kind is Kind.REQUEST:
            return self._handle_check(message, source, destination, now)
        if message.kind in {Kind.SUCCESS, Kind.ERROR}:
            return self._handle_answer(message, source, destination, now)
        return False

    def set_idle(self, idle: bool, now: float) -> None:
        """Use the long check interval while the connection carries no traffic, and the short interval otherwise."""
        if idle == self._idle:
            return
        self._idle = idle
        self._checklist.follow(self._timings.idle if idle else self._timings.active)
        self._advance(now)

    def probe(self, now: float) -> None:
        """Check every pair at once."""
        for pair in self._checklist:
            self._checklist.hasten(pair, now)
        self._advance(now)

    def transmits(self) -> Iterator[Transmit]:
        """Take the datagrams to send."""
        while self._transmits:
            yield self._transmits.popleft()

    def events(self) -> Iterator[Nominated | StateChanged]:
        """Take the events since the last call, in order."""
        while self._events:
            yield self._events.popleft()

    def next_timeout(self) -> Timeout | None:
        """When the next check is due, but not before the time of the last call."""
        due = self._checklist.next_due()
        return None if due is None else Timeout(max(due, self._now), "ice:check")

    def handle_timeout(self, now: float) -> None:
        """Send at most one check that is due, and remove the pairs that are out of checks."""
        self._checklist.remove_exhausted(now)
        self._advance(now)
        pair = self._checklist.next_check(now, self._nominated)
        if pair is not None:
            self._check(pair, now)

    def _handle_check(self, message: Message, source: SocketAddress, destination: SocketAddress, now: float) -> bool:
        priority = message.get(PRIORITY)
        if message.get(USERNAME) != f"{self.local.ufrag}:{self.remote.ufrag}" or priority is None:
            return False
        if not message.is_authentic(self._local_key):
            self.counters.unauthentic += 1
            return False
        use_candidate = message.get(USE_CANDIDATE) is not None
        local = self._bases.get(destination)
        if local is None or source in self._discarded or not is_usable(source):
            self.counters.unexpected += 1
            return True
        if self.controlling and use_candidate:
            # Roles are fixed, so neither side switches (docs/protocol/data-plane.md, 2.5.1).
            self.counters.role_conflicts += 1
            return True
        self._answer(message, source, destination)
        pair = self._pair_of_check(local, source, priority, now)
        if pair is not None:
            if not pair.heard and not pair.succeeded:
                # Our earlier checks arrived before the peer's NAT or channel was open. From now on they get through.
                self._checklist.hasten(pair, now)
            pair.heard = True
            pair.nominated_at = now if use_candidate else NEVER
        self._advance(now)
        return True

    def _handle_answer(self, message: Message, source: SocketAddress, destination: SocketAddress, now: float) -> bool:
        pair = self._checklist.waiting_for(message.transaction_id)
        if pair is None:
            return False
        if not message.is_authentic(self._remote_key):
            self.counters.unauthentic += 1
            return False
        symmetric = source == pair.remote.address and destination == pair.local.base  # RFC 8445, section 7.2.5.2.1
        if message.kind is Kind.ERROR or message.get(XOR_MAPPED_ADDRESS) is None or not symmetric:
            self.counters.unexpected += 1
            return True
        self.counters.answers_received += 1
        self._checklist.answered(pair, message.transaction_id, now)
        self._advance(now)
        return True

    def _pair_of_check(self, local: Candidate, source: SocketAddress, priority: int, now: float) -> Pair | None:
        """The pair of a received check. An unknown sender becomes a peer-reflexive candidate."""
        remote = self._remote_at(source)
        if remote is None:
            if len(self._remotes) >= MAX_REMOTE_ADDRESSES:
                return None
            remote = Candidate.peer_reflexive(source, priority)
            self._remotes[source] = [remote]
        return self._checklist.add(local, remote, now, spare=self._nominated)

    def _answer(self, request: Message, source: SocketAddress, destination: SocketAddress) -> None:
        mapped = (XOR_MAPPED_ADDRESS, source)
        answer = Message(Method.BINDING, Kind.SUCCESS, request.transaction_id, (mapped,))
        payload = answer.encode(key=self._local_key, fingerprint=True)
        self.counters.checks_answered += 1
        self._transmits.append(Transmit(source, payload, source=destination))

    def _check(self, pair: Pair, now: float) -> None:
        transaction_id = self.transaction_prefix + self._entropy(TRANSACTION_ID_SIZE - TRANSACTION_PREFIX_SIZE)
        attributes: list[tuple[Attribute[Any], Any]] = [
            (USERNAME, f"{self.remote.ufrag}:{self.local.ufrag}"),
            (ICE_CONTROLLING if self.controlling else ICE_CONTROLLED, self._tie_breaker),
            (PRIORITY, pair.local.reflexive_priority),
        ]
        if self.controlling and pair is self._nominated:
            attributes.append((USE_CANDIDATE, True))
        message = Message(Method.BINDING, Kind.REQUEST, transaction_id, tuple(attributes))
        payload = message.encode(key=self._remote_key, fingerprint=True)
        self._checklist.sent(pair, transaction_id, now)
        self.counters.checks_sent += 1
        self._transmits.append(Transmit(pair.remote.address, payload, source=pair.local.base))

    def _has_local(self, address: SocketAddress, base: SocketAddress) -> bool:
        return any(present.address == address and present.base == base for present in self._locals)

    def _remote_at(self, address: SocketAddress) -> Candidate | None:
        """The remote candidate with the highest priority at this address."""
        return max(self._remotes.get(address, ()), key=lambda candidate: candidate.priority, default=None)

    def _pair_up(self, address: SocketAddress, now: float) -> None:
        remote = self._remote_at(address)
        if remote is not None:
            self._checklist.replace_remote(remote)
            for local in self._bases.values():
                self._checklist.add(local, remote, now, spare=self._nominated)

    def _guess(self, now: float) -> None:
        """Update the optimistic candidates: the peer's public addresses combined with its local ports.

        The peer does not signal them. They reach a peer behind a symmetric NAT with a port forwarding
        (docs/protocol/data-plane.md, 2.4.7).
        """
        wanted = self._guesses()
        for address in [present for present in self._optimistic if present not in wanted]:
            del self._optimistic[address]
            self._remove_remote(address)
        for address, candidate in wanted.items():
            if address not in self._optimistic and len(self._remotes) < MAX_REMOTE_ADDRESSES:
                self._optimistic[address] = candidate
                self._remotes[address] = [candidate]
                self._pair_up(address, now)

    def _guesses(self) -> dict[SocketAddress, Candidate]:
        signalled = [
            candidate
            for candidate in self.remote_candidates
            if not candidate.address.is_ipv6 and candidate.address not in self._optimistic
        ]
        ports = [candidate.address.port for candidate in signalled if candidate.kind is CandidateKind.HOST]
        guesses: dict[SocketAddress, Candidate] = {}
        for reflexive in signalled:
            if reflexive.kind is not CandidateKind.SERVER_REFLEXIVE:
                continue
            for port in ports:
                address = SocketAddress(reflexive.address.host, port)
                known = address in self._remotes and address not in self._optimistic
                if not known and address not in self._discarded and len(guesses) < MAX_OPTIMISTIC:
                    guesses[address] = attrs.evolve(reflexive, address=address, base=address)
        return guesses

    def _remove_remote(self, address: SocketAddress) -> None:
        self._remotes.pop(address, None)
        self._remove_pairs([pair for pair in self._checklist if pair.remote.address == address])

    def _remove_pairs(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            self._checklist.remove(pair)

    def _advance(self, now: float) -> None:
        """Update the nomination, then the state."""
        self._now = now
        if self._nominated is not None and self._nominated not in self._checklist:
            self._nominated = None
        best = self._best_answering(now) if self.controlling else self._best_nominated(now)
        if best is not None and best is not self._nominated:
            self._nominated = best
            self._events.append(Nominated(best.local, best.remote))
            if self.controlling:
                # Check it immediately: the peer follows only after a USE-CANDIDATE, and a pending response to an
                # earlier check could postpone a check that is only marked as due.
                self._check(best, now)
        state = self._next_state()
        if state is not self.state:
            self.state = state
            self._events.append(StateChanged(state, now))

    def _best_answering(self, now: float) -> Pair | None:
        """The pair to nominate as the controlling side: the best pair that answers."""
        current, since = self._nominated, NEVER
        if current is not None and current.missed(now) >= MISSES_TO_LEAVE:
            since = current.unanswered_since  # pairs without an answer after that may have failed for the same reason
            current = None
        # A working pair is replaced only by a pair with no missed checks.
        tolerated = MISSES_TO_LEAVE if current is None else 1
        best = current
        for pair in self._checklist:
            answers = pair.succeeded and pair.missed(now) < tolerated and pair.answered_at >= since
            if answers and (best is None or pair.priority > best.priority):
                best = pair
        return best

    def _best_nominated(self, now: float) -> Pair | None:
        """The pair selected by the controlling peer: the best of its recent nominations."""
        oldest = now - (IDLE_NOMINATION_LIFETIME if self._idle else NOMINATION_LIFETIME)
        recent = [pair for pair in self._checklist if pair.nominated_at >= oldest]
        return max(recent, key=lambda pair: pair.priority, default=None)

    def _next_state(self) -> AgentState:
        if self._nominated is not None:
            return AgentState.CONNECTED if len(self._checklist) > 1 else AgentState.COMPLETED
        if len(self._checklist):
            return AgentState.CHECKING
        if self._bases and self._remotes:
            return AgentState.DISCONNECTED
        # One side has no candidates at the moment, which does not mean that the peer is gone.
        return AgentState.NEW if self.state is AgentState.NEW else AgentState.CHECKING

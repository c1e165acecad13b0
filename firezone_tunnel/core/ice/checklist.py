"""Candidate pairs and the schedule of their checks (docs/protocol/data-plane.md, 2.5.3; RFC 8445, section 6.1.2).

A pair is checked for its whole lifetime: checks test whether it works, keep NAT mappings open and show that the peer is
alive. A pair is removed when its history contains only missed checks.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from firezone_tunnel.core.ice.candidate import Candidate, pair_priority
from firezone_tunnel.core.sansio import SocketAddress

MAX_PAIRS = 100  # docs/protocol/data-plane.md, 2.4.6
NEVER = float("-inf")


@attrs.frozen
class Schedule:
    """The check intervals of a pair: `initial_rto` seconds at first, doubling up to `max_rto`.

    The pair's history holds the last `max_checks` checks. The pair is removed when all of them were missed.
    """

    initial_rto: float
    max_rto: float
    max_checks: int

    def delay(self, checks: int) -> float:
        """Seconds until the next check, after the given number of checks."""
        return min(self.initial_rto * 2.0 ** (checks - 1), self.max_rto)


@attrs.frozen
class Timings:
    """The schedules of a connection that carries traffic, and of one that has been idle for a while."""

    active: Schedule
    idle: Schedule


# docs/protocol/data-plane.md, 0.3. A peer that never answers is given up after 15.25 s, or 100 s where the connection
# is idle.
DEFAULT_TIMINGS = Timings(active=Schedule(0.25, 1.5, 12), idle=Schedule(25.0, 25.0, 4))


@attrs.define
class _Check:
    transaction_id: bytes
    sent_at: float
    answered: bool = False


class Pair:
    """A local and a remote candidate, and the latest checks between them."""

    __slots__ = (
        "_history",
        "answered_at",
        "due",
        "heard",
        "local",
        "nominated_at",
        "priority",
        "remote",
        "unanswered",
    )

    def __init__(self, local: Candidate, remote: Candidate, priority: int, now: float) -> None:
        self.local = local
        self.remote = remote
        self.priority = priority
        self.due = now
        """When the next check is due, or the pair is removed if it is out of checks."""
        self.unanswered = 0
        """The number of checks sent after the newest answered check."""
        self.answered_at = NEVER
        """When the newest response arrived."""
        self.heard = False
        """Whether a check from the peer has arrived on this pair."""
        self.nominated_at = NEVER
        """Controlled side: when the newest check with USE-CANDIDATE arrived; reset to NEVER by a check without it."""
        self._history: list[_Check] = []

    @property
    def succeeded(self) -> bool:
        return self.answered_at > NEVER

    @property
    def unanswered_since(self) -> float:
        """When the first of the unanswered checks was sent; NEVER if the newest check was answered."""
        return self._history[-self.unanswered].sent_at if self.unanswered else NEVER

    def missed(self, now: float) -> int:
        """The number of consecutive checks that timed out without a response."""
        return self.unanswered - (now < self.due) if self.unanswered else 0

    def __repr__(self) -> str:
        return (
            f"<Pair {self.local.base} to {self.remote.address}, {self.unanswered} of {len(self._history)} unanswered>"
        )

    # The methods below are for the checklist only.

    def append(self, transaction_id: bytes, now: float, schedule: Schedule) -> list[bytes]:
        """Record a check. Returns the ids of checks dropped from the history."""
        self._history.append(_Check(transaction_id, now))
        return self.follow(schedule)

    def answer(self, transaction_id: bytes, now: float, schedule: Schedule) -> None:
        for check in self._history:
            if check.transaction_id == transaction_id:
                check.answered = True
                self.answered_at = now
        self.follow(schedule)

    def follow(self, schedule: Schedule) -> list[bytes]:
        """Set `due` by a schedule. Returns the ids of checks dropped from the history."""
        surplus = self._history[: -schedule.max_checks]
        del self._history[: -schedule.max_checks]
        self.unanswered = 0
        for check in reversed(self._history):
            if check.answered:
                break
            self.unanswered += 1
        if self._history:
            self.due = self._next_due(schedule)
        return [check.transaction_id for check in surplus]

    def is_exhausted(self, now: float, schedule: Schedule) -> bool:
        return self.unanswered >= schedule.max_checks and now >= self.due

    def transaction_ids(self) -> list[bytes]:
        return [check.transaction_id for check in self._history]

    def _next_due(self, schedule: Schedule) -> float:
        last = self._history[-1].sent_at
        due = last + schedule.delay(len(self._history))
        if not self.unanswered:
            return due
        # If a healthy pair stops answering, it is checked at short intervals again after half of `max_rto`.
        probe = max(last + schedule.delay(self.unanswered), self.unanswered_since + schedule.max_rto / 2)
        return min(due, probe)


class Checklist:
    """All pairs of an agent, keyed by the local candidate's base and the remote candidate's address.

    Further candidates with the same base or address are redundant.
    """

    def __init__(self, *, controlling: bool, schedule: Schedule) -> None:
        self._controlling = controlling
        self._schedule = schedule
        self._pairs: dict[tuple[SocketAddress, SocketAddress], Pair] = {}
        self._in_flight: dict[bytes, Pair] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, pair: Pair) -> bool:
        return self._pairs.get((pair.local.base, pair.remote.address)) is pair

    def __iter__(self) -> Iterator[Pair]:
        """The pairs, oldest first. Pairs may be removed during the iteration."""
        return iter(tuple(self._pairs.values()))

    def waiting_for(self, transaction_id: bytes) -> Pair | None:
        """The pair with an unanswered check that has this id."""
        return self._in_flight.get(transaction_id)

    def add(self, local: Candidate, remote: Candidate, now: float, *, spare: Pair | None) -> Pair | None:
        """Add or find the pair of two candidates. In a full list, the worst pair other than `spare` is replaced.

        Returns None for candidates of different families, or if the list is full of better pairs.
        """
        key = local.base, remote.address
        if key in self._pairs:
            return self._pairs[key]
        if local.base.is_ipv6 != remote.address.is_ipv6:
            return None
        pair = Pair(local, remote, self._priority(local, remote), now)
        if len(self._pairs) >= MAX_PAIRS:
            worst = min((other for other in self if other is not spare), key=_priority)
            if worst.priority >= pair.priority:
                return None
            self.remove(worst)
        self._pairs[key] = pair
        return pair

    def replace_remote(self, remote: Candidate) -> None:
        """Use this candidate, and its priority, in all pairs with its address."""
        for pair in self:
            if pair.remote.address == remote.address:
                pair.remote = remote
                pair.priority = self._priority(pair.local, remote)

    def remove(self, pair: Pair) -> None:
        self._pairs.pop((pair.local.base, pair.remote.address), None)
        self._forget(pair.transaction_ids())

    def remove_exhausted(self, now: float) -> None:
        for pair in self:
            if pair.is_exhausted(now, self._schedule):
                self.remove(pair)

    def next_check(self, now: float, first: Pair | None) -> Pair | None:
        """The pair to check now: `first` if it is due, otherwise the pair that has been due the longest."""
        if first is not None and first.due <= now:
            return first
        due = [pair for pair in self if pair.due <= now]
        return min(due, key=lambda pair: (pair.due, -pair.priority), default=None)

    def next_due(self) -> float | None:
        return min((pair.due for pair in self._pairs.values()), default=None)

    def sent(self, pair: Pair, transaction_id: bytes, now: float) -> None:
        self._in_flight[transaction_id] = pair
        self._forget(pair.append(transaction_id, now, self._schedule))

    def answered(self, pair: Pair, transaction_id: bytes, now: float) -> None:
        self._forget([transaction_id])
        pair.answer(transaction_id, now, self._schedule)

    def hasten(self, pair: Pair, now: float) -> None:
        """Make a pair due now, unless it is out of checks."""
        if pair.unanswered < self._schedule.max_checks:
            pair.due = min(pair.due, now)

    def follow(self, schedule: Schedule) -> None:
        """Switch to another schedule."""
        self._schedule = schedule
        for pair in self:
            self._forget(pair.follow(schedule))

    def _priority(self, local: Candidate, remote: Candidate) -> int:
        if self._controlling:
            return pair_priority(local.priority, remote.priority)
        return pair_priority(remote.priority, local.priority)

    def _forget(self, transaction_ids: list[bytes]) -> None:
        for transaction_id in transaction_ids:
            self._in_flight.pop(transaction_id, None)


def _priority(pair: Pair) -> int:
    return pair.priority

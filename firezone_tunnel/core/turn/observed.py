"""Our host and reflexive candidates, as the answers to BINDINGs show them (docs/protocol/data-plane.md, 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.turn.events import CandidateFound, CandidateLost


class ObservedCandidates:
    """The latest host and reflexive candidate of each address family."""

    def __init__(self) -> None:
        self._candidates: dict[tuple[CandidateKind, bool], Candidate] = {}

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates.values())

    def update(self, mapped: SocketAddress, local: SocketAddress) -> list[CandidateFound | CandidateLost]:
        """The relay saw our socket `local` as `mapped`. A candidate that is new replaces the one before it."""
        events: list[CandidateFound | CandidateLost] = []
        for candidate in (Candidate.host(local), Candidate.server_reflexive(mapped, local)):
            key = candidate.kind, local.is_ipv6
            previous = self._candidates.get(key)
            if previous != candidate:
                self._candidates[key] = candidate
                events.append(CandidateFound(candidate))
                if previous is not None:
                    events.append(CandidateLost(previous))
        return events

    def clear(self) -> list[CandidateLost]:
        """Take all candidates back."""
        lost = [CandidateLost(candidate) for candidate in self]
        self._candidates.clear()
        return lost

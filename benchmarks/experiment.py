"""What a round consists of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from benchmarks.cases import Figures
from tests.system.hosts import Lab
from tests.system.network import Network


class Wanted(NamedTuple):
    """What was asked for."""

    cases: frozenset[str]
    seconds: float
    """How long each load lasts."""

    def any_of(self, *cases: str) -> bool:
        return not self.cases.isdisjoint(cases)


class Experiment(Protocol):
    """One part of a round: it builds the hosts that it needs, and leaves nothing behind."""

    title: str
    """What it is called in reports; no two have the same."""
    competitor: str
    """Whose figures these are."""
    cases: frozenset[str]
    """What it can measure."""

    def run(self, wanted: Wanted) -> Figures:
        """Measure those of its cases that are wanted.

        Raises: whatever keeps it from that.
        """


@contextmanager
def network(nat: str = "none") -> Iterator[Network]:
    """Hosts of one's own, with the private network's servers."""
    with Lab() as lab:
        built = Network(lab, nat)
        built.start_servers()
        yield built

"""Experiments, the parts of a round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from benchmarks.cases import Figures
from tests.system.hosts import Lab
from tests.system.network import Network


class Wanted(NamedTuple):
    """The requested cases."""

    cases: frozenset[str]
    seconds: float
    """The duration of each load."""

    def any_of(self, *cases: str) -> bool:
        return not self.cases.isdisjoint(cases)


class Experiment(Protocol):
    """One part of a round. It builds the hosts it needs, and removes them."""

    title: str
    """The unique name in reports."""
    competitor: str
    """The competitor that it measures."""
    cases: frozenset[str]
    """The cases that it can measure."""

    def run(self, wanted: Wanted) -> Figures:
        """Measure the wanted cases.

        Raises: any exception, if the measurement fails.
        """


@contextmanager
def network(nat: str = "none") -> Iterator[Network]:
    """New hosts, with the private network's servers running."""
    with Lab() as lab:
        built = Network(lab, nat)
        built.start_servers()
        yield built

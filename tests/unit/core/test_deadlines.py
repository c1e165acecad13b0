"""Deadlines of many things against a table that is searched from end to end."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firezone_tunnel.core.deadlines import Deadlines
from firezone_tunnel.core.sansio import Timeout

_keys = st.integers(0, 5)
_times = st.integers(0, 30).map(float)


class _AgainstATable(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.deadlines: Deadlines[int] = Deadlines()
        self.table: dict[int, float] = {}

    @rule(key=_keys, at=_times)
    def set(self, key: int, at: float) -> None:
        self.deadlines.set(key, Timeout(at, "set"))
        self.table[key] = at

    @rule(key=_keys)
    def clear(self, key: int) -> None:
        self.deadlines.set(key, None)
        self.table.pop(key, None)

    @rule(key=_keys, at=_times)
    def no_later_than(self, key: int, at: float) -> None:
        self.deadlines.no_later_than(key, at, "sooner")
        self.table[key] = min(at, self.table.get(key, at))

    @rule(now=_times)
    def due(self, now: float) -> None:
        keys = self.deadlines.due(now)
        expected = {key: at for key, at in self.table.items() if at <= now}
        assert sorted(keys) == sorted(expected)
        assert [expected[key] for key in keys] == sorted(expected.values())
        for key in keys:
            del self.table[key]

    @invariant()
    def the_first_is_the_earliest(self) -> None:
        first = self.deadlines.first()
        assert (None if first is None else first.at) == min(self.table.values(), default=None)


TestAgainstATable = _AgainstATable.TestCase


def test_a_deadline_that_is_moved_often_costs_no_memory() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for number in range(10_000):
        deadlines.set(number % 3, Timeout(float(number), "moved"))

    assert len(deadlines._heap) <= 2 * 3 + 64
    assert deadlines.due(20_000.0) == [1, 2, 0]


def test_a_deadline_carries_the_reason_for_which_it_was_set() -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.set("a", Timeout(5.0, "late"))
    deadlines.no_later_than("a", 7.0, "later")
    assert deadlines.first() == Timeout(5.0, "late")

    deadlines.no_later_than("a", 3.0, "soon")

    assert deadlines.first() == Timeout(3.0, "soon")
    assert deadlines.due(2.9) == []
    assert deadlines.due(3.0) == ["a"]
    assert deadlines.first() is None

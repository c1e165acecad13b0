"""The deadlines of many things, of which only the first is asked for."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from firezone_tunnel.core.sansio import Timeout

_K = TypeVar("_K")
_SLACK = 64  # entries of the heap that may be out of date before it is made anew


class Deadlines(Generic[_K]):
    """One deadline for each key; keys are compared by identity or equality only."""

    def __init__(self) -> None:
        self._current: dict[_K, Timeout] = {}
        self._heap: list[tuple[float, int, _K, Timeout]] = []  # also holds entries that are no longer current
        self._serial = 0

    def set(self, key: _K, timeout: Timeout | None) -> None:
        """Set the deadline of a key, in place of the one it had; None: it has none."""
        if timeout is None:
            self._current.pop(key, None)
            return
        current = self._current.get(key)
        if current is not None and current.at == timeout.at:
            return
        self._current[key] = timeout
        self._serial += 1
        heapq.heappush(self._heap, (timeout.at, self._serial, key, timeout))
        if len(self._heap) > 2 * len(self._current) + _SLACK:
            self._compact()

    def no_later_than(self, key: _K, at: float, reason: str) -> None:
        """Bring the deadline of a key forward if it is later. Cheap: for every batch of packets."""
        current = self._current.get(key)
        if current is None or current.at > at:
            self.set(key, Timeout(at, reason))

    def first(self) -> Timeout | None:
        heap = self._heap
        while heap and self._current.get(heap[0][2]) is not heap[0][3]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def due(self, now: float) -> list[_K]:
        """The keys whose deadline has come, the earliest first. They have none afterwards."""
        keys: list[_K] = []
        while (timeout := self.first()) is not None and timeout.at <= now:
            key = heapq.heappop(self._heap)[2]
            del self._current[key]
            keys.append(key)
        return keys

    def _compact(self) -> None:
        self._heap = [entry for entry in self._heap if self._current.get(entry[2]) is entry[3]]
        heapq.heapify(self._heap)

"""A bounded queue between two services of one reactor: neither ever runs inside the other's turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from firezone_tunnel.shell.reactor.clock import BoottimeTimer

_T = TypeVar("_T")


class BoundedQueue(Generic[_T]):
    """Items that one service puts in, and another gets in a later turn of the reactor.

    A full queue takes nothing more: the producer keeps the item and stops reading, or drops and counts it.
    """

    def __init__(self, reactor: Any, capacity: int, consume: Callable[[_T], object]) -> None:
        """`consume(item)` is called for each item, in order; at most `capacity` items wait."""
        self._reactor = reactor
        self._capacity = capacity
        self._consume = consume
        self._items: deque[_T] = deque()
        self._turn: BoottimeTimer | None = None  # made when it is first needed
        self.refused = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: _T) -> bool:
        """False: it is full."""
        if len(self._items) >= self._capacity:
            self.refused += 1
            return False
        if self._turn is None:
            self._turn = BoottimeTimer(self._reactor, self._deliver)
        self._items.append(item)
        self._turn.set(_NEXT_TURN)
        return True

    def close(self) -> None:
        """Forget what waits."""
        self._items.clear()
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    def _deliver(self) -> None:
        """One item a turn: data and timers come in between."""
        if not self._items:
            return
        item = self._items.popleft()
        if self._items and self._turn is not None:
            self._turn.set(_NEXT_TURN)
        self._consume(item)


_NEXT_TURN = 0.0  # a deadline long past

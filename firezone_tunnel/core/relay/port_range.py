"""The ports of allocations: free, taken, or in quarantine after use."""

from __future__ import annotations

from collections import deque

from firezone_tunnel.core.sansio import Entropy

QUARANTINE = 120.0  # docs/protocol/gateway-and-relay.md, 10.2 (T20): late datagrams belong to the port's last user

_FREE, _TAKEN, _RESTING = 0, 1, 2


class PortRange:
    """The ports that are `ours`. A port is one number for both address families."""

    def __init__(self, ours: range, entropy: Entropy) -> None:
        """Raises: ValueError for an empty range."""
        if not 0 < ours.start < ours.stop <= 0x10000 or ours.step != 1:
            raise ValueError(f"not a valid port range: {ours}")
        self.ours = ours
        self._lowest = ours.start
        self._states = bytearray(len(ours))
        self._resting: deque[tuple[float, int]] = deque()  # until when, and the index; the earliest first
        self._entropy = entropy

    def take(self, now: float, *, even: bool = False, with_next: bool = False) -> int | None:
        """A random free port; None if all are taken. `with_next` (for an even port) takes the next port as well.

        A port is in quarantine for two minutes after its use, but is taken earlier if no other is left.
        """
        self._wake(now)
        index = self._find(even=even, with_next=with_next)
        while index is None and self._resting:
            self._states[self._resting.popleft()[1]] = _FREE
            index = self._find(even=even, with_next=with_next)
        if index is None:
            return None
        self._states[index] = _TAKEN
        if with_next:
            self._states[index + 1] = _TAKEN
        return self._lowest + index

    def release(self, port: int, now: float) -> None:
        """Release a port that `take` returned."""
        index = port - self._lowest
        self._states[index] = _RESTING
        self._resting.append((now + QUARANTINE, index))

    def _wake(self, now: float) -> None:
        while self._resting and self._resting[0][0] <= now:
            self._states[self._resting.popleft()[1]] = _FREE

    def _find(self, *, even: bool, with_next: bool) -> int | None:
        size = len(self._states)
        start = int.from_bytes(self._entropy(4), "big") % size
        for first, after in ((start, size), (0, start)):
            index = self._states.find(_FREE, first, after)
            while index >= 0:
                if not even or self._suits(index, with_next=with_next):
                    return index
                index = self._states.find(_FREE, index + 1, after)
        return None

    def _suits(self, index: int, *, with_next: bool) -> bool:
        if (self._lowest + index) % 2:
            return False
        return not with_next or self._states[index + 1 : index + 2] == b"\0"

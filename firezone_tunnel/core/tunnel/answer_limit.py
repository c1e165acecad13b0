"""A limit on answers to packets that the host should not have sent (RFC 1812, 4.3.2.8; RFC 4443, 2.4 (f))."""

from __future__ import annotations

ANSWERS_PER_SECOND = 100.0
BURST = 100.0
"""So many connections that existed before the tunnel learn at once that they are over."""


class AnswerLimit:
    """A token bucket: full at first, refilled with time."""

    __slots__ = ("_credit", "_credited_at")

    def __init__(self, now: float) -> None:
        self._credit = BURST
        self._credited_at = now

    def take(self, now: float) -> bool:
        """Whether one more answer may be given now."""
        self._credit = min(BURST, self._credit + (now - self._credited_at) * ANSWERS_PER_SECOND)
        self._credited_at = now
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

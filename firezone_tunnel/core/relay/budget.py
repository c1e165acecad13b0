"""Limits responses to unauthenticated senders: a relay must not be an amplifier (docs/decisions.md, 22).

Their addresses may be forged, so every response may hit a victim.
"""

from __future__ import annotations

import hashlib
import ipaddress

from firezone_tunnel.core.sansio import Entropy, SocketAddress

MAX_RESPONSE = 100
"""The largest response in bytes, unless the request is larger."""
RESPONSES_PER_SECOND = 100
"""To one IPv4 address, or one IPv6 network of 64 bits."""
EARNED_OF_EACH_BYTE = 7 / 8
"""Less than 1, so that in a long flood fewer bytes leave than arrive."""
FREE_RATE = 16_384.0
"""Bytes a second: a bare Binding request (20 bytes) is smaller than its response (32 or 44)."""
MAX_CREDIT = 32_768.0

_SLOTS = 65_536
_SLOT_SIZE = 2


class ResponseBudget:
    """Counts responses to unauthenticated senders in fixed memory: addresses share slots, by a keyed hash."""

    def __init__(self, entropy: Entropy, now: float, *, workers: int = 1) -> None:
        """Each of the `workers` gets an equal share of the limits: an address may reach all of them."""
        self._key = entropy(16)
        self._responses_per_second = max(1, RESPONSES_PER_SECOND // workers)
        self._free_rate = FREE_RATE / workers
        self._max_credit = self._credit = MAX_CREDIT / workers
        self._credited_at = now
        self._counts = bytearray(_SLOTS)
        self._counting_since = now

    def received(self, size: int) -> None:
        """An unauthenticated request of `size` bytes arrived: it earns credit for nearly as many."""
        self._credit = min(self._max_credit, self._credit + size * EARNED_OF_EACH_BYTE)

    def spend(self, source: SocketAddress, size: int, now: float, *, proven: bool = False) -> bool:
        """Whether a response of `size` bytes may be sent; counts it if so.

        `proven`: the address is that of a client with an allocation. Only its own rate is limited then.
        """
        if now >= self._counting_since + 1.0:
            self._counts = bytearray(_SLOTS)
            self._counting_since = now
        slot = self._slot(source.host)
        if self._counts[slot] >= self._responses_per_second:
            return False
        if not proven:
            earned = max(0.0, now - self._credited_at) * self._free_rate
            self._credit = min(self._max_credit, self._credit + earned)
            self._credited_at = now
            if self._credit < size:
                return False
            self._credit -= size
        self._counts[slot] += 1
        return True

    def _slot(self, host: str) -> int:
        subject = ipaddress.ip_address(host).packed[:8] if ":" in host else host.encode()
        return int.from_bytes(hashlib.blake2s(subject, digest_size=_SLOT_SIZE, key=self._key).digest(), "big")

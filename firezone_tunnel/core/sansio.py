"""The shape that every core shares: time and randomness come in, datagrams and deadlines go out.

A core is fed by `handle_*(..., now)` and drained by `transmits()` and `events()`; `next_timeout()` says when
to call `handle_timeout(now)`. `now` is CLOCK_BOOTTIME in seconds; `utc_now` is unix time, where a peer's
clock matters. A core owns no socket, clock, file or logger.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

Entropy = Callable[[int], bytes]
"""`os.urandom` in a process, a seeded stream in a test: n -> n random bytes."""


class SocketAddress(NamedTuple):
    """A UDP endpoint. `host` is the canonical text of an IP address, without a scope."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @classmethod
    def parse(cls, text: str) -> SocketAddress:
        """Parse "192.0.2.1:3478" or "[2001:db8::1]:3478".

        Raises: ValueError.
        """
        host, _, port = text.rpartition(":")
        if host.startswith("[") != host.endswith("]") or (":" in host) != host.startswith("[") or "%" in host:
            raise ValueError(f"not an address and port: {text!r}")
        number = int(port)
        if not 0 <= number <= 0xFFFF:
            raise ValueError(f"port out of range: {text!r}")
        return cls(str(ipaddress.ip_address(host.strip("[]"))), number)


class Timeout(NamedTuple):
    """When a core wants `handle_timeout`, and why: the reason makes timer storms diagnosable."""

    at: float
    reason: str


def earliest(timeouts: Iterable[Timeout | None]) -> Timeout | None:
    """The first of several deadlines; None if there are none."""
    first = None
    for timeout in timeouts:
        if timeout is not None and (first is None or timeout.at < first.at):
            first = timeout
    return first


class Releasable(Protocol):
    """A buffer out of a pool that its borrower gives back."""

    def release(self) -> None: ...


class Transmit:
    """Datagrams of one size to one destination: `payload` is cut every `segment_size` bytes, the last may be
    shorter; 0 means that it is a single datagram.

    `source` is the local address to send from (only its host counts), None where the system may choose.
    Whoever sends calls `release()` exactly once, after the last attempt: the payload's memory may be pooled.
    """

    __slots__ = ("destination", "ecn", "payload", "pooled", "segment_size", "source")

    def __init__(
        self,
        destination: SocketAddress,
        payload: bytes | memoryview,
        *,
        source: SocketAddress | None = None,
        segment_size: int = 0,
        ecn: int = 0,
        pooled: Releasable | None = None,
    ) -> None:
        self.destination = destination
        self.payload = payload
        self.source = source
        self.segment_size = segment_size
        self.ecn = ecn
        self.pooled = pooled

    def release(self) -> None:
        if self.pooled is not None:
            self.pooled.release()
            self.pooled = None

    def __repr__(self) -> str:
        return f"<Transmit {len(self.payload)} bytes / {self.segment_size} to {self.destination}>"

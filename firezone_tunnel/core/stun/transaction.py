"""STUN requests waiting for a response: their transaction ids and retransmission times.

Source: docs/protocol/data-plane.md, 3.4 (RFC 8489, section 6.2.1, with other intervals).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import attrs

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import Attribute, Method

BACKOFF = (1.0, 1.5, 2.25, 3.375)  # docs/protocol/data-plane.md, 3.4: sent at 0, 1, 2.5 and 4.75 s, given up at 8.125 s


@attrs.define(eq=False)
class Transaction:
    """One request until its response arrives. `attributes` are included in every transmission.

    `schedule` is the number of seconds to wait for a response after each transmission. After the last transmission
    the request fails.
    """

    method: Method
    destination: SocketAddress
    attributes: tuple[tuple[Attribute[Any], Any], ...]
    schedule: tuple[float, ...] = BACKOFF
    transmissions: int = 0
    due_at: float = 0.0
    ids: dict[bytes, None] = attrs.field(factory=dict)
    """The transaction ids, oldest first: one for all transmissions, or one for each."""

    @property
    def is_exhausted(self) -> bool:
        """Whether the last transmission was sent, so that the request fails when it is due."""
        return self.transmissions >= len(self.schedule)

    @property
    def latest_id(self) -> bytes | None:
        return next(reversed(self.ids), None)

    def start_over(self) -> None:
        """Restart the schedule with the next transmission."""
        self.transmissions = 0


T = TypeVar("T", bound=Transaction)


class Transactions(Generic[T]):
    """The pending requests of one client."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, T] = {}
        self._waiting: dict[T, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._waiting))

    def __contains__(self, transaction: object) -> bool:
        return transaction in self._waiting

    def sent(self, transaction: T, transaction_id: bytes, now: float) -> None:
        """Record a transmission with this id. Earlier ids stay valid."""
        transaction.ids[transaction_id] = None
        transaction.due_at = now + transaction.schedule[transaction.transmissions]
        transaction.transmissions += 1
        self._by_id[transaction_id] = transaction
        self._waiting[transaction] = None

    def waiting_for(self, transaction_id: bytes) -> T | None:
        """The pending request with this transaction id."""
        return self._by_id.get(transaction_id)

    def finish(self, transaction: T) -> None:
        """Remove a request that was answered, has failed or is no longer needed."""
        self._waiting.pop(transaction, None)
        for transaction_id in transaction.ids:
            self._by_id.pop(transaction_id, None)

    def next_due(self) -> float | None:
        return min((transaction.due_at for transaction in self._waiting), default=None)

    def due(self, now: float) -> list[T]:
        """The requests whose wait is over, which are to be sent again or fail."""
        return [transaction for transaction in self._waiting if transaction.due_at <= now]

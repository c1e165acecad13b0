"""Requests that wait for their answers: under which ids they went out, and when to send them again.

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
    """One request until its answer. `attributes` are those that every transmission carries.

    `schedule` says how many seconds each transmission waits for an answer; after the last it is given up.
    """

    method: Method
    destination: SocketAddress
    attributes: tuple[tuple[Attribute[Any], Any], ...]
    schedule: tuple[float, ...] = BACKOFF
    transmissions: int = 0
    due_at: float = 0.0
    ids: dict[bytes, None] = attrs.field(factory=dict)
    """Transaction ids: either there is one for all transmissions, or the latest is the last."""

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing but giving up is left when it becomes due."""
        return self.transmissions >= len(self.schedule)

    @property
    def latest_id(self) -> bytes | None:
        return next(reversed(self.ids), None)

    def start_over(self) -> None:
        """Let the next transmission be the first of the schedule again."""
        self.transmissions = 0


T = TypeVar("T", bound=Transaction)


class Transactions(Generic[T]):
    """The requests of one client that are waiting for answers."""

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
        """A transmission left under this id. Ids used before stay valid."""
        transaction.ids[transaction_id] = None
        transaction.due_at = now + transaction.schedule[transaction.transmissions]
        transaction.transmissions += 1
        self._by_id[transaction_id] = transaction
        self._waiting[transaction] = None

    def waiting_for(self, transaction_id: bytes) -> T | None:
        """The request that an answer with this id belongs to."""
        return self._by_id.get(transaction_id)

    def finish(self, transaction: T) -> None:
        """It was answered, given up or became pointless."""
        self._waiting.pop(transaction, None)
        for transaction_id in transaction.ids:
            self._by_id.pop(transaction_id, None)

    def next_due(self) -> float | None:
        return min((transaction.due_at for transaction in self._waiting), default=None)

    def due(self, now: float) -> list[T]:
        """Those whose wait is over, to be sent again or given up."""
        return [transaction for transaction in self._waiting if transaction.due_at <= now]

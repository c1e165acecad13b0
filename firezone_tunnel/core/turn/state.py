"""The states of an allocation, and which may follow which (docs/protocol/data-plane.md, 3.2 to 3.6)."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    """The states of an allocation."""

    SEARCHING = "searching"
    """All addresses of the relay are being asked; none has answered yet."""
    ALLOCATING = "allocating"
    """The relay has answered and was asked for an allocation."""
    DELETING = "deleting"
    """The relay remembers an earlier allocation and was asked to delete it."""
    ALLOCATED = "allocated"
    """We have relayed addresses."""
    SUSPENDED = "suspended"
    """The relay answers but grants nothing, and is not being asked. `refresh` and `restart` lead out of this."""
    FAILED = "failed"
    CLOSED = "closed"

    def may_become(self, state: State) -> bool:
        return state in TRANSITIONS[self]


TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    State.SEARCHING: (State.ALLOCATING, State.SEARCHING, State.FAILED, State.CLOSED),
    State.ALLOCATING: (State.ALLOCATED, State.DELETING, State.SUSPENDED, State.SEARCHING, State.FAILED, State.CLOSED),
    State.DELETING: (State.ALLOCATING, State.SUSPENDED, State.SEARCHING, State.FAILED, State.CLOSED),
    State.ALLOCATED: (State.ALLOCATING, State.SUSPENDED, State.SEARCHING, State.FAILED, State.CLOSED),
    State.SUSPENDED: (State.SEARCHING, State.FAILED, State.CLOSED),
    State.FAILED: (State.CLOSED,),
    State.CLOSED: (),
}

UNREACHED = (State.SEARCHING, State.FAILED, State.CLOSED)
"""No address of the relay is in use, and only BINDINGs may wait for answers."""
UNDECIDED = (State.SEARCHING, State.ALLOCATING, State.DELETING)
"""Peers wait for an allocation that may still come."""
ENDED = (State.FAILED, State.CLOSED)

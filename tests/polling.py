"""Poll for the state of other processes and of the kernel, which send no notifications."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_INTERVAL = 0.02  # seconds

_T = TypeVar("_T")


PATIENCE = 60.0
"""Seconds to wait for what should take one: only a failure takes that long, however busy the machine is."""


def until(ask: Callable[[], _T | None], what: str = "the expected event", timeout: float = PATIENCE) -> _T:
    """Wait until `ask` returns a true value. Returns the value.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {timeout:g} s before {what}")
        time.sleep(_INTERVAL)
    return answer

"""Waiting for what belongs to other processes or to the kernel: they tell nobody, so there is only asking again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_INTERVAL = 0.02  # seconds

_T = TypeVar("_T")


def until(ask: Callable[[], _T | None], what: str = "what was waited for", timeout: float = 10.0) -> _T:
    """Block until the answer is true, and return it.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {timeout:g} s before {what}")
        time.sleep(_INTERVAL)
    return answer

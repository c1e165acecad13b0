"""The outermost frame around a core's calls: an exception over one peer's input must not end the service for all."""

from __future__ import annotations

from functools import partial
from traceback import format_exception
from types import TracebackType
from typing import Any

from firezone_tunnel.errors import one_line
from firezone_tunnel.shell.logs.limiter import Limiter


class Boundary:
    """`with boundary:` swallows an exception and logs it with its traceback.

    It logs each type of exception at most once a minute, so that no peer can fill the disk.
    """

    def __init__(self, message_type: str) -> None:
        self.failures = 0
        self._message_type = message_type
        self._limiter = Limiter()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failures += 1
        details = partial(_fields, error)
        self._limiter.error(self._message_type, key=type(error).__name__, details=details)
        return True


def _fields(error: Exception) -> dict[str, Any]:
    return {"reason": one_line(error), "traceback": "".join(format_exception(error))}

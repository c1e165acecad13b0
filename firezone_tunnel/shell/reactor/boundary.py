"""The outermost frame around a core's calls: an exception over one peer's input must not end the service for all."""

from __future__ import annotations

from traceback import format_exception
from types import TracebackType

from firezone_tunnel.errors import one_line
from firezone_tunnel.shell.logs import events as log

_MAX_LOGGED = 10


class Boundary:
    """`with boundary:` swallows an exception and logs it with its traceback.

    It logs only the first ten, so that no peer can fill the disk.
    """

    def __init__(self, message_type: str) -> None:
        self.failures = 0
        self._message_type = message_type

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failures += 1
        if self.failures <= _MAX_LOGGED:
            log.error(self._message_type, reason=one_line(error), traceback="".join(format_exception(error)))
        return True

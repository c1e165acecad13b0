"""Where an exception out of a core ends: whoever sent what it stumbled over must not end the service for all others."""

from __future__ import annotations

from traceback import format_exception
from types import TracebackType

from firezone_tunnel.errors import one_line
from firezone_tunnel.logs import events as log

_TOLD = 10


class Boundary:
    """`with boundary:` swallows a mistake of ours and logs it with its traceback; only the first ten, so that nobody
    can fill a disk with them.
    """

    def __init__(self, message_type: str) -> None:
        self.mistakes = 0
        self._message_type = message_type

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.mistakes += 1
        if self.mistakes <= _TOLD:
            log.error(self._message_type, reason=one_line(error), traceback="".join(format_exception(error)))
        return True

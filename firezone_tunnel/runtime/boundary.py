"""Where an exception out of a core ends: whoever sent what it stumbled over must not end the service for all others."""

from __future__ import annotations

from traceback import format_exception

from firezone_tunnel.errors import one_line
from firezone_tunnel.logs import events as log

_TOLD = 10


class Boundary:
    """Takes mistakes of ours, and logs them with their tracebacks; only the first ten, so that nobody can fill a disk
    with them. It is no context manager: a `try` costs nothing where there is no mistake.
    """

    def __init__(self, message_type: str) -> None:
        self.mistakes = 0
        self._message_type = message_type

    def caught(self, error: Exception) -> None:
        self.mistakes += 1
        if self.mistakes <= _TOLD:
            log.error(self._message_type, reason=one_line(error), traceback="".join(format_exception(error)))

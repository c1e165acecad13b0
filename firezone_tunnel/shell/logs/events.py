"""The logging functions for all code outside the core: `log.info("portal:connected", host=…)`.

A message type is `area:event` in the past tense. The fields `cid`, `gid` and `rid` are reserved for the ids of clients,
gateways and resources. The threshold is checked before eliot builds a message.
"""

from __future__ import annotations

from typing import Any

import attrs
from eliot import log_message

DEBUG = 10
INFO = 20
WARNING = 30
ERROR = 40

LEVELS = {"debug": DEBUG, "info": INFO, "warn": WARNING, "warning": WARNING, "error": ERROR}
NAMES = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}


class _Threshold:
    level = INFO


def set_threshold(level: int) -> None:
    """Drop messages below this level before they are built."""
    _Threshold.level = level


def enabled(level: int) -> bool:
    """Whether messages of this level are logged. Check it before computing expensive fields."""
    return level >= _Threshold.level


def debug(message_type: str, **fields: Any) -> None:
    """Details for a developer: unreachable addresses, ignored messages, users' addresses."""
    _log(DEBUG, message_type, fields)


def info(message_type: str, **fields: Any) -> None:
    """Events of interest to an operator: state changes, short losses of the portal connection."""
    _log(INFO, message_type, fields)


def warning(message_type: str, **fields: Any) -> None:
    """A condition that users notice, or that is unexpected. What may repeat goes through a `limiter`."""
    _log(WARNING, message_type, fields)


def error(message_type: str, **fields: Any) -> None:
    """A condition that needs action by the operator."""
    _log(ERROR, message_type, fields)


def nonzero(counters: Any) -> dict[str, Any]:
    """The nonzero fields of counters, an attrs object that may contain other counters."""
    fields = attrs.asdict(counters, recurse=False).items()
    return {name: count for name, value in fields if (count := nonzero(value) if attrs.has(type(value)) else value)}


def _log(level: int, message_type: str, fields: dict[str, Any]) -> None:
    if level >= _Threshold.level:
        log_message(message_type=message_type, level=NAMES[level], **fields)

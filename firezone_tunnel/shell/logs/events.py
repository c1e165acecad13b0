"""How everything above the core logs: `log.info("portal:connected", host=…)`.

A message type is `area:event` in the past tense. `cid`, `gid` and `rid` name clients, gateways and resources, and
nothing else does. The threshold is checked before eliot builds anything.
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
    """Messages below this level are dropped before they are built."""
    _Threshold.level = level


def enabled(level: int) -> bool:
    """Whether a message of this level would be written: ask before computing expensive fields."""
    return level >= _Threshold.level


def debug(message_type: str, **fields: Any) -> None:
    """Noise that helps a developer: unreachable addresses, ignored messages, users' addresses and names."""
    _log(DEBUG, message_type, fields)


def info(message_type: str, **fields: Any) -> None:
    """What an operator would want to read: state changes, portal hiccups."""
    _log(INFO, message_type, fields)


def warning(message_type: str, **fields: Any) -> None:
    """Unexpected, and never caused by the network or a peer."""
    _log(WARNING, message_type, fields)


def error(message_type: str, **fields: Any) -> None:
    """The operator must act."""
    _log(ERROR, message_type, fields)


def nonzero(counters: Any) -> dict[str, Any]:
    """The fields of counters, an attrs object that may contain others, that have anything to tell."""
    fields = attrs.asdict(counters, recurse=False).items()
    return {name: told for name, value in fields if (told := nonzero(value) if attrs.has(type(value)) else value)}


def _log(level: int, message_type: str, fields: dict[str, Any]) -> None:
    if level >= _Threshold.level:
        log_message(message_type=message_type, level=NAMES[level], **fields)

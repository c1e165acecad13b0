"""Write log messages in a separate thread, as JSON lines or as human-readable lines.

A write to a full pipe or a slow disk blocks. So messages go through a bounded queue, and are dropped and counted when
the queue is full. The reactor never waits.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from eliot import add_destinations, remove_destination
from twisted.logger import ILogObserver, LogLevel, formatEvent
from zope.interface import implementer

from firezone_tunnel.shell.logs import events as log

QUEUE_CAPACITY = 1024
CLOSE_TIMEOUT = 1.0  # seconds to wait for the last lines before the process ends

FORMATS = ("human", "json")


class Stream(Protocol):
    """The destination of the lines: a text stream such as stdout, or a `logs.file.LogFile`."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...


class LogWriter:
    """An eliot destination that writes each message as a line to `stream`, from `open` to `close`."""

    def __init__(self, stream: Stream, *, style: str, capacity: int = QUEUE_CAPACITY) -> None:
        """`style` is one of `FORMATS`."""
        self.dropped = 0
        self._stream = stream
        self._format = _json_line
        if style == "human":
            self._format = _coloured_line if stream.isatty() else _human_line
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._write_all, name="logs", daemon=True)

    def open(self) -> None:
        """Start to receive messages, including those logged before there was any destination."""
        self._thread.start()
        add_destinations(self)

    def close(self) -> bool:
        """Stop receiving messages, and wait up to CLOSE_TIMEOUT for queued messages to be written.

        Returns False if the thread is still blocked by the stream. The stream must not be used any more then.
        """
        with contextlib.suppress(ValueError):  # already closed, or never opened
            remove_destination(self)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_TIMEOUT)
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT)
        return not self._thread.is_alive()

    def __call__(self, message: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self.dropped += 1

    def _write_all(self) -> None:
        reported = 0
        while (message := self._queue.get()) is not None:
            if self.dropped > reported:
                reported = self.dropped
                self._write({"timestamp": message.get("timestamp"), **_DROPPED, "count": reported})
            self._write(message)

    def _write(self, message: Mapping[str, Any]) -> None:
        try:
            self._stream.write(self._format(message) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # the disk is full or the pipe is closed: this can't be logged, only counted
            self.dropped += 1


@implementer(ILogObserver)
class TwistedMessages:
    """Forwards Twisted's own log events: failures as errors, warnings as warnings, everything else as debug."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        failure = event.get("log_failure")
        if failure is not None:
            log.error("twisted:failed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())
            return
        level = event.get("log_level")
        if level is not None and level >= LogLevel.warn:
            log.warning("twisted:warned", text=formatEvent(dict(event)))
        elif log.enabled(log.DEBUG):
            log.debug("twisted:logged", text=formatEvent(dict(event)))


_DROPPED = {"message_type": "logs:dropped", "level": "warning"}
_HIDDEN = frozenset({"timestamp", "level", "message_type", "task_uuid", "task_level"})
_COLOURS = {"error": "\x1b[31m", "warning": "\x1b[33m", "debug": "\x1b[2m"}
_PLAIN = "\x1b[0m"


def _json_line(message: Mapping[str, Any]) -> str:
    return json.dumps(message, default=str)


def _human_line(message: Mapping[str, Any]) -> str:
    """`2026-11-25T10:00:00.123Z  INFO portal:joined portal=wss://…`"""
    moment = datetime.fromtimestamp(message.get("timestamp") or 0, UTC)
    level = str(message.get("level", "info"))
    fields = "".join(f" {name}={_value(value)}" for name, value in message.items() if name not in _HIDDEN)
    stamp = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"
    return f"{stamp} {_SHORT.get(level, level.upper()):>5} {message.get('message_type', '')}{fields}"


def _coloured_line(message: Mapping[str, Any]) -> str:
    return f"{_COLOURS.get(str(message.get('level')), '')}{_human_line(message)}{_PLAIN}"


_SHORT = {"warning": "WARN"}


def _value(value: object) -> str:
    """The value as a single word; quoted if it contains spaces, quotes, "=" or unprintable characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    plain = text.isprintable() and text and not any(character in ' "=' for character in text)
    return text if plain or not isinstance(value, str) else json.dumps(text, ensure_ascii=False)

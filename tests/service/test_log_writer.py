"""Log messages leave the process through a thread, which may block although the caller must not."""

from __future__ import annotations

import io
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import Logger
from twisted.python.failure import Failure

from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.file import LogFile
from firezone_tunnel.shell.logs.writer import LogWriter, TwistedMessages


@pytest.fixture
def opened() -> Iterator[Callable[..., LogWriter]]:
    """Opens writers, and closes them after the test."""
    writers: list[LogWriter] = []

    def open_writer(stream: Any, style: str, **options: Any) -> LogWriter:
        writer = LogWriter(stream, style=style, **options)
        writer.open()
        writers.append(writer)
        return writer

    yield open_writer
    for writer in writers:
        writer.close()
    log.set_threshold(log.INFO)


def test_json_is_an_object_a_line_with_its_fields(opened: Callable[..., LogWriter]) -> None:
    stream = io.StringIO()
    writer = opened(stream, "json")

    log.info("area:happened", cid="abc", count=3, text='two\nlines "quoted"', odd=Path("/x"))
    writer.close()

    (line,) = stream.getvalue().splitlines()
    message = json.loads(line)
    assert {name: message[name] for name in ("message_type", "level", "cid", "count", "text", "odd")} == {
        "message_type": "area:happened",
        "level": "info",
        "cid": "abc",
        "count": 3,
        "text": 'two\nlines "quoted"',
        "odd": "/x",
    }
    assert abs(message["timestamp"] - time.time()) < 60


def test_human_readable_lines_have_the_time_the_level_and_the_fields(opened: Callable[..., LogWriter]) -> None:
    stream = io.StringIO()
    writer = opened(stream, "human")

    writer(
        {
            "timestamp": datetime(2026, 11, 25, 10, 2, 3, 45_600, UTC).timestamp(),
            "task_uuid": "x",
            "task_level": [1],
            "level": "warning",
            "message_type": "area:happened",
            "gid": "abc",
            "count": 3,
            "said": 'a "b"\nc',
            "empty": "",
            "hosts": ["a", "b"],
        }
    )
    writer.close()

    assert stream.getvalue() == (
        '2026-11-25T10:02:03.045Z  WARN area:happened gid=abc count=3 said="a \\"b\\"\\nc" empty="" hosts=["a", "b"]\n'
    )


def test_only_a_terminal_gets_colours(opened: Callable[..., LogWriter]) -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    writers = opened(terminal, "human"), opened(pipe, "human")

    log.error("area:failed")
    for writer in writers:
        writer.close()

    assert terminal.getvalue().startswith("\x1b[31m")
    assert "\x1b" not in pipe.getvalue()


def test_an_unread_pipe_never_blocks_the_caller(opened: Callable[..., LogWriter]) -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    writer = opened(stream, "json", capacity=16)
    padding = "x" * 10_000

    began = time.monotonic()
    for number in range(200):  # 2 MB, where a pipe holds 64 KiB
        log.info("area:happened", number=number, padding=padding)
    took = time.monotonic() - began

    assert took < 5  # it would be for ever
    assert writer.dropped > 100
    assert writer.close() is False  # its thread still waits

    received = _read_until_quiet(reading)
    messages = [json.loads(line) for line in received.splitlines()]
    numbers = [message["number"] for message in messages if message["message_type"] == "area:happened"]
    assert numbers == sorted(numbers)
    assert len(numbers) + writer.dropped == 200
    assert [message["count"] for message in messages if message["message_type"] == "logs:dropped"] != []
    os.close(reading)


def test_a_lost_reader_is_only_counted(opened: Callable[..., LogWriter]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = opened(os.fdopen(writing, "w"), "json")

    log.info("area:happened")
    log.info("area:happened")

    assert writer.close() is True
    assert writer.dropped >= 2


def test_a_full_disk_is_only_counted(opened: Callable[..., LogWriter], tmp_path: Path) -> None:
    file = LogFile(tmp_path, "x")
    real, file._descriptor = file._descriptor, os.open("/dev/full", os.O_WRONLY)
    writer = opened(file, "json")

    log.info("area:lost")
    assert writer.close() is True
    assert writer.dropped == 1
    assert file.path.read_text() == ""
    assert real is not None
    os.close(real)
    file.close()


def test_closing_twice_or_without_opening_is_fine() -> None:
    writer = LogWriter(io.StringIO(), style="json")
    assert writer.close() is True
    writer = LogWriter(io.StringIO(), style="json")
    writer.open()
    assert writer.close() is True
    assert writer.close() is True


def test_twisteds_messages_are_logged_at_their_level(opened: Callable[..., LogWriter]) -> None:
    stream = io.StringIO()
    writer = opened(stream, "json")
    twisted = Logger(observer=TwistedMessages())

    twisted.info("not shown at this level")
    twisted.warn("look at {what}", what="this")
    try:
        raise ZeroDivisionError("no")
    except ZeroDivisionError:
        twisted.failure("it failed", Failure())
    log.set_threshold(log.DEBUG)
    twisted.info("shown now")
    writer.close()

    messages = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [
        (message["message_type"], message["level"], message.get("text") or message.get("reason"))
        for message in messages
    ] == [
        ("twisted:warned", "warning", "look at this"),
        ("twisted:failed", "error", "no"),
        ("twisted:logged", "debug", "shown now"),
    ]
    assert "ZeroDivisionError" in messages[1]["traceback"]


def _read_until_quiet(descriptor: int) -> str:
    """Read until nothing has arrived for half a second."""
    received = bytearray()
    while select.select([descriptor], [], [], 0.5)[0]:
        received += os.read(descriptor, 1 << 16)
    return received.decode()

"""Log files."""

from __future__ import annotations

import errno
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.logs.file import LogFile

_MOMENT = datetime(2026, 11, 25, 10, 2, 3, tzinfo=UTC)


def test_its_name_has_role_and_time_and_latest_links_to_it(tmp_path: Path) -> None:
    directory = tmp_path / "new/logs"

    log = LogFile(directory, "firezone-client", _MOMENT)
    log.write("one\n")

    assert log.path == directory / "firezone-client.2026-11-25-10-02-03.log"
    assert (directory / "latest").readlink() == Path(log.path.name)
    assert (directory / "latest").read_text() == "one\n"
    log.close()


def test_the_time_defaults_to_now(tmp_path: Path) -> None:
    log = LogFile(tmp_path, "x")

    assert re.fullmatch(r"x\.\d{4}(-\d\d){5}\.log", log.path.name)
    log.close()


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_the_group_may_read_it_but_others_may_not(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        log = LogFile(tmp_path / "logs", "x", _MOMENT)
    finally:
        os.umask(before)

    assert stat.S_IMODE(log.path.stat().st_mode) == 0o640
    assert stat.S_IMODE(log.path.parent.stat().st_mode) & 0o007 == 0
    log.close()


def test_each_start_has_its_own_file_and_a_second_start_in_the_same_second_appends(tmp_path: Path) -> None:
    first, second = LogFile(tmp_path, "x", _MOMENT), LogFile(tmp_path, "x", _MOMENT)
    later = LogFile(tmp_path, "x", _MOMENT.replace(second=9))
    first.write("first\n")
    second.write("second\n")

    assert first.path.read_text() == "first\nsecond\n"
    assert (tmp_path / "latest").readlink() == Path(later.path.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", first.path.name, later.path.name]
    for log in (first, second, later):
        log.close()


def test_a_deleted_file_comes_back_with_the_next_line(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    log = LogFile(directory, "x", _MOMENT)
    log.write("lost\n")
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()

    log.write("kept\n")

    assert (directory / "latest").read_text() == "kept\n"
    log.close()


def test_a_directory_that_cannot_be_created_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    complaint = r"Can't create a log file in .*file.*choose another --log-dir"
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        LogFile(tmp_path / "file", "x")
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_reported_to_the_writer_and_the_next_line_is_whole(tmp_path: Path) -> None:
    log = LogFile(tmp_path, "x", _MOMENT)
    log.write("before\n")
    file, full = log._descriptor, os.open("/dev/full", os.O_WRONLY)

    log._descriptor = full
    with pytest.raises(OSError) as raised:
        log.write("lost\n")
    assert raised.value.errno == errno.ENOSPC
    log._descriptor = file
    log.write("after\n")

    assert log.path.read_text() == "before\nafter\n"
    os.close(full)
    log.close()


def test_a_line_of_which_only_a_part_fitted_is_ended_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(tmp_path, "x", _MOMENT)
    write = os.write

    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        with pytest.raises(OSError, match="No space"):
            log.write("half\n")
    log.write("whole\n")

    assert log.path.read_text() == "hal\nwhole\n"
    log.close()


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    log = LogFile(tmp_path, "x", _MOMENT)

    log.close()
    log.close()

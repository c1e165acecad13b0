"""Changing and restoring settings, in a directory that replaces /proc/sys."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host import sysctl
from firezone_tunnel.shell.host.sysctl import Sysctls

FORWARD = "net/ipv4/ip_forward"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "sys"
    (root / "net/ipv4/conf/eth0").mkdir(parents=True)
    (root / FORWARD).write_text("0\n")
    (root / "net/ipv4/conf/eth0/rp_filter").write_text("1\n")
    monkeypatch.setattr(sysctl, "PROC_SYS", root)
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "originals.json"


def test_changed_settings_are_restored(kernel: Path, file: Path) -> None:
    sysctls = Sysctls(file)
    sysctls.remember([FORWARD])
    sysctls.write(FORWARD, "1")
    assert sysctls.read(FORWARD) == "1"

    sysctls.restore()

    assert sysctls.read(FORWARD) == "0"
    assert not file.exists()


def test_originals_are_on_disk_before_anything_changes(kernel: Path, file: Path) -> None:
    Sysctls(file).remember([FORWARD])

    assert json.loads(file.read_text())["originals"] == {FORWARD: "0"}


def test_a_successor_restores_the_originals_of_its_predecessor(kernel: Path, file: Path) -> None:
    killed = Sysctls(file)
    killed.remember([FORWARD])
    killed.write(FORWARD, "1")

    successor = Sysctls(file)
    assert successor.recover()
    successor.remember([FORWARD])
    successor.restore()

    assert successor.read(FORWARD) == "0"


def test_without_a_predecessor_there_is_nothing_to_recover(kernel: Path, file: Path) -> None:
    assert not Sysctls(file).recover()


def test_forgotten_settings_stay(kernel: Path, file: Path) -> None:
    sysctls = Sysctls(file)
    sysctls.remember([FORWARD])
    sysctls.write(FORWARD, "1")

    sysctls.forget()
    sysctls.restore()

    assert sysctls.read(FORWARD) == "1"
    assert not file.exists()


def test_an_interface_that_is_gone_is_passed_over(kernel: Path, file: Path) -> None:
    sysctls = Sysctls(file)
    sysctls.remember(["net/ipv4/conf/eth0/rp_filter", FORWARD])
    sysctls.write(FORWARD, "1")
    (kernel / "net/ipv4/conf/eth0/rp_filter").unlink()

    sysctls.restore()

    assert sysctls.read(FORWARD) == "0"


def test_a_setting_that_cannot_be_restored_is_logged_and_the_others_are_restored(
    kernel: Path, file: Path, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    sysctls = Sysctls(file)
    sysctls.remember(["net/ipv4/conf/eth0/rp_filter", FORWARD])
    sysctls.write("net/ipv4/conf/eth0/rp_filter", "2")
    sysctls.write(FORWARD, "1")
    write_text = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if path.name == "rp_filter":
            raise OSError(errno.EINVAL, "Invalid argument")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    sysctls.restore()

    assert sysctls.read(FORWARD) == "0"
    (message,) = [entry for entry in logged if entry["message_type"] == "host:sysctl_not_restored"]
    assert (message["name"], message["value"]) == ("net/ipv4/conf/eth0/rp_filter", "1")


def test_a_setting_that_the_kernel_lacks_is_neither_read_nor_noted(kernel: Path, file: Path) -> None:
    sysctls = Sysctls(file)

    sysctls.remember(["net/ipv6/conf/all/forwarding"])

    assert sysctls.read("net/ipv6/conf/all/forwarding") is None
    assert not file.exists()


def test_settings_are_found_by_pattern(kernel: Path, file: Path) -> None:
    assert Sysctls(file).names("net/ipv4/conf/*/rp_filter") == ["net/ipv4/conf/eth0/rp_filter"]


def test_a_setting_that_has_the_value_is_not_written(kernel: Path, file: Path) -> None:
    (kernel / FORWARD).chmod(0o444)
    before = (kernel / FORWARD).stat().st_mtime_ns

    Sysctls(file).write(FORWARD, "0")

    assert (kernel / FORWARD).stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_file_is_named(kernel: Path, file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)

    with pytest.raises(PlatformError, match=r"originals\.json"):
        Sysctls(file).recover()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_where_the_disk_cannot_be_written_the_originals_are_in_memory(
    kernel: Path, file: Path, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]], number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    sysctls = Sysctls(file)
    assert not sysctls.recover()
    sysctls.remember([FORWARD])
    sysctls.write(FORWARD, "1")

    sysctls.restore()

    assert sysctls.read(FORWARD) == "0"
    (message,) = [entry for entry in logged if entry["message_type"] == "host:originals_not_stored"]
    assert message["path"] == str(file)


def test_a_state_directory_that_may_not_be_read_holds_nothing_of_ours(
    kernel: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(Path, "read_text", refuse)

    assert not Sysctls(file).recover()


def test_a_state_directory_that_is_no_directory_is_named_before_anything_changes(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(PlatformError, match="originals"):
        Sysctls(tmp_path / "file" / "originals.json").remember([FORWARD])

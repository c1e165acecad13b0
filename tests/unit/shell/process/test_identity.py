"""The identity of a device on disk."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.process.identity import load_identity


def test_the_first_identity_is_random_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new/directory/firezone-id.json"

    identity = load_identity(path)

    assert re.fullmatch("[0-9a-f]{64}", identity)
    assert load_identity(path) == identity
    assert json.loads(path.read_text()) == {"id": identity}
    assert load_identity(tmp_path / "other.json") != identity


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_the_file_is_readable_by_its_group_and_no_further(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        load_identity(tmp_path / "state/id.json")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "state/id.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) & 0o007 == 0
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["id.json"]


@pytest.mark.parametrize("text", ['{"id": "abc"}', '{"id":"abc","more":1}\n', "abc", "abc\n"])
def test_both_forms_of_upstream_are_understood_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "id"
    path.write_text(text)

    assert load_identity(path) == "abc"
    assert path.read_text() == text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b'{"id": 5}', b'{"id": ""}', b"two words", b"\x00", b"\xff", b'{"id":"abc"', b"a\nb"]
)
def test_a_file_without_an_identity_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "id"
    path.write_bytes(content)

    with pytest.raises(ConfigurationError, match=str(path)) as raised:
        load_identity(path)

    assert "\n" not in str(raised.value)
    assert path.read_bytes() == content


def test_an_identity_that_cannot_be_stored_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match="give a --firezone-id or --state-dir"):
        load_identity(Path("/proc/firezone/id.json"))  # where no user may create a directory

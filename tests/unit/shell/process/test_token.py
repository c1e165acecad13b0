"""The sources of a token, and its secrecy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firezone_tunnel.errors import ConfigurationError, one_line
from firezone_tunnel.shell.process.settings import read_token

_SECRET = "n.a-secret-token"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid token file."""
    path = tmp_path / "token"
    path.write_text(f"  {_SECRET}-of-the-file\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def credentials(tmp_path: Path) -> str:
    """A directory of systemd credentials that contains ours."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/FIREZONE_TOKEN").write_text(f"{_SECRET}-of-systemd\n")
    return str(tmp_path / "credentials")


def test_the_environment_comes_first_then_the_credential_then_the_file(file: Path, credentials: str) -> None:
    environment = {"FIREZONE_TOKEN": f" {_SECRET}\n", "CREDENTIALS_DIRECTORY": credentials}

    assert read_token(environment, file) == _SECRET
    assert read_token(environment, file) == f"{_SECRET}-of-systemd"
    del environment["CREDENTIALS_DIRECTORY"]
    assert read_token(environment, file) == f"{_SECRET}-of-the-file"


def test_a_token_is_removed_from_the_environment_once_read(file: Path) -> None:
    environment = {"FIREZONE_TOKEN": _SECRET, "OTHER": "stays"}

    read_token(environment, file)

    assert environment == {"OTHER": "stays"}


def test_an_empty_variable_or_credential_counts_as_absent(file: Path, credentials: str, tmp_path: Path) -> None:
    Path(credentials, "FIREZONE_TOKEN").write_text("\n")

    environment = {"FIREZONE_TOKEN": " ", "CREDENTIALS_DIRECTORY": credentials}
    assert read_token(environment, file) == f"{_SECRET}-of-the-file"
    assert read_token({"CREDENTIALS_DIRECTORY": str(tmp_path)}, file) == f"{_SECRET}-of-the-file"


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_missing_token_is_an_error_that_names_both_places(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)

    with pytest.raises(ConfigurationError, match=f"No token is configured: set FIREZONE_TOKEN, or put it into {path}"):
        read_token({}, path)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_file_that_only_its_owner_reads_is_accepted(file: Path, mode: int) -> None:
    file.chmod(mode)

    assert read_token({}, file) == f"{_SECRET}-of-the-file"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o700, 0o660])
def test_a_file_that_others_could_read_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)

    _fails(file, "must belong to the user that runs this program, with mode 600")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(file, 65534, 65534)

    _fails(file, "must belong to the user")


def test_a_symlink_is_judged_by_what_it_points_to(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert read_token({}, link) == f"{_SECRET}-of-the-file"

    file.chmod(0o644)
    _fails(link, "chmod 600")


@pytest.mark.parametrize("content", [b"\xff\xfe" + _SECRET.encode(), _SECRET.encode() + b"\x80"])
def test_a_file_that_is_not_text_is_refused_without_quoting_it(file: Path, content: bytes) -> None:
    file.write_bytes(content)

    _fails(file, "does not hold a token: it is not UTF-8 text")


def test_a_directory_in_its_place_is_reported_in_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o400)  # otherwise it would be refused for its mode
    try:
        _fails(tmp_path, "Can't read the token in .*: Is a directory")
    finally:
        tmp_path.chmod(0o700)


def _fails(path: Path, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        read_token({}, path)
    text = one_line(raised.value)
    assert str(path) in text
    assert "a-secret-token" not in text
    assert "0xff" not in text

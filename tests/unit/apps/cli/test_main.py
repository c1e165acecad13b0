"""The output and exit codes of the `firezone-tunnel` command."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel import __version__
from firezone_tunnel.apps.cli.diagnose import CheckState, Finding, is_usable
from firezone_tunnel.apps.cli.main import main
from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.core.portal.seed import SeedContext, parse_seed

_ROOT = Path(__file__).parents[4]


def test_help_lists_exactly_the_commands() -> None:
    done = CliRunner().invoke(main, ["--help"])

    commands = done.output.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in commands if line.strip()] == ["diagnose", "portal", "token"]
    assert CliRunner().invoke(main, ["--version"]).output == f"{__version__}\n"


def test_a_token_is_random_and_comes_with_the_hash_that_the_portal_knows_it_by() -> None:
    made = [json.loads(CliRunner().invoke(main, ["token", "--json"]).output) for _ in range(2)]

    assert made[0]["token"] != made[1]["token"]
    assert len(made[0]["token"]) >= 43  # 32 random bytes
    for entry in made:
        assert entry["sha3_256"] == hashlib.sha3_256(entry["token"].encode()).hexdigest()


def test_the_hash_is_printed_as_the_seed_file_has_it() -> None:
    first, second = CliRunner().invoke(main, ["token"]).output.splitlines()

    token = first.removeprefix("token:").strip()
    assert second == f'sha3_256 = "{hashlib.sha3_256(token.encode()).hexdigest()}"'


@pytest.mark.parametrize(
    ("arguments", "role", "owner"),
    [
        (("--client", "Me"), PeerRole.CLIENT, "Me"),
        (("--gateway", "HQ"), PeerRole.GATEWAY, "HQ"),
        (("--relay",), PeerRole.RELAY, "acme"),
    ],
)
def test_the_table_of_a_token_is_pasted_as_it_is(arguments: tuple[str, ...], role: PeerRole, owner: str) -> None:
    first, table = CliRunner().invoke(main, ["token", *arguments]).output.split("\n", 1)
    record = json.loads(CliRunner().invoke(main, ["token", *arguments, "--json"]).output)

    account = parse_seed(_SEED + table, SeedContext(str, ZoneInfo)).account
    token = account.token(role, first.removeprefix("token:").strip(), utc_now=0)
    assert token is not None
    names = {one.id: one.name for one in (*account.actors.values(), *account.sites.values())} | {
        account.id: account.slug
    }
    assert names[token.owner] == owner
    pasted = parse_seed(f"{_SEED}\n{record['seed']}\n", SeedContext(str, ZoneInfo)).account
    assert pasted.token(role, record["token"], utc_now=0) is not None


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_name_is_quoted(name: str) -> None:
    table = CliRunner().invoke(main, ["token", "--client", name]).output.partition("\n")[2]

    assert tomllib.loads(table)["tokens"][0]["actor"] == name


def test_a_token_is_for_one_role() -> None:
    done = CliRunner().invoke(main, ["token", "--client", "Me", "--relay"])

    assert done.exit_code == 2
    assert "exclude each other" in done.output


def test_a_valid_seed_file_is_summed_up(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a token")
    path = _write(tmp_path, _SEED + '[[tokens]]\nkind = "relay"\ntoken_file = "token"\n')

    done = CliRunner().invoke(main, ["portal", "check", path])

    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "warning: [[sites]] 'HQ' in line 4: no token of kind gateway is for this site, so nothing can reach it",
        "warning: [[groups]] 'Everyone' in line 6: no actor is a member",
        f"{path} is valid (sites: 1, groups: 1, actors: 1, tokens: 1)",
    ]


def test_all_errors_of_a_seed_file_are_printed(tmp_path: Path) -> None:
    path = _write(tmp_path, _SEED + '[[sites]]\nname = ""\n[[tokens]]\nkind = "relai"\n')

    done = CliRunner().invoke(main, ["portal", "check", path])

    assert done.exit_code == 1
    first, second = done.output.splitlines()
    assert first == "error: [[sites]] '' in line 11: `name` must be text of 1 to 255 characters"
    assert second.startswith("error: [[tokens]] in line 13: `kind` can't be 'relai'; did you mean 'relay'? (known: ")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file or directory"), (b"\xff", "is not UTF-8 text"), (b"[account", "not valid TOML in line 1")],
)
def test_a_seed_file_that_cannot_be_read_is_one_error(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "portal.toml"
    if content is not None:
        path.write_bytes(content)

    done = CliRunner().invoke(main, ["portal", "check", str(path)])

    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


def test_the_table_and_the_object_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firezone_tunnel.apps.cli.main.look_at_host", lambda *_: _FINDINGS)

    table = CliRunner().invoke(main, ["diagnose"], env={"COLUMNS": "200"})
    record = CliRunner().invoke(main, ["diagnose", "--json"])

    assert (table.exit_code, record.exit_code) == (1, 1)
    assert json.loads(record.output)["client"] is True
    assert json.loads(record.output)["gateway"] is False
    assert json.loads(record.output)["checks"][1] == {
        "check": "nftables",
        "state": "missing",
        "found": "no [nft]",
        "advice": "install it",
        "needed_by": ["gateway"],
    }
    lines = [line.split() for line in table.output.splitlines()]
    assert ["nftables", "missing", "no", "[nft]", "install", "it"] in lines
    assert table.output.endswith("This host can run a client.\nThis host can't run a gateway.\n")


def test_a_limit_does_not_stop_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("udp offloads", CheckState.LIMIT, "without GSO", "a newer kernel")]
    monkeypatch.setattr("firezone_tunnel.apps.cli.main.look_at_host", lambda *_: findings)

    assert is_usable(findings, "client")
    assert CliRunner().invoke(main, ["diagnose"]).exit_code == 0


def test_the_portal_is_checked_only_if_it_is_named() -> None:
    with _server(b"HTTP/1.1 401 Unauthorized\r\n\r\n") as port:
        answers = _portal(f"ws://127.0.0.1:{port}")
    refuses = _portal(f"ws://127.0.0.1:{port}")

    assert answers == {"state": "ok", "found": f"ws://127.0.0.1:{port} answers at 127.0.0.1"}
    assert refuses["state"] == "missing"
    assert "does not answer: Connection refused" in refuses["found"]
    assert "must begin with https://" in _portal("portal.example")["found"]
    unasked = json.loads(CliRunner().invoke(main, ["diagnose", "--json"], env={"FIREZONE_API_URL": None}).output)
    assert "portal" not in {check["check"] for check in unasked["checks"]}


@pytest.mark.parametrize(
    ("scheme", "answer", "reason"),
    [
        ("wss", b"no TLS\r\n", "the TLS handshake is missing: "),
        ("wss", b"", "the TLS handshake is missing: "),
        ("wss", None, "the TLS handshake is missing: "),
        ("ws", b"", "the answer to the WebSocket upgrade is missing: the portal dropped the connection"),
        ("ws", None, "the answer to the WebSocket upgrade is missing: timed out"),
        ("ws", b"SSH-2.0-OpenSSH_9.6\r\n", "what answers is not HTTP"),
        ("ws", b"HTTP/1.1 200 OK\r\n\r\n", "what answers is not a portal: HTTP 200"),
        ("ws", b"HTTP/1.1 302 Found\r\n\r\n", "what answers is not a portal: HTTP 302"),
    ],
)
def test_what_accepts_tcp_but_is_no_portal_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, scheme: str, answer: bytes | None, reason: str
) -> None:
    monkeypatch.setattr("firezone_tunnel.apps.cli.diagnose._PORTAL_TIMEOUT", 0.5)
    with _server(answer) as port:
        found = _portal(f"{scheme}://127.0.0.1:{port}")

    assert found["state"] == "missing"
    assert reason in found["found"]


def test_it_loads_no_reactor() -> None:
    script = "import sys, firezone_tunnel.apps.cli.main; print('twisted.internet.reactor' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


_SEED = """\
[account]
name = "Acme"
slug = "acme"
[[sites]]
name = "HQ"
[[groups]]
name = "Everyone"
[[actors]]
name = "Me"
"""
_FINDINGS = [
    Finding("privileges", CheckState.OK, "root"),
    Finding("nftables", CheckState.MISSING, "no [nft]", "install it", needed_by=("gateway",)),
]


@contextlib.contextmanager
def _server(answer: bytes | None) -> Iterator[int]:
    """The port of a server that gives one client this answer, and drops it; None: no answer."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1)
            if answer is None:
                done.wait(10)
            else:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(4096):
                        pass

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        done.set()
        thread.join(10)


def _write(directory: Path, seed: str) -> str:
    path = directory / "portal.toml"
    path.write_text(seed)
    return str(path)


def _portal(url: str) -> dict[str, str]:
    """The state and result of the portal check."""
    done = CliRunner().invoke(main, ["diagnose", "--json", "--api-url", url])
    (found,) = [check for check in json.loads(done.output)["checks"] if check["check"] == "portal"]
    return {"state": found["state"], "found": found["found"]}

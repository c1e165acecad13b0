"""SIGTERM ends a portal and a relay within five seconds, whatever hangs."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hanging import hanging
from tests.polling import until
from tests.system.programs import Program

_ROOT = Path(__file__).parents[2]
_TWISTD = str(Path(sys.executable).with_name("twistd"))
_SEED = """
[account]
name = "Test"
slug = "test"
"""
_RELAY = ("--public-ip4-addr", "127.0.0.1", "--health-check-addr", "off", "--bind-ip4-addr", "127.0.0.1")
LIMIT = 5.0


@pytest.fixture
def mute() -> Iterator[tuple[str, int]]:
    """The address of a server that accepts TCP and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


def test_a_resolver_that_never_answers_does_not_hold_up_the_end(tmp_path: Path) -> None:
    relay = _start_relay(tmp_path, "wss://portal.example/", hang="socket.getaddrinfo")
    relay.wait_for("portal:connection_stalled", missing="the address of portal.example")

    assert _end(relay) < LIMIT
    assert list(relay.events("process:end_forced")) == []


@pytest.mark.parametrize(("scheme", "missing"), [("ws", "the answer to the WebSocket upgrade"), ("wss", "TLS")])
def test_a_portal_that_does_not_answer_does_not_hold_up_the_end(
    tmp_path: Path, mute: tuple[str, int], scheme: str, missing: str
) -> None:
    started = time.monotonic()
    relay = _start_relay(tmp_path, f"{scheme}://127.0.0.1:{mute[1]}/")

    stalled = relay.wait_until(lambda: next(relay.events("portal:connection_stalled"), None), "stalling")

    assert missing in stalled["missing"]
    assert stalled["portal"].startswith(f"{scheme}://127.0.0.1:{mute[1]}")
    assert time.monotonic() - started < 5.0 + 5.0  # the start of the process takes a part of it
    assert _end(relay) < LIMIT
    assert list(relay.events("process:end_forced")) == []


@pytest.mark.parametrize("is_serving", [False, True])
def test_a_locked_database_does_not_hold_up_the_end(tmp_path: Path, is_serving: bool) -> None:
    database = tmp_path / "portal.sqlite3"
    with contextlib.ExitStack() as stack:
        if not is_serving:
            _lock(stack, database)
        portal = _start_portal(tmp_path, database)
        if is_serving:
            portal.wait_ready()
            _lock(stack, database)
            portal.send_signal(signal.SIGHUP)  # it reviews what is stored
            time.sleep(0.5)  # until it waits for the lock: nothing shows that
        else:
            until(lambda: _has_open(portal, database), "the database being opened")

        assert _end(portal) < LIMIT


def test_a_reactor_that_hangs_does_not_hold_up_the_end_and_is_named(tmp_path: Path) -> None:
    relay = _start_relay(tmp_path, "ws://127.0.0.1:1/", hang="firezone_tunnel.shell.portal_link.service.MarkedEndpoint")
    until((tmp_path / "hanging/called").exists, "the reactor hanging")

    assert _end(relay) < LIMIT
    (forced,) = relay.events("process:end_forced")
    assert any(place.startswith("MainThread: hang (") for place in forced["threads"])


def _end(program: Program) -> float:
    """Send SIGTERM. Returns the seconds until the end, which must be one in good order for the caller."""
    started = time.monotonic()
    program.terminate()
    assert program.wait_exit(20) == 0
    return time.monotonic() - started


def _lock(stack: contextlib.ExitStack, database: Path) -> None:
    lock = stack.enter_context(contextlib.closing(sqlite3.connect(database, isolation_level=None)))
    lock.execute("BEGIN EXCLUSIVE")


def _has_open(program: Program, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # a descriptor that was closed meanwhile
        return any(link.resolve() == path for link in Path(f"/proc/{program.pid}/fd").iterdir())
    return False


def _start_relay(directory: Path, url: str, hang: str | None = None) -> Program:
    return _start(directory, "firezone-relay", *_RELAY, "--api-url", url, hang=hang)


def _start_portal(directory: Path, database: Path) -> Program:
    (directory / "portal.toml").write_text(_SEED)
    options = ("--seed", "portal.toml", "--listen", "127.0.0.1:0", "--database", str(database))
    return _start(directory, "firezone-portal", *options)


def _start(directory: Path, *command: str, hang: str | None = None) -> Program:
    """`hang` is a callable that never returns in the process."""
    paths = [str(_ROOT)]
    if hang is not None:
        paths.insert(0, str(hanging(directory, hang)))
    return Program(
        command[0],
        [_TWISTD, "-n", "--pidfile=", *command, "--log-format", "json"],
        environment={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(paths), "FIREZONE_TOKEN": ".token"},
        log=directory / "output.log",
        notify_socket=directory / "notify",
        working_directory=directory,
    )

"""A user's program, checked by mypy --strict without our configuration: the public names have their types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import firezone_tunnel
from firezone_tunnel import aio

_ROOT = Path(__file__).parents[1]
_CACHE = _ROOT / ".mypy_cache/user"  # kept, since most of the time goes into our dependencies

_PROGRAM = """
from ipaddress import IPv4Address
from pathlib import Path
from typing import assert_type

from firezone_tunnel import (
    Disconnected, Event, EventStream, FirezoneError, GatewayService, PortalService, RelayService, ResourcesUpdated,
    ResourceView, Session, TunInterfaceUpdated, aio
)
from twisted.internet import reactor
from twisted.internet.defer import Deferred

async def watch() -> None:
    session, events = Session.connect(url="wss://portal.example/", token="t", state_directory="x", ca_file=Path("x"))
    assert_type(session, Session)
    assert_type(session.close(), Deferred[None])
    assert_type(events, EventStream)
    assert_type(events.next(), Deferred[Event | None])
    assert_type(events.dropped, int)
    async for event in events:
        match event:
            case TunInterfaceUpdated(ipv4=ipv4):
                assert_type(ipv4, IPv4Address | None)
            case ResourcesUpdated(resources):
                assert_type(resources, tuple[ResourceView, ...])
            case Disconnected(error):
                assert_type(error, FirezoneError)

async def watch_on_asyncio() -> None:
    async with aio.Session.connect(url="wss://portal.example/", token="t", state_directory=Path("state")) as connected:
        assert_type(connected.session, aio.Session)
        assert_type(await connected.events.next(), Event | None)
        assert_type(await connected.events.__anext__(), Event)

gateway = GatewayService(reactor, url="wss://portal.example/", token="t", state_directory="state")
assert_type(gateway.failed, Deferred[FirezoneError])
relay = RelayService(reactor, public_ipv4="203.0.113.7", users={"alice": "secret"})
assert_type(relay.ready, Deferred[None])
portal = PortalService(reactor, listen=("127.0.0.1", 8081), seed_path=Path("portal.toml"), database="portal.sqlite3")
assert_type(portal.reload(), Deferred[bool])
"""

_MISUSE = """
from firezone_tunnel import EventStream, GatewayService, Session, NoSuchName
import firezone_tunnel

firezone_tunnel.no_such_name
Session.connect(url="wss://portal.example/")
Session.connect(url=7, token="t")
GatewayService(None, url="wss://portal.example/", token="t", state_directory=None)

def produce(events: EventStream) -> None:
    events.put(None)
"""

_NAMES = [f"firezone_tunnel.{name}" for name in firezone_tunnel.__all__] + [f"aio.{name}" for name in aio.__all__]
_REVEALS = "import firezone_tunnel\nfrom firezone_tunnel import aio\n" + "".join(
    f"reveal_type({it})\n" for it in _NAMES
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines that mypy --strict prints about the programs. It keeps silent about us, as if we were installed."""
    directory = tmp_path_factory.mktemp("user")
    programs = {"program.py": _PROGRAM, "misuse.py": _MISUSE, "names.py": _REVEALS}
    for name, text in programs.items():
        (directory / name).write_text(text)
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--no-error-summary", f"--cache-dir={_CACHE}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *programs],
        cwd=directory,
        env={"MYPYPATH": str(_ROOT), "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_users_program_sees_every_type(report: list[str]) -> None:
    assert [line for line in report if line.startswith("program.py")] == []


def test_every_public_name_has_a_type(report: list[str]) -> None:
    lines = [line.partition("note: Revealed type is ")[2] for line in report if line.startswith("names.py")]

    assert len(lines) == len(_NAMES)
    assert [name for name, line in zip(_NAMES, lines, strict=True) if line in {"", '"Any"'}] == []


def test_a_users_bugs_are_found(report: list[str]) -> None:
    errors = [line for line in report if line.startswith("misuse.py") and ": error:" in line]

    kinds = [re.sub(r".*\[([a-z-]+)\]$", r"\1", line) for line in errors]
    assert kinds == ["attr-defined", "attr-defined", "call-arg", "arg-type", "arg-type", "attr-defined"]

"""Start one of our own programs under unusual conditions, and read its output on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.system.hosts import Host
from tests.system.network import PORTAL
from tests.system.product import CLIENT_TOKEN, GATEWAY_TOKEN, PORTAL_PORT
from tests.system.programs import Program

TOKENS = {"client": CLIENT_TOKEN, "gateway": GATEWAY_TOKEN}
_TWISTD = Path(sys.executable).with_name("twistd")


def start(
    host: Host,
    role: str,
    *arguments: str,
    before: str = "true",
    wrapper: tuple[str, ...] = (),
    token: str | None = None,
    **environment: str,
) -> Program:
    """Start a client, gateway or portal, after running the shell commands `before` in its mount namespace.

    `wrapper` is a command that runs another command. The default `token` is the demo's.
    """
    own = {
        "FIREZONE_API_URL": f"ws://{PORTAL}:{PORTAL_PORT}",
        "FIREZONE_NAME": role,
        "FIREZONE_LOG_FORMAT": "json",
        "FIREZONE_LOG_LEVEL": "debug",
        "FIREZONE_TOKEN": TOKENS.get(role, "") if token is None else token,
    }
    paths: tuple[str, ...] = ("--state-dir", str(host.state_directory))
    if role == "portal":
        paths = ("--database", str(host.state_directory / "portal.sqlite3"), "--listen", f"{PORTAL}:{PORTAL_PORT}")
    command = (*wrapper, str(_TWISTD), "-n", "--pidfile=", f"firezone-{role}", *paths, *arguments)
    return host.spawn(role, "sh", "-c", f'{before} && exec "$@"', "sh", *command, environment=own | environment)


def said(program: Program) -> list[str]:
    """The lines on stderr: all output except for the log, whose lines are JSON."""
    return [line for line in program.output().splitlines() if not _is_json(line)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

"""nftables through the `nft` program. All calls block."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from firezone_tunnel.errors import PlatformError

_TIMEOUT = 30.0


def run(script: str) -> None:
    """Apply a script atomically.

    Raises: PlatformError.
    """
    _nft(["-f", "-"], script)


def rules() -> list[dict[str, Any]]:
    """The whole rule set: tables, chains and rules as `nft --json` lists them, each in a dict under its kind.

    Raises: PlatformError.
    """
    listed: list[dict[str, Any]] = json.loads(_nft(["--json", "--handle", "--terse", "list", "ruleset"], ""))[
        "nftables"
    ]
    return listed


def _nft(arguments: list[str], script: str) -> str:
    try:
        done = subprocess.run(
            ["nft", *arguments], input=script, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise PlatformError("Can't run nft, the program was not found: install the package nftables") from error
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            f"nft did not finish within {_TIMEOUT:.0f} seconds: check whether another program locks the rule set"
        ) from error
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PlatformError(f"nft failed ({reason[0]}): run as root or with CAP_NET_ADMIN")
    return done.stdout

"""nftables through the `nft` program. Everything here blocks."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from firezone_tunnel.errors import PlatformError

_TIMEOUT = 30.0


def run(script: str) -> None:
    """Carry out a script, all of it or nothing.

    Raises: PlatformError.
    """
    _nft(["-f", "-"], script)


def rules() -> list[dict[str, Any]]:
    """The whole rule set: tables, chains and rules as `nft --json` gives them, each in a dict under its kind.

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
        raise PlatformError("The program nft is missing: install the package nftables") from error
    except subprocess.TimeoutExpired as error:
        raise PlatformError("nft did not answer: is another program holding the rule set?") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["no reason given"]
        raise PlatformError(f"nft refused our rules ({reason[0]}): run as root or with CAP_NET_ADMIN")
    return done.stdout

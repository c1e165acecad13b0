"""nftables through the `nft` program. All calls block."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.parts import Change

_TIMEOUT = 30.0


class OwnTable:
    """A table of ours in the family inet, with everything in it."""

    def __init__(self, name: str, content: str) -> None:
        """`content` is what nft(8) expects between the braces of the table."""
        self._name = name
        self.content = content
        self._listed: list[Any] | None = None  # as it was right after it was made
        self._made: str | None = None

    @property
    def is_made(self) -> bool:
        return self._made is not None

    def put_right(self) -> list[Change]:
        """Make the table, in one transaction, unless it is as it was made.

        Raises: PlatformError.
        """
        if self._made == self.content and self._listed == self._list():
            return []
        run(f"{self._gone()}table inet {self._name} {{\n{self.content}}}\n")
        self._listed, self._made = self._list(), self.content
        return [Change(f"the nftables table inet {self._name}")]

    def remove(self) -> None:
        """
        Raises: PlatformError.
        """
        run(self._gone())
        self._listed = self._made = None

    def _gone(self) -> str:
        """Delete the table. Adding it first avoids an error if it does not exist."""
        return f"add table inet {self._name}\ndelete table inet {self._name}\n"

    def _list(self) -> list[Any] | None:
        """The table without what differs from one making to the next; None if it does not exist."""
        try:
            listed = _nft(["--json", "--terse", "list", "table", "inet", self._name], "")
        except PlatformError:
            return None
        return [_without_numbers(item) for item in json.loads(listed)["nftables"] if "metainfo" not in item]


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


_NUMBERS = frozenset({"handle", "packets", "bytes"})


def _without_numbers(item: Any) -> Any:
    """Without handles, and without the values of counters."""
    if isinstance(item, dict):
        return {key: _without_numbers(value) for key, value in item.items() if key not in _NUMBERS}
    return [_without_numbers(value) for value in item] if isinstance(item, list) else item


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

"""Finds tables and keys of a TOML text, for messages about them. tomllib keeps no positions."""

from __future__ import annotations

import re
import tomllib
from functools import cached_property
from typing import Any

_HEADER = re.compile(r"\s*\[{1,2}\s*\"?([\w-]+)\"?\s*\]{1,2}\s*(?:#.*)?")


class SeedLines:
    """A valid TOML text and what it contains. Lines count from 1."""

    def __init__(self, text: str, content: dict[str, Any]) -> None:
        self._lines = text.replace("\r\n", "\n").split("\n")
        self._content = content

    def find(self, kind: str, number: int | None, key: str | None = None) -> int | None:
        """The line of a key in the `number`-th table of this kind, else that of the table's header.

        None if the text has no such header, as in an inline table.
        """
        headers = self._headers_of(kind)
        if (number or 0) >= len(headers):
            return self._find_key(0, kind)
        header = headers[number or 0]
        return (self._find_key(header, key) if key is not None else None) or header

    def _headers_of(self, kind: str) -> list[int]:
        headers = self._headers.get(kind, [])
        if len(headers) != self._count(self._content, kind):  # some are lines of a text, or the tables are inline
            found: list[int] = []
            for header in headers:
                if self._count_before(header, kind) == len(found):
                    found.append(header)
            self._headers[kind] = headers = found
        return headers

    @cached_property
    def _headers(self) -> dict[str, list[int]]:
        headers: dict[str, list[int]] = {}
        for place, line in enumerate(self._lines, 1):
            found = _HEADER.fullmatch(line)
            if found is not None:
                headers.setdefault(found[1], []).append(place)
        return headers

    def _find_key(self, after: int, key: str) -> int | None:
        """The first line with `key =` after this line, and before the next header."""
        assignment = re.compile(rf'\s*"?{re.escape(key)}"?\s*[=.]')
        for place, line in enumerate(self._lines[after:], after + 1):
            if _HEADER.fullmatch(line):
                return None
            if assignment.match(line):
                return place
        return None

    def _count_before(self, line: int, kind: str) -> int | None:
        """The number of tables before a line; None if the line is within a value."""
        try:
            return self._count(tomllib.loads("\n".join(self._lines[: line - 1])), kind)
        except tomllib.TOMLDecodeError:
            return None

    @staticmethod
    def _count(content: dict[str, Any], kind: str) -> int:
        found = content.get(kind, [])
        return len(found) if isinstance(found, list) else 1

"""A reactor whose turns a test runs one at a time. It only reads: that is all that timers need."""

from __future__ import annotations

import select
from typing import Any


class Turns:
    def __init__(self) -> None:
        self.readers: list[Any] = []

    def addReader(self, reader: Any) -> None:
        self.readers.append(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.remove(reader)

    def run(self) -> None:
        """Run one turn: whatever can be read now, without waiting."""
        for reader in select.select(list(self.readers), [], [], 0)[0]:
            reader.doRead()

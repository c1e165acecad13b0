"""Views of equal records in one buffer, and a bounded memory for them: making views is what costs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Buffer = bytearray | memoryview

MAX_LAYOUTS = 16

_Layout = TypeVar("_Layout")


class Layouts(Generic[_Layout]):
    """The layouts used last. Remote hosts choose sizes, so there is a bound."""

    __slots__ = ("_known", "_latest")

    def __init__(self) -> None:
        self._known: dict[Hashable, _Layout] = {}
        self._latest: Hashable = None

    def get(self, key: Hashable) -> _Layout | None:
        layout = self._known.get(key)
        if layout is not None and key != self._latest:
            self._known[key] = self._known.pop(key)
            self._latest = key
        return layout

    def put(self, key: Hashable, layout: _Layout) -> _Layout:
        if len(self._known) == MAX_LAYOUTS:
            del self._known[next(iter(self._known))]
        self._known[key] = layout
        self._latest = key
        return layout


def column(memory: Buffer, kind: str, offset: int, stride: int, rows: int) -> npt.NDArray[Any]:
    """One field of all records, as an array over `memory`."""
    return np.ndarray((rows,), kind, memory, offset, (stride,))


def block(memory: Buffer, offset: int, stride: int, rows: int, length: int) -> npt.NDArray[np.uint8]:
    """The same `length` bytes of all records, as a two-dimensional array over `memory`."""
    return np.ndarray((rows, length), np.uint8, memory, offset, (stride, 1))

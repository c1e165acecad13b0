"""Records of equal size in one buffer, views of their fields, and a bounded cache of these views.

The cache exists because views are expensive to build.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Buffer = bytearray | memoryview

MAX_LAYOUTS = 16

_Layout = TypeVar("_Layout")


class Rows(NamedTuple):
    """Records in `memory`: record i is `size` bytes at `offset + i * stride`, the last of `count` is `last_size` bytes.

    `last_size` is at most `size`. Views of the columns are cached by the identity of `memory`.
    """

    memory: memoryview
    offset: int
    stride: int
    size: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used
    last_size: int

    @classmethod
    def segments(cls, memory: memoryview, length: int, segment_size: int) -> Rows:
        """`length` bytes from the start of `memory`, cut every `segment_size` bytes. A size of 0 means no cut."""
        if not 0 < segment_size < length:
            return cls(memory, 0, length, length, 1, length)
        count = -(-length // segment_size)
        return cls(memory, 0, segment_size, segment_size, count, length - (count - 1) * segment_size)

    @classmethod
    def single(cls, memory: memoryview) -> Rows:
        """All of `memory` as one record."""
        size = len(memory)
        return cls(memory, 0, size, size, 1, size)

    def row(self, index: int) -> memoryview:
        """One record. The index is not checked against `count`."""
        start = self.offset + index * self.stride
        return self.memory[start : start + self.size_of(index)]

    def size_of(self, index: int) -> int:
        return self.last_size if index == self.count - 1 else self.size

    def shrink(self, before: int, after: int) -> Rows:
        """The records without their first `before` and their last `after` bytes."""
        less = before + after
        return Rows(self.memory, self.offset + before, self.stride, self.size - less, self.count, self.last_size - less)

    def part(self, first: int, count: int) -> Rows:
        """`count` records, starting at index `first`."""
        last_size = self.last_size if first + count == self.count else self.size
        return self._replace(offset=self.offset + first * self.stride, count=count, last_size=last_size)

    def parts(self, most: int) -> Iterator[Rows]:
        """Parts of nearly equal size, at most `most` records each."""
        if self.count <= most:
            yield self
            return
        parts = -(-self.count // most)
        bounds = [index * self.count // parts for index in range(parts + 1)]
        for first, after in pairwise(bounds):
            yield self.part(first, after - first)

    def each(self) -> Iterator[memoryview]:
        return map(self.row, range(self.count))


class Layouts(Generic[_Layout]):
    """The layouts used most recently. Their number is bounded because remote hosts choose the sizes."""

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

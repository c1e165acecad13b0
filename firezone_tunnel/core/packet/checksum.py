"""Internet checksums (RFC 1071), their incremental update (RFC 1624), and sums over many rows at once.

A 16-bit ones'-complement sum equals the bytes, read as one big integer, modulo 65,535. Words of any width give the
same result, since 2^16, 2^32, ... are all congruent to 1. Little-endian words give the same sum with its bytes swapped.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MODULUS = 0xFFFF

Sums = npt.NDArray[np.int64]


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The Internet checksum of `data`."""
    value = int.from_bytes(data, "big")
    if len(data) & 1:
        value <<= 8
    return finish(value)


def finish(total: int) -> int:
    """The checksum for a sum of big-endian words. `total` need not be reduced, but is zero only if all words are."""
    return -total % MODULUS if total else MODULUS


def word_sum(data: bytes | bytearray | memoryview) -> int:
    """The sum of the big-endian 16-bit words of `data`, modulo 65,535; an odd last byte is padded with zero."""
    value = int.from_bytes(data, "big")
    return (value << 8 if len(data) & 1 else value) % MODULUS


def update(old_checksum: int, old_word: int, new_word: int) -> int:
    """The checksum after one 16-bit word of the covered data has changed (RFC 1624, equation 3)."""
    total = (~old_checksum & MODULUS) + (~old_word & MODULUS) + new_word
    total = (total & MODULUS) + (total >> 16)
    total = (total & MODULUS) + (total >> 16)
    return ~total & MODULUS


class RowSums:
    """Little-endian word sums of equal byte ranges that lie `stride` bytes apart in one buffer.

    The views are built once. After that `of(rows)` takes one NumPy call if the length is a multiple of four.
    """

    __slots__ = ("_tail", "_weights", "_words")

    def __init__(self, memory: bytearray | memoryview, *, rows: int, stride: int, offset: int, length: int) -> None:
        quads, rest = divmod(length, 4)
        self._words: npt.NDArray[np.uint32] = np.ndarray((rows, quads), "<u4", memory, offset, (stride, 4))
        self._tail: npt.NDArray[np.uint8] | None = None
        self._weights = np.array([1, 256, 1][:rest], np.int64)
        if rest:
            self._tail = np.ndarray((rows, rest), np.uint8, memory, offset + 4 * quads, (stride, 1))

    def of(self, rows: int) -> Sums:
        """The sums of the first `rows` ranges, not reduced; congruent modulo 65,535 to the little-endian word sum."""
        sums: Sums = np.add.reduce(self._words[:rows], axis=1, dtype=np.int64)
        if self._tail is not None:
            sums += self._tail[:rows] @ self._weights
        return sums

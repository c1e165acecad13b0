"""Transport data messages: their format, and the AEAD over rows of them (WireGuard whitepaper, section 5.4.6).

A message is: type 4 (u8), three zero bytes, receiver index (u32), counter (u64), all little-endian; then the
encrypted packet and its 16-byte tag. The nonce is four zero bytes and the counter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.core.packet.layout import Buffer, column

MESSAGE_TYPE = 4
HEADER = struct.Struct("<IIQ")  # type and reserved bytes, receiver index, counter
NONCE = struct.Struct("<4xQ")
HEADER_SIZE = HEADER.size
TAG_SIZE = 16
OVERHEAD = HEADER_SIZE + TAG_SIZE

Job = tuple[memoryview | bytes, memoryview, memoryview]
"""(nonce, packet, packet and tag): the last two start at the same byte."""


def seal_message(cipher: ChaCha20Poly1305, receiver_index: int, counter: int, plaintext: bytes) -> bytes:
    """Seal a single message into memory of its own: a keepalive (empty) or a lone packet."""
    header = HEADER.pack(MESSAGE_TYPE, receiver_index, counter)
    return header + cipher.encrypt(bytes(4) + header[8:], plaintext, None)


def seal_rows(cipher: ChaCha20Poly1305, jobs: Sequence[Job]) -> None:
    """Encrypt packets in place, each with room for its tag behind it."""
    encrypt_into = cipher.encrypt_into
    for nonce, packet, sealed in jobs:
        encrypt_into(nonce, packet, None, sealed)


def open_rows(cipher: ChaCha20Poly1305, jobs: Sequence[Job]) -> list[int]:
    """Decrypt packets in place. Returns the rows that are not authentic."""
    decrypt_into = cipher.decrypt_into
    failed: list[int] = []
    for row, (nonce, packet, sealed) in enumerate(jobs):
        try:
            decrypt_into(nonce, sealed, None, packet)
        except InvalidTag:
            failed.append(row)
    return failed


class NonceRows:
    """NonceRows in a row, shared by all layouts of a buffer."""

    __slots__ = ("counters", "views")

    def __init__(self, rows: int) -> None:
        memory = bytearray(rows * NONCE.size)
        view = memoryview(memory)
        self.counters = column(memory, "<u8", 4, NONCE.size, rows)
        self.views = [view[start : start + NONCE.size] for start in range(0, len(memory), NONCE.size)]


class MessageRows:
    """The views of one layout: messages of `size` bytes, `stride` bytes apart, the first at `offset`."""

    def __init__(self, memory: Buffer, *, offset: int, stride: int, size: int, rows: int) -> None:
        self.stride = stride
        self._view = memoryview(memory)
        self._packet = offset + HEADER_SIZE
        self._length = size - OVERHEAD
        self._jobs: list[Job] = []
        self.starts = column(memory, "<u8", offset, stride, rows)  # type and receiver index
        self.counters = column(memory, "<u8", offset + 8, stride, rows)

    def jobs(self, nonces: NonceRows, count: int) -> list[Job]:
        """The AEAD's arguments for the first `count` messages; views are made when they are first needed."""
        jobs = self._jobs
        view = self._view
        for row in range(len(jobs), count):
            start = row * self.stride + self._packet
            end = start + self._length
            jobs.append((nonces.views[row], view[start:end], view[start : end + TAG_SIZE]))
        return jobs[:count]


def shorten(job: Job, length: int) -> Job:
    """The same for a packet of `length` bytes."""
    nonce, packet, sealed = job
    return nonce, packet[:length], sealed[: length + TAG_SIZE]

"""The framing of netlink(7) messages and their attributes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port: <linux/netlink.h>
_ATTRIBUTE = struct.Struct("=HH")  # length, type


class Message(NamedTuple):
    """One message. `port` is that of the socket that caused it, 0 for the kernel."""

    kind: int
    flags: int
    number: int
    port: int
    body: memoryview


def encode_message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    """A message to the kernel. The length of `body` must be a multiple of four."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, number, 0) + body


def encode_attribute(kind: int, value: bytes) -> bytes:
    """An attribute. The length of `value` must be a multiple of four."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def messages(data: memoryview) -> Iterator[Message]:
    """The whole messages of a datagram; what follows a truncated one is ignored."""
    while len(data) >= HEADER.size:
        length, kind, flags, number, port = HEADER.unpack_from(data)
        if not HEADER.size <= length <= len(data):
            return
        yield Message(kind, flags, number, port, data[HEADER.size : length])
        data = data[_aligned(length) :]


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and value of each whole attribute."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return length + 3 & ~3

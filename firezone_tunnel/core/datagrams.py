"""Batches of datagrams: their largest size, the memory that holds them, and datagrams that arrived together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.sansio import SocketAddress

MAX_SEGMENTS = 64  # Linux, UDP_MAX_SEGMENTS before 6.9
MAX_SEND_SIZE = 65_507  # 65,535 less IPv4 and UDP headers
RECEIVE_BUFFER_SIZE = 65_536  # no batch is larger (Linux, UDP_GRO)


def send_limit(size: int) -> int:
    """How many datagrams of `size` bytes fit into one segmented send."""
    return max(1, min(MAX_SEGMENTS, MAX_SEND_SIZE // max(1, size)))


def receive_buffer(size: int = RECEIVE_BUFFER_SIZE) -> memoryview:
    """Memory for one batch. Transports receive into it, and WireGuard decrypts in it, in place."""
    return memoryview(bytearray(size))


class DatagramBatch:
    """Datagrams of one sender that the kernel received together (UDP_GRO).

    `rows` are their contents, or what is left of them after a relay's channel headers. They are valid until the
    receiver returns.
    """

    __slots__ = ("ecn", "local", "rows", "source")

    def __init__(self, rows: Rows, source: SocketAddress, local: SocketAddress, ecn: int = 0) -> None:
        self.rows = rows
        self.source = source
        self.local = local
        self.ecn = ecn

    @classmethod
    def received(
        cls,
        buffer: memoryview,
        length: int,
        segment_size: int,
        source: SocketAddress,
        local: SocketAddress,
        ecn: int = 0,
    ) -> DatagramBatch:
        """Datagrams of `segment_size` bytes, the last perhaps shorter: `length` bytes from the start of `buffer`.

        A lone datagram has `segment_size == length`.
        """
        return cls(Rows.segments(buffer, length, segment_size), source, local, ecn)

    @property
    def count(self) -> int:
        return self.rows.count

    def __repr__(self) -> str:
        return f"<DatagramBatch {self.count} of {self.rows.size} bytes, {self.source} to {self.local}>"


class SendBuffer:
    """Memory for one segmented send, lent by a pool. The sender releases it after the last attempt."""

    __slots__ = ("_is_lent", "_pool", "memory", "view")

    def __init__(self, pool: BufferPool[Any]) -> None:
        self.memory = bytearray(MAX_SEND_SIZE)
        self.view = memoryview(self.memory)
        self._pool = pool
        self._is_lent = False

    def release(self) -> None:
        """Give the buffer back to its pool.

        Raises: RuntimeError if it was given back already: another send may be using it by now.
        """
        if not self._is_lent:
            raise RuntimeError("a send buffer was released twice")
        self._is_lent = False
        self._pool._idle.append(self)


_Buffer = TypeVar("_Buffer", bound=SendBuffer)


class BufferPool(Generic[_Buffer]):
    """A bounded number of send buffers, made when they are first needed."""

    def __init__(self, make: Callable[[BufferPool[_Buffer]], _Buffer], size: int) -> None:
        self._make = make
        self._unmade = size
        self._idle: list[_Buffer] = []

    @property
    def free(self) -> int:
        return self._unmade + len(self._idle)

    def borrow(self) -> _Buffer | None:
        """A buffer that the caller releases; None while all of them are lent."""
        if self._idle:
            buffer = self._idle.pop()
        elif self._unmade:
            self._unmade -= 1
            buffer = self._make(self)
        else:
            return None
        buffer._is_lent = True
        return buffer

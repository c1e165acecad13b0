"""Open transport data messages a whole batch at a time, in the memory that they were received in.

Views of a layout are made once and kept, as making them is what costs: `benchmarks/core.py` shows the result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.core.datagrams import RECEIVE_BUFFER_SIZE
from firezone_tunnel.core.packet.layout import Layouts, Rows
from firezone_tunnel.core.wireguard.transport_data import (
    HEADER,
    HEADER_SIZE,
    MESSAGE_TYPE,
    NONCE,
    OVERHEAD,
    TAG_SIZE,
    MessageRows,
    NonceRows,
    open_rows,
    shorten,
)

Mask = npt.NDArray[np.bool_]
Counters = npt.NDArray[np.uint64]


class Opened(NamedTuple):
    """The packets of a batch. A packet that is not authentic is undefined; an empty one is a keepalive."""

    packets: Rows
    counters: Counters  # valid until the next batch
    authentic: Mask


def receiver_of(messages: Rows, index: int) -> int | None:
    """The receiver index of one datagram; None if it is not a transport data message."""
    if messages.size_of(index) < OVERHEAD:
        return None
    kind, receiver, _ = HEADER.unpack_from(messages.memory, messages.offset + index * messages.stride)
    return receiver if kind == MESSAGE_TYPE else None


def open_lone(cipher: ChaCha20Poly1305, messages: Rows, index: int) -> tuple[memoryview, int | None]:
    """Authenticate and decrypt one transport data message, in place.

    Lone datagrams have any size: a layout for each would push out those of the batches. Returns the packet, and the
    message's counter; None if it is forged.
    """
    view = messages.memory
    start = messages.offset + index * messages.stride
    counter: int = HEADER.unpack_from(view, start)[2]
    end = start + messages.size_of(index)
    start += HEADER_SIZE
    packet = view[start : end - TAG_SIZE]
    try:
        cipher.decrypt_into(NONCE.pack(counter), view[start:end], None, packet)
    except InvalidTag:
        return packet, None
    return packet, counter


class Opener:
    """Opens batches, and keeps the views of the layouts that it has seen last."""

    def __init__(self) -> None:
        self._nonces = NonceRows(RECEIVE_BUFFER_SIZE // OVERHEAD)
        self._layouts: Layouts[_Received] = Layouts()

    def common_receiver(self, messages: Rows) -> int | None:
        """The receiver index, if every datagram is a transport data message with the same one."""
        count = messages.count
        receiver = receiver_of(messages, count - 1)
        if receiver is None or count == 1:
            return receiver
        starts = self._received(messages).starts[:count].tobytes()
        expected = (MESSAGE_TYPE | receiver << 32).to_bytes(8, "little")
        return receiver if starts == expected * count else None  # faster than NumPy for so few

    def open(self, cipher: ChaCha20Poly1305, messages: Rows, first: int, count: int) -> Opened:
        """Authenticate and decrypt, in place, `count` datagrams from `first` on.

        They must be transport data messages, as `common_receiver` or `receiver_of` determine.
        """
        received = self._received(messages)
        after = first + count
        counters = received.counters[first:after]
        self._nonces.counters[first:after] = counters
        jobs = received.jobs(self._nonces, after)[first:]
        packets = messages.part(first, count).shrink(HEADER_SIZE, TAG_SIZE)
        if packets.last_size != packets.size:
            jobs[-1] = shorten(jobs[-1], packets.last_size)
        authentic = np.ones(count, np.bool_)
        if failed := open_rows(cipher, jobs):
            authentic[failed] = False
        return Opened(packets, counters, authentic)

    def _received(self, messages: Rows) -> _Received:
        memory, offset, stride, size, _, _ = messages
        key = (id(memory), offset, stride, size)
        received = self._layouts.get(key)
        if received is None or received.memory is not memory:
            received = self._layouts.put(key, _Received(memory, offset, stride, size))
        return received


class _Received(MessageRows):
    def __init__(self, memory: memoryview, offset: int, stride: int, size: int) -> None:
        # As many rows as have room for a message's header: the last datagram may be short.
        rows = 1 + (len(memory) - offset - HEADER_SIZE) // stride
        super().__init__(memory, offset=offset, stride=stride, size=size, rows=rows)
        self.memory = memory

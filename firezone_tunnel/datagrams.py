"""What the UDP transport hands to the protocols above it: a batch, not a datagram."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firezone_tunnel.sansio import SocketAddress
    from firezone_tunnel.wireguard.seal import ReceiveBuffer


class DatagramBatch:
    """Datagrams of one sender that the kernel received together (UDP_GRO).

    They stand one after another from the start of `buffer`, `length` bytes in all, `segment_size` bytes each but
    the last, which may be shorter. A datagram that came alone has `segment_size == length`. The buffer is valid
    until the receiver returns. In each datagram, what matters starts after `headroom` bytes (a relay's channel header).
    """

    __slots__ = ("buffer", "ecn", "headroom", "length", "local", "segment_size", "source")

    def __init__(
        self,
        buffer: ReceiveBuffer,
        length: int,
        segment_size: int,
        source: SocketAddress,
        local: SocketAddress,
        ecn: int = 0,
        *,
        headroom: int = 0,
    ) -> None:
        self.buffer = buffer
        self.length = length
        self.segment_size = segment_size
        self.source = source
        self.local = local
        self.ecn = ecn
        self.headroom = headroom

    @property
    def count(self) -> int:
        return -(-self.length // self.segment_size) if self.segment_size else 0

    def __repr__(self) -> str:
        return f"<DatagramBatch {self.count} of {self.segment_size} bytes, {self.source} to {self.local}>"

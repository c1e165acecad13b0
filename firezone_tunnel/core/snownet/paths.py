"""The ways that datagrams can take to a peer: from a socket of ours, or through a relay.

See docs/protocol/data-plane.md, 2.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import attrs

from firezone_tunnel.core.ice.agent import Nominated
from firezone_tunnel.core.ice.candidate import CandidateKind
from firezone_tunnel.core.sansio import Releasable, SocketAddress, Transmit
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.channel_data import HEADER_SIZE, encode_channel_data, write_headers


class Path(Protocol):
    """The way to a peer. Datagrams that can't leave are dropped: the relay of the path is gone."""

    @property
    def name(self) -> str:
        """Either "direct" or "relayed"."""

    @property
    def source(self) -> SocketAddress:
        """The address that the peer sees, or our own before a NAT."""

    @property
    def destination(self) -> SocketAddress: ...

    @property
    def headroom(self) -> int:
        """Bytes that the path needs before each datagram of `send_run`."""

    def send(self, datagrams: Sequence[bytes], *, now: float, ecn: int = 0) -> Transmit | None:
        """Send datagrams of one size, the last may be shorter."""

    def send_run(
        self, payload: memoryview, *, segment_size: int, ecn: int, pooled: Releasable, now: float
    ) -> Transmit | None:
        """Send sealed datagrams that stand in a row, each with the path's headroom before it; `segment_size` counts it,
        and is 0 where there is only one. A payload that can't leave is released.
        """


@attrs.frozen
class DirectPath:
    """Datagrams leave from one of our own addresses, for one of the peer's or for the peer's relay."""

    source: SocketAddress
    destination: SocketAddress
    name: str = attrs.field(default="direct", eq=False)

    headroom: ClassVar[int] = 0

    def send(self, datagrams: Sequence[bytes], *, now: float, ecn: int = 0) -> Transmit | None:
        size = len(datagrams[0]) if len(datagrams) > 1 else 0
        payload = b"".join(datagrams) if size else datagrams[0]
        return Transmit(self.destination, payload, source=self.source, segment_size=size, ecn=ecn)

    def send_run(
        self, payload: memoryview, *, segment_size: int, ecn: int, pooled: Releasable, now: float
    ) -> Transmit | None:
        return Transmit(
            self.destination, payload, source=self.source, segment_size=segment_size, ecn=ecn, pooled=pooled
        )


@attrs.frozen
class RelayedPath:
    """Datagrams go to our relay on a channel; it sends them on from the address `source` that it gave us."""

    source: SocketAddress
    destination: SocketAddress
    allocation: Allocation = attrs.field(repr=False)

    name: ClassVar[str] = "relayed"
    headroom: ClassVar[int] = HEADER_SIZE

    def send(self, datagrams: Sequence[bytes], *, now: float, ecn: int = 0) -> Transmit | None:
        channel = self.allocation.channel_for(self.destination, now)
        relay = self.allocation.active_socket
        if channel is None or relay is None:
            return None
        size = HEADER_SIZE + len(datagrams[0]) if len(datagrams) > 1 else 0
        payload = b"".join(encode_channel_data(channel, datagram) for datagram in datagrams)
        return Transmit(relay, payload, source=self.allocation.active_source, segment_size=size, ecn=ecn)

    def send_run(
        self, payload: memoryview, *, segment_size: int, ecn: int, pooled: Releasable, now: float
    ) -> Transmit | None:
        channel = self.allocation.channel_for(self.destination, now)
        relay = self.allocation.active_socket
        if channel is None or relay is None:
            pooled.release()
            return None
        size = segment_size or len(payload)
        count = -(-len(payload) // size)
        write_headers(payload, channel, size, count, len(payload))
        source = self.allocation.active_source
        return Transmit(relay, payload, source=source, segment_size=segment_size, ecn=ecn, pooled=pooled)


def direct_path(nominated: Nominated) -> DirectPath:
    """The way from a socket of our own; where the peer is at a relay, it counts as relayed."""
    is_relayed = nominated.remote.kind is CandidateKind.RELAYED
    return DirectPath(nominated.source, nominated.destination, "relayed" if is_relayed else "direct")

"""The data path: from clients to peers and back, a whole batch at a time (RFC 8656, sections 11 and 12).

Datagrams of a batch differ by nothing but their content: so one look-up decides for all, one strided copy takes
their channel headers off or puts them on, and one segmented send carries them: 49 datagrams of 1,312 bytes cost less
than 6 microseconds in either direction, a lone one 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from firezone_tunnel.datagrams import DatagramBatch
from firezone_tunnel.packet.layout import block, column
from firezone_tunnel.relaying.addresses import PeerPolicy
from firezone_tunnel.relaying.allocation import Allocation, Channel, family_of
from firezone_tunnel.relaying.outputs import Outbox, RelayTransmit
from firezone_tunnel.relaying.registry import Registry
from firezone_tunnel.sansio import Entropy, SocketAddress
from firezone_tunnel.stun import message as stun
from firezone_tunnel.stun.message import TRANSACTION_ID_SIZE, Kind, Message, Method
from firezone_tunnel.turn.channel import FIRST_CHANNEL, HEADER, HEADER_SIZE, LAST_PARSED_CHANNEL
from firezone_tunnel.wireguard.seal import MAX_SEGMENTS, MAX_SEND_SIZE

POOL_SIZE = 32
_MAX_INDICATED = MAX_SEND_SIZE - 52
"""Bytes of data that fit an indication: header, XOR-PEER-ADDRESS of IPv6, the head of DATA and its padding."""


class Rows(NamedTuple):
    """Payloads in memory: the i-th is `size` bytes at `offset + i * stride` of `memory`, the last one `last_size`."""

    memory: memoryview
    offset: int
    stride: int
    size: int
    datagrams: int
    last_size: int

    @classmethod
    def of(cls, batch: DatagramBatch) -> Rows:
        """The datagrams of a batch as they are."""
        size, count = batch.segment_size, batch.count
        return cls(batch.buffer.view, 0, size, size, count, batch.length - (count - 1) * size)

    def cut(self, most: int) -> Iterator[Rows]:
        """Nearly equal parts of at most `most` rows each."""
        parts = -(-self.datagrams // most)
        first = 0
        for part in range(1, parts + 1):
            after = part * self.datagrams // parts
            last_size = self.last_size if after == self.datagrams else self.size
            yield self._replace(offset=self.offset + first * self.stride, datagrams=after - first, last_size=last_size)
            first = after

    def each(self) -> Iterator[memoryview]:
        for index in range(self.datagrams):
            start = self.offset + index * self.stride
            yield self.memory[start : start + (self.last_size if index == self.datagrams - 1 else self.size)]


class ChannelRows(NamedTuple):
    number: int
    rows: Rows


class RelayBuffer:
    """Room for one segmented send. Whoever sends gives it back to its pool."""

    __slots__ = ("_idle", "memory", "view")

    def __init__(self, idle: list[RelayBuffer]) -> None:
        self.memory = bytearray(MAX_SEND_SIZE)
        self.view = memoryview(self.memory)
        self._idle = idle

    def release(self) -> None:
        self._idle.append(self)


class BufferPool:
    """A bounded number of buffers, made when they are first needed."""

    def __init__(self, size: int = POOL_SIZE) -> None:
        self._unmade = size
        self._idle: list[RelayBuffer] = []

    @property
    def free(self) -> int:
        return self._unmade + len(self._idle)

    def borrow(self) -> RelayBuffer | None:
        if self._idle:
            return self._idle.pop()
        if not self._unmade:
            return None
        self._unmade -= 1
        return RelayBuffer(self._idle)


class Gathered(NamedTuple):
    payload: bytes | memoryview
    segment_size: int
    buffer: RelayBuffer | None


def common_channel(batch: DatagramBatch) -> ChannelRows | None:
    """The payloads, if all datagrams are channel data of one channel and one length, the last one perhaps shorter.

    None also for channel data without payload: segmentation can't express that.
    """
    size, count = batch.segment_size, batch.count
    last_size = batch.length - (count - 1) * size
    view = batch.buffer.view
    if count <= 1 or last_size < HEADER_SIZE:
        return None
    number, length = HEADER.unpack_from(view, 0)
    last_number, last_length = HEADER.unpack_from(view, (count - 1) * size)
    if not FIRST_CHANNEL <= number <= LAST_PARSED_CHANNEL or last_number != number:
        return None
    if not 0 < last_length <= length <= size - HEADER_SIZE or last_length > last_size - HEADER_SIZE:
        return None
    headers = column(view, "<u4", 0, size, count - 1).tobytes()
    if headers != headers[:HEADER_SIZE] * (count - 1):  # faster than NumPy for so few
        return None
    return ChannelRows(number, Rows(view, HEADER_SIZE, size, length, count, last_length))


def lone_channel(datagram: memoryview) -> ChannelRows | None:
    """The payload of one datagram of channel data. Padding behind it is left out (RFC 8656, section 12.5)."""
    if len(datagram) < HEADER_SIZE:
        return None
    number, length = HEADER.unpack_from(datagram)
    if not FIRST_CHANNEL <= number <= LAST_PARSED_CHANNEL or length > len(datagram) - HEADER_SIZE:
        return None
    return ChannelRows(number, Rows(datagram, HEADER_SIZE, len(datagram), length, 1, length))


def gather(rows: Rows, pool: BufferPool, channel: int | None = None) -> Gathered | None:
    """Put payloads one behind another, each after a header of `channel` if that is given. None: no buffer is free.

    They must fit one send, as `send_limit` says.
    """
    memory, offset, stride, size, count, last_size = rows
    if count == 1:
        header = b"" if channel is None else HEADER.pack(channel, last_size)
        return Gathered(header + memory[offset : offset + last_size], 0, None)
    buffer = pool.borrow()
    if buffer is None:
        return None
    headroom = 0 if channel is None else HEADER_SIZE
    slot = headroom + size
    last = (count - 1) * slot
    block(buffer.memory, headroom, slot, count - 1, size)[:] = block(memory, offset, stride, count - 1, size)
    start = offset + (count - 1) * stride
    buffer.memory[last + headroom : last + headroom + last_size] = memory[start : start + last_size]
    if channel is not None:
        column(buffer.memory, ">u4", 0, slot, count - 1)[:] = channel << 16 | size
        HEADER.pack_into(buffer.memory, last, channel, last_size)
    return Gathered(buffer.view[: last + headroom + last_size], slot, buffer)


def send_limit(size: int) -> int:
    """How many datagrams of `size` bytes leave in one segmented send."""
    return max(1, min(MAX_SEGMENTS, MAX_SEND_SIZE // max(1, size)))


class Forwarder:
    """Relays payloads. Who may send to whom was decided when channels were bound and permissions installed."""

    def __init__(
        self, registry: Registry, policy: PeerPolicy, outbox: Outbox, entropy: Entropy, pool: BufferPool
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._outbox = outbox
        self._entropy = entropy
        self._pool = pool

    def from_channel(self, client: SocketAddress, data: ChannelRows, ecn: int, now: float) -> None:
        """Channel data of a client, on its way to the peer."""
        counters = self._outbox.counters
        allocation = self._registry.by_client(client)
        if allocation is None:
            counters.without_allocation += data.rows.datagrams
            return
        channel = allocation.channels.get(data.number)
        if channel is None or channel.bound_until <= now:
            counters.without_channel += data.rows.datagrams
            return
        self._to_peer(allocation, channel.peer, data.rows, ecn, now, is_relayed=channel.is_relayed)

    def from_indication(self, client: SocketAddress, message: Message, ecn: int, now: float) -> None:
        """A Send indication: one payload for a peer with a permission (RFC 8656, section 11.2)."""
        counters = self._outbox.counters
        peer, data = message.get(stun.XOR_PEER_ADDRESS), message.get(stun.DATA)
        allocation = self._registry.by_client(client)
        if peer is None or data is None or not peer.port:
            counters.unrecognized += 1
            return
        if allocation is None:
            counters.without_allocation += 1
            return
        if not allocation.is_permitted(peer.host, now):
            counters.without_permission += 1
            return
        if not self._policy.permits(peer):
            self._outbox.refuse_peer(self._policy.private_network(peer.host))
            return
        rows = Rows(memoryview(data), 0, len(data), len(data), 1, len(data))
        is_relayed = self._policy.is_relayed(peer.host)
        dont_fragment = message.get(stun.DONT_FRAGMENT) is not None
        self._to_peer(allocation, peer, rows, ecn, now, is_relayed=is_relayed, dont_fragment=dont_fragment)

    def from_peer(self, port: int, batch: DatagramBatch, now: float) -> None:
        """What arrived at the relayed address of an allocation."""
        allocation = self._registry.by_port(port)
        if allocation is None:
            self._outbox.counters.without_allocation += batch.count
            return
        self._to_client(allocation, batch.source, Rows.of(batch), batch.ecn, now)

    def _to_peer(
        self,
        allocation: Allocation,
        peer: SocketAddress,
        rows: Rows,
        ecn: int,
        now: float,
        *,
        is_relayed: bool,
        dont_fragment: bool = False,
    ) -> None:
        source = allocation.relayed.get(family_of(peer.host))
        if source is None:
            self._outbox.counters.without_allocation += rows.datagrams
            return
        if is_relayed:
            neighbour = self._registry.by_port(peer.port)
            if neighbour is not None and peer in neighbour.relayed.values():
                self._to_client(neighbour, source, rows, ecn, now)
                return
            if peer.port in self._registry.ports.ours:  # another program's, if anybody's at all
                self._outbox.counters.without_allocation += rows.datagrams
                return
            # An allocation of another worker, if any: the kernel delivers it.
        counters = self._outbox.counters
        most = send_limit(rows.size)
        for part in (rows,) if rows.datagrams <= most else rows.cut(most):
            gathered = gather(part, self._pool)
            if gathered is None:
                counters.without_buffer += part.datagrams
                continue
            payload, segment_size, buffer = gathered
            counters.relayed_to_peers += part.datagrams
            counters.relayed_bytes += len(payload)
            self._outbox.send(
                RelayTransmit(
                    peer,
                    payload,
                    port=allocation.port,
                    source=source,
                    segment_size=segment_size,
                    ecn=ecn,
                    dont_fragment=dont_fragment,
                    pooled=buffer,
                )
            )

    def _to_client(self, allocation: Allocation, source: SocketAddress, rows: Rows, ecn: int, now: float) -> None:
        channel = allocation.channels_by_peer.get(source)
        if channel is not None and channel.bound_until > now:
            self._to_channel(allocation, channel, rows, ecn)
        elif not allocation.is_permitted(source.host, now) or not source.port:
            self._outbox.counters.without_permission += rows.datagrams
        elif allocation.wants_indications:  # Firezone's clients know no indications: don't waste their bandwidth
            self._to_indications(allocation, source, rows, ecn)
        else:
            self._outbox.counters.without_channel += rows.datagrams

    def _to_channel(self, allocation: Allocation, channel: Channel, rows: Rows, ecn: int) -> None:
        counters = self._outbox.counters
        most = send_limit(HEADER_SIZE + rows.size)
        for part in (rows,) if rows.datagrams <= most else rows.cut(most):
            gathered = gather(part, self._pool, channel.number)
            if gathered is None:
                counters.without_buffer += part.datagrams
                continue
            payload, segment_size, buffer = gathered
            counters.relayed_to_clients += part.datagrams
            counters.relayed_bytes += len(payload) - HEADER_SIZE * part.datagrams
            self._outbox.send(
                RelayTransmit(
                    allocation.client,
                    payload,
                    source=allocation.local,
                    segment_size=segment_size,
                    ecn=ecn,
                    pooled=buffer,
                )
            )

    def _to_indications(self, allocation: Allocation, source: SocketAddress, rows: Rows, ecn: int) -> None:
        counters = self._outbox.counters
        for data in rows.each():
            if len(data) > _MAX_INDICATED:
                counters.without_channel += 1
                continue
            attributes = ((stun.XOR_PEER_ADDRESS, source), (stun.DATA, bytes(data)))
            message = Message(Method.DATA, Kind.INDICATION, self._entropy(TRANSACTION_ID_SIZE), attributes)
            counters.relayed_to_clients += 1
            counters.relayed_bytes += len(data)
            self._outbox.send(RelayTransmit(allocation.client, message.encode(), source=allocation.local, ecn=ecn))

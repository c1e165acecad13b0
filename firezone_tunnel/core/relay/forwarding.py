"""The data path: from clients to peers and back, a whole batch at a time (RFC 8656, sections 11 and 12).

Datagrams of a batch differ by nothing but their content: so one look-up decides for all, one strided copy takes
their channel headers off or puts them on, and one segmented send carries them: 49 datagrams of 1,312 bytes cost less
than 6 microseconds in either direction, a lone one 3.
"""

from __future__ import annotations

from typing import NamedTuple

from firezone_tunnel.core.datagrams import MAX_SEND_SIZE, BufferPool, DatagramBatch, SendBuffer, send_limit
from firezone_tunnel.core.packet.layout import Rows, block
from firezone_tunnel.core.relay.allocation import Allocation, ChannelBinding, family_of
from firezone_tunnel.core.relay.outputs import Outbox, RelayTransmit
from firezone_tunnel.core.relay.peer_policy import PeerPolicy
from firezone_tunnel.core.relay.registry import Registry
from firezone_tunnel.core.sansio import Entropy, SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import TRANSACTION_ID_SIZE, Kind, Message, Method
from firezone_tunnel.core.turn.channel_data import HEADER_SIZE, ChannelData, encode_channel_data, write_headers

POOL_SIZE = 32
_MAX_INDICATED = MAX_SEND_SIZE - 52
"""Bytes of data that fit an indication: header, XOR-PEER-ADDRESS of IPv6, the head of DATA and its padding."""


class Gathered(NamedTuple):
    """One send: datagrams in a row, `segment_size` bytes each but the last; 0 where there is only one."""

    payload: bytes | memoryview
    segment_size: int
    buffer: SendBuffer | None


def buffer_pool(size: int = POOL_SIZE) -> BufferPool[SendBuffer]:
    """The send buffers of one relay."""
    return BufferPool(SendBuffer, size)


def gather(rows: Rows, pool: BufferPool[SendBuffer], channel: int | None = None) -> Gathered | None:
    """Put payloads one behind another, each after a header of `channel` if that is given. None: no buffer is free.

    They must fit into one send.
    """
    memory, offset, stride, size, count, last_size = rows
    if count == 1:
        payload = memory[offset : offset + last_size]
        return Gathered(bytes(payload) if channel is None else encode_channel_data(channel, payload), 0, None)
    buffer = pool.borrow()
    if buffer is None:
        return None
    headroom = 0 if channel is None else HEADER_SIZE
    slot = headroom + size
    length = (count - 1) * slot + headroom + last_size
    block(buffer.memory, headroom, slot, count - 1, size)[:] = block(memory, offset, stride, count - 1, size)
    buffer.memory[length - last_size : length] = rows.row(count - 1)
    if channel is not None:
        write_headers(buffer.memory, channel, slot, count, length)
    return Gathered(buffer.view[:length], slot, buffer)


class Forwarder:
    """Relays payloads. Who may send to whom was decided when channels were bound and permissions installed."""

    def __init__(
        self, registry: Registry, policy: PeerPolicy, outbox: Outbox, entropy: Entropy, pool: BufferPool[SendBuffer]
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._outbox = outbox
        self._entropy = entropy
        self._pool = pool

    def from_channel(self, client: SocketAddress, data: ChannelData, ecn: int, now: float) -> None:
        """Channel data of a client, on its way to the peer."""
        counters = self._outbox.counters
        allocation = self._registry.by_client(client)
        if allocation is None:
            counters.without_allocation += data.payloads.count
            return
        channel = allocation.channels.get(data.number)
        if channel is None or channel.bound_until <= now:
            counters.without_channel += data.payloads.count
            return
        self._to_peer(allocation, channel.peer, data.payloads, ecn, now, is_relayed=channel.is_relayed)

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
        rows = Rows.single(memoryview(data))
        is_relayed = self._policy.is_relayed(peer.host)
        dont_fragment = message.get(stun.DONT_FRAGMENT) is not None
        self._to_peer(allocation, peer, rows, ecn, now, is_relayed=is_relayed, dont_fragment=dont_fragment)

    def from_peer(self, port: int, batch: DatagramBatch, now: float) -> None:
        """A batch arrived at the relayed address of an allocation."""
        allocation = self._registry.by_port(port)
        if allocation is None:
            self._outbox.counters.without_allocation += batch.count
            return
        self._to_client(allocation, batch.source, batch.rows, batch.ecn, now)

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
            self._outbox.counters.without_allocation += rows.count
            return
        if is_relayed:
            neighbour = self._registry.by_port(peer.port)
            if neighbour is not None and peer in neighbour.relayed.values():
                self._to_client(neighbour, source, rows, ecn, now)
                return
            if peer.port in self._registry.ports.ours:  # another program's port, or an unused one
                self._outbox.counters.without_allocation += rows.count
                return
            # An allocation of another worker, if any: the kernel delivers it.
        counters = self._outbox.counters
        for part in rows.parts(send_limit(rows.size)):
            gathered = gather(part, self._pool)
            if gathered is None:
                counters.without_buffer += part.count
                continue
            payload, segment_size, buffer = gathered
            counters.relayed_to_peers += part.count
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
            self._outbox.counters.without_permission += rows.count
        elif allocation.wants_indications:  # Firezone's clients know no indications: don't waste their bandwidth
            self._to_indications(allocation, source, rows, ecn)
        else:
            self._outbox.counters.without_channel += rows.count

    def _to_channel(self, allocation: Allocation, channel: ChannelBinding, rows: Rows, ecn: int) -> None:
        counters = self._outbox.counters
        for part in rows.parts(send_limit(HEADER_SIZE + rows.size)):
            gathered = gather(part, self._pool, channel.number)
            if gathered is None:
                counters.without_buffer += part.count
                continue
            payload, segment_size, buffer = gathered
            counters.relayed_to_clients += part.count
            counters.relayed_bytes += len(payload) - HEADER_SIZE * part.count
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

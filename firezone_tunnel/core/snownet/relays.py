"""The relays of a node: their allocations, the candidates that they give, and what goes through them.

docs/protocol/data-plane.md, 2.4, 2.7, 2.10 and 3. Every connection gets the candidates of all relays
(docs/decisions.md, 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import attrs

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.deadlines import Deadlines
from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Transmit
from firezone_tunnel.core.stun.message import FIREZONE_REALM, Message
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.channel_data import ChannelData, encode_channel_data
from firezone_tunnel.core.turn.events import AllocationCounters, CandidateFound, CandidateLost, Failed

MAX_RELAYS = 4  # the two that the portal names, and two of before that connections may still use
_TIMER_SLACK = 1.0


@attrs.frozen
class RelayTerms:
    """A relay as the portal describes it. `realm` is None for a standard TURN server, which states its own."""

    rid: str
    ipv4: SocketAddress | None
    ipv6: SocketAddress | None
    username: str
    password: str = attrs.field(repr=False)
    realm: str | None = FIREZONE_REALM


@attrs.frozen
class RelayFailed:
    """A relay can't be used. `is_last`: no other is left."""

    rid: str
    reason: str
    is_last: bool


@attrs.frozen
class RelayAllocated:
    """A relay gave us an address."""

    rid: str
    address: SocketAddress


RelayEvent = CandidateFound | CandidateLost | RelayFailed | RelayAllocated


class Relays:
    """Drain `transmits` and `events` after each call that may have changed something."""

    def __init__(self, entropy: Entropy, counters: AllocationCounters, deadlines: Deadlines[object]) -> None:
        """`deadlines` gets the allocations as keys. Its owner calls `handle_timeout` for each that is due."""
        self._entropy = entropy
        self._counters = counters
        self._allocations: dict[str, Allocation] = {}
        self._terms: dict[str, RelayTerms] = {}
        self._by_socket: dict[SocketAddress, Allocation] = {}
        self._by_relayed: dict[SocketAddress, Allocation] = {}
        self._deadlines = deadlines
        self._touched: dict[Allocation, None] = {}
        self._transmits: deque[Transmit] = deque()
        self._events: deque[RelayEvent] = deque()
        self.at_socket = self._by_socket.get
        """The allocation at the relay with this socket address, or None."""
        self.at_relayed = self._by_relayed.get
        """The allocation that this relayed address of ours belongs to, or None."""

    @property
    def has_news(self) -> bool:
        """Whether `transmits` or `events` may have any."""
        return bool(self._touched or self._transmits or self._events)

    def update(self, gone: Iterable[str], connected: Iterable[RelayTerms], now: float) -> None:
        """Drop the relays in `gone`, add `connected`, and verify the allocations on those that stay.

        See docs/protocol/data-plane.md, 2.10.
        """
        for rid in gone:
            self._drop(rid)
        present = list(self._allocations)
        named: dict[str, None] = {}
        for terms in connected:
            named[terms.rid] = None
            if self._terms.get(terms.rid) != terms:
                self._drop(terms.rid)
                self._add(terms, now)
        for rid in present:
            if rid in self._allocations and rid not in named and len(self._allocations) > MAX_RELAYS:
                self._transmits.extend(self._give_back(rid))
        for rid in present:
            allocation = self._allocations.get(rid)
            if allocation is not None:
                allocation.refresh(now)
                self._touched[allocation] = None

    def probe(self, now: float) -> None:
        """Time has passed unnoticed: a relay may have forgotten us, and a NAT on the way to it."""
        for allocation in self._allocations.values():
            allocation.probe(now)
            self._touched[allocation] = None

    def verify(self, now: float) -> None:
        """No path answers any longer. A relay may have restarted and lost our allocation."""
        for allocation in self._allocations.values():
            allocation.verify(now)
            self._touched[allocation] = None

    def restart(self, now: float) -> None:
        """The network changed: allocate again on the same relays."""
        for allocation in self._allocations.values():
            allocation.restart(now)
            self._touched[allocation] = None

    def leave(self, addresses: Sequence[SocketAddress | None], now: float) -> None:
        """These addresses of ours are gone: allocate again where a relay knows us by one of them."""
        for allocation in self._allocations.values():
            if allocation.active_source in addresses:
                allocation.restart(now)
                self._touched[allocation] = None

    def close(self) -> list[Transmit]:
        """Delete all allocations. Returns the requests, to send after everything that still goes through the relays."""
        return [farewell for rid in list(self._allocations) for farewell in self._give_back(rid)]

    def abandon(self) -> None:
        """Drop all relays without a message: our sockets are gone."""
        for rid in list(self._allocations):
            self._drop(rid)

    def candidates(self) -> list[Candidate]:
        """Host, reflexive and relayed candidates for a new connection, in this order."""
        found = [one for allocation in self._allocations.values() for one in allocation.candidates]
        return sorted(found, key=attrgetter("priority"), reverse=True)

    def bind_channels(self, remote: Candidate, now: float) -> None:
        """Let every relay forward what comes from this remote address, before it is needed.

        See docs/protocol/data-plane.md, 2.4.7.
        """
        if remote.kind is CandidateKind.HOST:
            return
        for allocation in self._allocations.values():
            allocation.bind_channel(remote.address, now)
            self._touched[allocation] = None

    def wrap(self, transmit: Transmit, now: float) -> Transmit | None:
        """A check that an agent wants to send: as channel data where it leaves from a relayed address of ours.

        A channel that isn't there is asked for; the check follows right behind. None where there can't be one.
        """
        allocation = None if transmit.source is None else self._by_relayed.get(transmit.source)
        if allocation is None:
            return transmit
        channel = allocation.channel_for(transmit.destination, now)
        self._touched[allocation] = None
        if channel is None or allocation.active_socket is None:
            return None
        payload = encode_channel_data(channel, transmit.payload)
        return Transmit(allocation.active_socket, payload, source=allocation.active_source)

    def touch(self, allocation: Allocation) -> None:
        """An allocation was used: look at its timers and its transmits on the next drain."""
        self._touched[allocation] = None

    def unwrap(
        self, allocation: Allocation, batch: DatagramBatch, data: ChannelData, now: float
    ) -> DatagramBatch | None:
        """Channel data, as if it had come from the peer itself; None if that channel isn't bound."""
        peer = allocation.peer_of(data.number, now)
        self._deadlines.no_later_than(allocation, now + _TIMER_SLACK, "turn:timers after receiving")
        relayed = None if peer is None else allocation.relayed(peer.is_ipv6)
        if peer is None or relayed is None:
            return None
        return DatagramBatch(data.payloads, peer, relayed, batch.ecn)

    def handle_message(
        self, allocation: Allocation, message: Message, source: SocketAddress, local: SocketAddress, now: float
    ) -> bool:
        """A STUN message from the relay itself. False: it answers no request of ours."""
        self._touched[allocation] = None
        return allocation.handle_message(message, source, local, now)

    def handle_timeout(self, allocation: Allocation, now: float) -> None:
        """The deadline of an allocation has come."""
        allocation.handle_timeout(now)
        self._touched[allocation] = None

    def transmits(self) -> Iterator[Transmit]:
        self.settle()
        while self._transmits:
            yield self._transmits.popleft()

    def events(self) -> Iterator[RelayEvent]:
        self.settle()
        while self._events:
            yield self._events.popleft()

    def _add(self, terms: RelayTerms, now: float) -> None:
        try:
            allocation = Allocation(
                terms.rid,
                ipv4=terms.ipv4,
                ipv6=terms.ipv6,
                username=terms.username,
                password=terms.password,
                realm=terms.realm,
                entropy=self._entropy,
                now=now,
                counters=self._counters,
            )
        except ValueError as error:
            self._events.append(RelayFailed(terms.rid, f"can't be used: {error}", is_last=not self._allocations))
            return
        self._terms[terms.rid] = terms
        self._allocations[terms.rid] = allocation
        self._by_socket.update(dict.fromkeys(allocation.sockets, allocation))
        self._touched[allocation] = None

    def _give_back(self, rid: str) -> list[Transmit]:
        """Drop a live relay. Returns the request that deletes its allocation, if there is one."""
        farewell = self._allocations[rid].close()
        self._forget(rid)
        return [] if farewell is None else [farewell]

    def _drop(self, rid: str) -> None:
        """Drop a relay without a message: it is gone, or its address belongs to another relay by now."""
        allocation = self._allocations.get(rid)
        if allocation is not None:
            allocation.close()
            self._forget(rid)

    def _forget(self, rid: str) -> None:
        allocation = self._allocations.pop(rid)
        del self._terms[rid]
        self._follow(allocation)
        self._touched.pop(allocation, None)
        self._deadlines.set(allocation, None)
        for addresses in (self._by_socket, self._by_relayed):
            for address in [one for one, other in addresses.items() if other is allocation]:
                del addresses[address]

    def settle(self) -> None:
        """Collect what allocations that were touched have to send, to report and to wait for."""
        while self._touched:
            allocation, _ = self._touched.popitem()
            self._follow(allocation)
            if self._allocations.get(allocation.rid) is allocation:
                self._deadlines.set(allocation, allocation.next_timeout())

    def _follow(self, allocation: Allocation) -> None:
        self._transmits.extend(allocation.transmits())
        for event in allocation.events():
            match event:
                case Failed(reason):
                    self._forget(allocation.rid)
                    self._events.append(RelayFailed(allocation.rid, reason.value, is_last=not self._allocations))
                case CandidateFound(candidate):
                    if candidate.kind is CandidateKind.RELAYED:
                        self._by_relayed[candidate.address] = allocation
                        self._events.append(RelayAllocated(allocation.rid, candidate.address))
                    self._events.append(event)
                case CandidateLost(candidate):
                    self._by_relayed.pop(candidate.address, None)
                    self._events.append(event)

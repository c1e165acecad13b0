"""The channel numbers of one allocation: which number stands for which peer.

Sources: docs/protocol/data-plane.md, 3.7; RFC 8656, section 12.
"""

from __future__ import annotations

from itertools import chain

import attrs

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.turn.channel_data import FIRST_CHANNEL, LAST_CHANNEL

CHANNEL_LIFETIME = 600.0  # RFC 8656, section 12: since the last successful bind
# docs/protocol/data-plane.md, 3.7: a channel of this age is bound again, if its peer still speaks.
CHANNEL_REFRESH = 300.0
CHANNEL_COOL_DOWN = 300.0  # RFC 8656, section 12: after its end, before a number may stand for another peer


class ChannelBindings:
    """Channel numbers of one allocation, each bound to a peer by CHANNEL-BIND requests that somebody else sends."""

    def __init__(self) -> None:
        self._bindings: dict[int, _Binding] = {}
        self._numbers: dict[SocketAddress, int] = {}
        self._next = FIRST_CHANNEL
        self._exhausted_until = 0.0
        # Number -> when to look whether it needs a refresh. All wait equally long: insertion order is time order.
        self._reviews: dict[int, float] = {}
        self._overdue: dict[int, float] = {}

    def bind(self, peer: SocketAddress, now: float) -> int | None:
        """The number to request for this peer; it counts as in flight until `confirm` or `remove`.

        Returns None where there is nothing to do: it is bound or in flight, or no number is free.
        """
        number = self._numbers.get(peer)
        if number is None:
            return self._bind_new(peer, now)
        binding = self._bindings[number]
        if binding.in_flight or binding.is_bound(now):
            return None
        binding.in_flight = True
        return number

    def confirm(self, number: int, now: float) -> None:
        """The relay bound this number; it lives on from now."""
        binding = self._bindings.get(number)
        if binding is None:
            return
        binding.bound_at = now
        binding.in_flight = False
        binding.received = False
        self._reviews.pop(number, None)
        self._reviews[number] = now + CHANNEL_REFRESH

    def remove(self, number: int) -> None:
        """The relay refused to bind this number, or to bind it again."""
        binding = self._bindings.pop(number, None)
        if binding is not None:
            del self._numbers[binding.peer]
            self._reviews.pop(number, None)
            self._overdue.pop(number, None)
            self._exhausted_until = 0.0

    def channel_to(self, peer: SocketAddress, now: float) -> int | None:
        """The number to send to this peer on: a bound one, or one whose bind is still in flight."""
        number = self._numbers.get(peer)
        if number is None:
            return None
        binding = self._bindings[number]
        return number if binding.in_flight or binding.is_bound(now) else None

    def received(self, number: int, now: float) -> SocketAddress | None:
        """Data came on this channel: from whom? None where the channel isn't bound, or not confirmed yet."""
        binding = self._bindings.get(number)
        if binding is None or not binding.is_bound(now):
            return None
        if not binding.received:
            binding.received = True
            if number not in self._reviews:
                self._overdue[number] = now  # it was left to expire, but its peer speaks after all
        return binding.peer

    def next_refresh(self) -> float | None:
        """When to call `take_refreshes`."""
        times = [next(iter(queue.values())) for queue in (self._reviews, self._overdue) if queue]
        return min(times, default=None)

    def take_refreshes(self, now: float) -> list[tuple[int, SocketAddress]]:
        """The channels to bind again: old ones on which data was received. They count as in flight, and go on."""
        wanted: list[tuple[int, SocketAddress]] = []
        for queue in (self._reviews, self._overdue):
            while queue and next(iter(queue.values())) <= now:
                number = next(iter(queue))
                del queue[number]
                binding = self._bindings[number]
                if binding.received and binding.is_bound(now):
                    binding.in_flight = True
                    wanted.append((number, binding.peer))
        return wanted

    def _bind_new(self, peer: SocketAddress, now: float) -> int | None:
        number = self._free_number(now)
        if number is None:
            return None
        previous = self._bindings.get(number)
        if previous is not None:
            self.remove(number)
        self._bindings[number] = _Binding(peer)
        self._numbers[peer] = number
        self._next = FIRST_CHANNEL if number == LAST_CHANNEL else number + 1
        return number

    def _free_number(self, now: float) -> int | None:
        """The next number in the cycle that stands for nobody."""
        if now < self._exhausted_until:
            return None
        for number in chain(range(self._next, LAST_CHANNEL + 1), range(FIRST_CHANNEL, self._next)):
            binding = self._bindings.get(number)
            if binding is None or binding.free_at <= now:
                return number
        # Looking at all of them again for every packet to a peer without a channel would be dear.
        self._exhausted_until = min(now + 1.0, *(binding.free_at for binding in self._bindings.values()))
        return None


_NEVER = float("inf")


@attrs.define(eq=False)
class _Binding:
    peer: SocketAddress
    bound_at: float | None = None
    in_flight: bool = True
    received: bool = False
    """Data came since the last bind."""

    def is_bound(self, now: float) -> bool:
        return self.bound_at is not None and now - self.bound_at < CHANNEL_LIFETIME

    @property
    def free_at(self) -> float:
        if self.bound_at is None or self.in_flight:
            return _NEVER
        return self.bound_at + CHANNEL_LIFETIME + CHANNEL_COOL_DOWN

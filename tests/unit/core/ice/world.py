"""Two agents, a clock, and a network that rewrites, delays and drops their packets."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from firezone_tunnel.core.ice.agent import Agent, AgentState, Credentials, Nominated, StateChanged
from firezone_tunnel.core.ice.candidate import Candidate, parse_sdp
from firezone_tunnel.core.sansio import Entropy, SocketAddress
from firezone_tunnel.core.stun.message import USE_CANDIDATE, Kind, Message, parse

CLIENT = Credentials("clnt", "client's password of 22")
GATEWAY = Credentials("gway", "gateway's password of22")
CLIENT_HOST = SocketAddress("10.0.1.1", 52625)
GATEWAY_HOST = SocketAddress("10.0.2.1", 52625)
CLIENT_V6 = SocketAddress("2001:db8:1::1", 52625)
GATEWAY_V6 = SocketAddress("2001:db8:2::1", 52625)
CLIENT_RELAYED = SocketAddress("198.51.100.1", 50001)
GATEWAY_RELAYED = SocketAddress("198.51.100.1", 50002)
STRANGER = SocketAddress("192.0.2.66", 6666)
LATENCY = 0.02


class Datagram(NamedTuple):
    """A datagram as sent, with its parsed `message`."""

    at: float
    sender: Side
    source: SocketAddress
    destination: SocketAddress
    message: Message


Route = tuple[SocketAddress, SocketAddress] | None
"""The source and destination seen by the receiver; None if the packet is lost."""


class Side:
    def __init__(self, name: str, world: World, *, controlling: bool) -> None:
        self.name = name
        self.world = world
        mine, other = (CLIENT, GATEWAY) if controlling else (GATEWAY, CLIENT)
        self.agent = Agent(controlling=controlling, local=mine, remote=other, entropy=stream(name), now=world.now)
        self.states: list[StateChanged] = []
        self.nominated: list[tuple[float, SocketAddress, SocketAddress]] = []
        self.seen: list[Datagram] = []
        self.is_mute = False

    @property
    def path(self) -> tuple[SocketAddress, SocketAddress] | None:
        nominated = self.agent.nominated
        return None if nominated is None else (nominated.source, nominated.destination)

    def offer(self, candidate: Candidate, *, signal: bool = True) -> Candidate:
        """Add a local candidate, and signal its text form to the other side immediately."""
        added = self.agent.add_local_candidate(candidate, self.world.now)
        assert added is not None
        if signal:
            self.other.learn(added.to_sdp())
        self.world.drain()
        return added

    def learn(self, sdp: str) -> bool:
        candidate = parse_sdp(sdp)
        assert candidate is not None
        known = self.agent.add_remote_candidate(candidate, self.world.now)
        self.world.drain()
        return known

    def withdraw(self, candidate: Candidate) -> None:
        assert self.agent.remove_local_candidate(candidate, self.world.now)
        signalled = parse_sdp(candidate.to_sdp())
        assert signalled is not None
        assert self.other.agent.remove_remote_candidate(signalled, self.world.now)
        self.world.drain()

    @property
    def other(self) -> Side:
        return self.world.gateway if self is self.world.client else self.world.client

    def checks(self, *, nominating: bool | None = None) -> list[Datagram]:
        """The binding requests that this side sent."""
        sent = [
            datagram
            for datagram in self.world.sent
            if datagram.sender is self and datagram.message.kind is Kind.REQUEST
        ]
        if nominating is None:
            return sent
        return [datagram for datagram in sent if (datagram.message.get(USE_CANDIDATE) is not None) == nominating]


class World:
    """`route(sender, source, destination)` simulates the network. By default all packets arrive unchanged."""

    def __init__(self) -> None:
        self.now = 100.0
        self.route: Callable[[Side, SocketAddress, SocketAddress], Route] = straight
        self.sent: list[Datagram] = []
        self._serial = count()
        self._in_flight: list[tuple[float, int, Side, SocketAddress, SocketAddress, bytes]] = []
        self.client = Side("client", self, controlling=True)
        self.gateway = Side("gateway", self, controlling=False)

    def run(self, seconds: float) -> None:
        """Advance the clock, calling each deadline at its exact time."""
        end = self.now + seconds
        for _ in range(100_000):
            due = [timeout.at for side in self.sides if (timeout := side.agent.next_timeout()) is not None]
            arrivals = [entry[0] for entry in self._in_flight[:1]]
            at = min([*due, *arrivals], default=float("inf"))
            if at > end:
                self.now = end
                return
            assert at >= self.now, "a deadline in the past"
            self.now = at
            self._step()
        raise AssertionError("timers storm")

    def run_until(self, condition: Callable[[], bool], *, within: float) -> float:
        """Advance the clock in small steps until a condition is true. Returns the time that it took."""
        start = self.now
        while not condition():
            assert self.now - start < within, f"not within {within} s"
            self.run(0.01)
        return self.now - start

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.client, self.gateway

    def are_connected(self) -> bool:
        return all(side.path is not None for side in self.sides)

    def drain(self) -> None:
        for side in self.sides:
            for transmit in side.agent.transmits():
                assert transmit.source is not None
                payload = bytes(transmit.payload)
                message = parse(payload)
                assert message is not None
                assert message.is_intact()
                self.sent.append(Datagram(self.now, side, transmit.source, transmit.destination, message))
                route = None if side.is_mute else self.route(side, transmit.source, transmit.destination)
                if route is not None:
                    entry = (self.now + LATENCY, next(self._serial), side.other, *route, payload)
                    heapq.heappush(self._in_flight, entry)
            for event in side.agent.events():
                if isinstance(event, Nominated):
                    side.nominated.append((self.now, event.source, event.destination))
                else:
                    assert event.state is not (side.states[-1].state if side.states else AgentState.NEW)
                    side.states.append(event)

    def _step(self) -> None:
        while self._in_flight and self._in_flight[0][0] <= self.now:
            _, _, receiver, source, destination, payload = heapq.heappop(self._in_flight)
            message = parse(payload)
            assert message is not None
            if not receiver.is_mute:
                receiver.seen.append(Datagram(self.now, receiver.other, source, destination, message))
                receiver.agent.handle_message(message, source, destination, self.now)
            self.drain()
        for side in self.sides:
            timeout = side.agent.next_timeout()
            if timeout is not None and timeout.at <= self.now:
                side.agent.handle_timeout(self.now)
        self.drain()


def offer_hosts(world: World) -> None:
    world.client.offer(Candidate.host(CLIENT_HOST))
    world.gateway.offer(Candidate.host(GATEWAY_HOST))


def offer_relayed(world: World) -> None:
    world.client.offer(Candidate.relayed(CLIENT_RELAYED))
    world.gateway.offer(Candidate.relayed(GATEWAY_RELAYED))


def remote_addresses(side: Side) -> list[SocketAddress]:
    return [candidate.address for candidate in side.agent.remote_candidates]


def forget(side: Side, sdp: str) -> bool:
    candidate = parse_sdp(sdp)
    assert candidate is not None
    return side.agent.remove_remote_candidate(candidate, side.world.now)


def straight(sender: Side, source: SocketAddress, destination: SocketAddress) -> Route:
    return source, destination


def nothing(sender: Side, source: SocketAddress, destination: SocketAddress) -> Route:
    return None


class Nat:
    """In front of the client: an outside port per destination if `symmetric`, else one for all. Lets answers in only.

    A gateway's datagram passes if it comes from where the client has sent to.
    """

    def __init__(self, outside: str, *, symmetric: bool) -> None:
        self._outside = outside
        self._symmetric = symmetric
        self._ports: dict[tuple[SocketAddress, SocketAddress | None], int] = {}
        self._allowed: dict[tuple[int, SocketAddress], SocketAddress] = {}

    def address(self, inside: SocketAddress, destination: SocketAddress) -> SocketAddress:
        """The address seen from outside. Sending creates the mapping."""
        key = inside, destination if self._symmetric else None
        port = self._ports.setdefault(key, 40000 + len(self._ports))
        self._allowed[port, destination] = inside
        return SocketAddress(self._outside, port)

    def __call__(self, sender: Side, source: SocketAddress, destination: SocketAddress) -> Route:
        if sender.name == "client":
            return self.address(source, destination), destination
        if destination.host != self._outside:
            return None  # private addresses are unreachable
        inside = self._allowed.get((destination.port, source))
        return None if inside is None else (source, inside)


def stream(name: str) -> Entropy:
    """Deterministic random bytes."""
    calls = count()
    return lambda size: hashlib.shake_256(f"{name} {next(calls)}".encode()).digest(size)

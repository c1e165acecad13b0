"""Outputs of the relay's core: datagrams, each with its socket, commands, and counters."""

from __future__ import annotations

from collections import Counter, deque

import attrs

from firezone_tunnel.core.relay.authentication import RejectedLogin
from firezone_tunnel.core.relay.peer_policy import Network
from firezone_tunnel.core.sansio import Releasable, SocketAddress, Transmit

MAX_WAITING = 4096
"""The limit of undrained transmits, which a shell that drains after each batch never reaches."""


class RelayTransmit(Transmit):
    """Datagrams to one destination, from the allocation's socket on `port`, or from the listening one where it is 0.

    The socket is the one of the destination's family. `dont_fragment` asks for the DF bit (RFC 8656, section 14.8).
    """

    __slots__ = ("dont_fragment", "port")

    def __init__(
        self,
        destination: SocketAddress,
        payload: bytes | memoryview,
        *,
        port: int = 0,
        source: SocketAddress | None = None,
        segment_size: int = 0,
        ecn: int = 0,
        dont_fragment: bool = False,
        pooled: Releasable | None = None,
    ) -> None:
        super().__init__(destination, payload, source=source, segment_size=segment_size, ecn=ecn, pooled=pooled)
        self.port = port
        self.dont_fragment = dont_fragment


@attrs.frozen
class OpenPort:
    """Bind a socket of each family to the port, all or none, then call `handle_port_opened` or `handle_port_failed`.

    The client gets its response only then: datagrams may arrive as soon as it knows the address.
    """

    port: int
    families: tuple[int, ...]


@attrs.frozen
class ClosePort:
    """Close these sockets of an allocation."""

    port: int
    families: tuple[int, ...]


@attrs.frozen
class Drained:
    """The relay is draining, and its last allocation is gone. Sent once."""


Command = OpenPort | ClosePort | Drained


@attrs.define
class RelayCounters:
    """Counters of a relay: in datagrams unless noted."""

    responses: Counter[str] = attrs.field(factory=Counter)
    """By error code, or "success"."""
    relayed_to_peers: int = 0
    relayed_to_clients: int = 0
    relayed_bytes: int = 0
    """Payload, both directions. Traffic between two allocations of the process is counted once."""
    unrecognized: int = 0
    """Neither STUN nor channel data, or malformed."""
    withheld_responses: int = 0
    """Responses to unauthenticated senders beyond what `ResponseBudget` allows."""
    rejected_logins: Counter[str] = attrs.field(factory=Counter)
    """Requests with credentials that are not valid, by reason."""
    without_allocation: int = 0
    without_channel: int = 0
    """Channel data on a channel that isn't bound (any longer)."""
    without_permission: int = 0
    forbidden_peers: int = 0
    """Requests and Send indications with a peer to which nothing is relayed."""
    private_peers: Counter[str] = attrs.field(factory=Counter)
    """Forbidden peers that the operator could allow, by private network."""
    without_buffer: int = 0
    """Dropped because all buffers still wait for room in a socket."""


@attrs.define
class Outbox:
    """Collects the outputs of all parts of a relay."""

    waiting: deque[RelayTransmit] = attrs.field(factory=deque)
    commands: deque[Command] = attrs.field(factory=deque)
    counters: RelayCounters = attrs.field(factory=RelayCounters)
    last_rejected: RejectedLogin | None = None

    def reject(self, login: RejectedLogin) -> None:
        self.counters.rejected_logins[login.reason] += 1
        self.last_rejected = login

    def refuse_peer(self, private_network: Network | None) -> None:
        """Count a peer to which nothing is relayed; `private_network` comes from `PeerPolicy`."""
        self.counters.forbidden_peers += 1
        if private_network is not None:
            self.counters.private_peers[str(private_network)] += 1

    def send(self, transmit: RelayTransmit) -> None:
        if len(self.waiting) >= MAX_WAITING:
            self.counters.without_buffer += 1
            transmit.release()
            return
        self.waiting.append(transmit)

"""What a node and its connections have in common: roles, terms, and what they tell."""

from __future__ import annotations

import enum
from collections import deque

import attrs

from firezone_tunnel.ice.agent import AgentCounters, Credentials
from firezone_tunnel.sansio import SocketAddress, Transmit
from firezone_tunnel.snownet.relays import RelayAllocated, RelayFailed
from firezone_tunnel.turn.events import AllocationCounters
from firezone_tunnel.wireguard.cookie import DoormanCounters
from firezone_tunnel.wireguard.session import PeerCounters


class Role(enum.Enum):
    """Fixed by the portal: clients control ICE and initiate WireGuard (spec/data-plane.md, 2.2)."""

    CLIENT = "client"
    GATEWAY = "gateway"


@attrs.frozen
class Terms:
    """What the portal told both sides. As long as the terms are the same, so is the connection (2.2)."""

    remote_public_key: bytes
    preshared_key: bytes = attrs.field(repr=False)
    local: Credentials = attrs.field(repr=False)
    remote: Credentials = attrs.field(repr=False)


@attrs.frozen
class NewCandidates:
    """To be told to the other side, the best first."""

    cid: str
    candidates: tuple[str, ...]


@attrs.frozen
class InvalidatedCandidates:
    """Told before, and not to be used any longer."""

    cid: str
    candidates: tuple[str, ...]


@attrs.frozen
class ConnectionEstablished:
    """There is a path, and keys for it. `path` is how it leads: "direct" or "relayed"."""

    cid: str
    path: str
    local: SocketAddress
    remote: SocketAddress


@attrs.frozen
class PathChanged:
    """An established connection goes another way from now on."""

    cid: str
    path: str
    local: SocketAddress
    remote: SocketAddress


@attrs.frozen
class ConnectionFailed:
    """The other side is not to be reached; the connection is gone."""

    cid: str
    reason: str


@attrs.frozen
class ConnectionClosed:
    """We closed it."""

    cid: str


ConnectionEvent = ConnectionEstablished | PathChanged | ConnectionFailed | ConnectionClosed
RelayNews = RelayAllocated | RelayFailed
NodeEvent = ConnectionEvent | RelayNews | NewCandidates | InvalidatedCandidates


@attrs.define
class NodeCounters:
    """What one node and its connections did not deliver, and why."""

    unknown_sessions: int = 0
    """Transport messages for a session that we don't have (any longer)."""
    unknown_peers: int = 0
    """Handshakes of somebody the portal told us nothing about."""
    unbound_channels: int = 0
    """Channel data on a channel that stands for nobody."""
    unmatched_stun: int = 0
    unrecognized: int = 0
    """Datagrams that are neither STUN nor WireGuard."""
    malformed_packets: int = 0
    candidates_rejected: int = 0
    candidates_without_connection: int = 0
    packets_without_connection: int = 0
    packets_unconnected: int = 0
    """Dropped because there was no path or no session yet."""
    packets_overwritten: int = 0
    """Dropped because too many were waiting for a path and a session."""
    packets_without_buffer: int = 0
    """Dropped because all buffers were waiting to be sent."""


@attrs.frozen
class LayerCounters:
    """What the protocols of all of a node's connections and relays have seen."""

    ice: AgentCounters = attrs.field(factory=AgentCounters)
    turn: AllocationCounters = attrs.field(factory=AllocationCounters)
    handshakes: DoormanCounters = attrs.field(factory=DoormanCounters)
    wireguard: PeerCounters = attrs.field(factory=PeerCounters)


@attrs.define
class Outbox:
    """Where the connections of a node put what leaves it."""

    transmits: deque[Transmit] = attrs.field(factory=deque)
    events: deque[ConnectionEvent | RelayNews] = attrs.field(factory=deque)
    counters: NodeCounters = attrs.field(factory=NodeCounters)
    layers: LayerCounters = attrs.field(factory=LayerCounters)

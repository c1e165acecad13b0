"""Types that a node and its connections share: roles, terms, events and counters."""

from __future__ import annotations

import enum
from collections import deque

import attrs

from firezone_tunnel.core.ice.agent import AgentCounters, Credentials
from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.core.snownet.relays import RelayAllocated, RelayFailed
from firezone_tunnel.core.turn.events import AllocationCounters
from firezone_tunnel.core.wireguard.cookie import CookieCheckerCounters
from firezone_tunnel.core.wireguard.session import PeerCounters


class Role(enum.Enum):
    """Fixed by the portal: clients control ICE and initiate WireGuard (docs/protocol/data-plane.md, 2.2)."""

    CLIENT = "client"
    GATEWAY = "gateway"


@attrs.frozen
class Terms:
    """The keys and credentials that the portal gave to both sides. A connection lasts as long as they do.

    See docs/protocol/data-plane.md, 2.2.
    """

    remote_public_key: bytes
    preshared_key: bytes = attrs.field(repr=False)
    local: Credentials = attrs.field(repr=False)
    remote: Credentials = attrs.field(repr=False)


@attrs.frozen
class NewCandidates:
    """Candidates to signal to the peer, the best first."""

    peer_id: str
    candidates: tuple[str, ...]


@attrs.frozen
class InvalidatedCandidates:
    """Candidates that were signalled before and are no longer valid."""

    peer_id: str
    candidates: tuple[str, ...]


@attrs.frozen
class PairNominated:
    """ICE selected a pair. The kinds are those of `ice.candidate.CandidateKind`: "host", "srflx", "prflx", "relay"."""

    peer_id: str
    local_kind: str
    local: SocketAddress
    remote_kind: str
    remote: SocketAddress


@attrs.frozen
class ConnectionEstablished:
    """There is a path and a session. `path` is "direct" or "relayed"."""

    peer_id: str
    path: str
    local: SocketAddress
    remote: SocketAddress


@attrs.frozen
class PathChanged:
    """An established connection moved to another path."""

    peer_id: str
    path: str
    local: SocketAddress
    remote: SocketAddress


@attrs.frozen
class ConnectionFailed:
    """The peer can't be reached. The connection is gone."""

    peer_id: str
    reason: str


@attrs.frozen
class ConnectionClosed:
    """We closed the connection."""

    peer_id: str


ConnectionEvent = PairNominated | ConnectionEstablished | PathChanged | ConnectionFailed | ConnectionClosed
RelayNews = RelayAllocated | RelayFailed
NodeEvent = ConnectionEvent | RelayNews | NewCandidates | InvalidatedCandidates


@attrs.define
class NodeCounters:
    """Datagrams and packets that a node and its connections did not deliver, by reason."""

    unknown_sessions: int = 0
    """Transport data for an unknown or expired session."""
    unknown_peers: int = 0
    """Handshakes of peers that the portal did not introduce."""
    unbound_channels: int = 0
    """Channel data on an unbound channel."""
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
    """Counters of the protocols below, over all connections and relays of a node."""

    ice: AgentCounters = attrs.field(factory=AgentCounters)
    turn: AllocationCounters = attrs.field(factory=AllocationCounters)
    handshakes: CookieCheckerCounters = attrs.field(factory=CookieCheckerCounters)
    wireguard: PeerCounters = attrs.field(factory=PeerCounters)


@attrs.define
class Outbox:
    """The output of a node's connections."""

    transmits: deque[Transmit] = attrs.field(factory=deque)
    events: deque[ConnectionEvent | RelayNews] = attrs.field(factory=deque)
    counters: NodeCounters = attrs.field(factory=NodeCounters)
    layers: LayerCounters = attrs.field(factory=LayerCounters)

"""The common half of a client's and a gateway's data plane: the node, the portal's presence, signalling, deadlines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from firezone_tunnel.core.datagrams import BufferPool
from firezone_tunnel.core.ice.agent import Credentials
from firezone_tunnel.core.messages.common import (
    MAX_CANDIDATES,
    IceCredentials,
    Interface,
    NoRelays,
    PortalMessage,
    Relay,
    RelaysPresence,
)
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout, Transmit
from firezone_tunnel.core.snownet.events import (
    ConnectionEvent,
    InvalidatedCandidates,
    NewCandidates,
    RelayNews,
    Role,
)
from firezone_tunnel.core.snownet.node import Node
from firezone_tunnel.core.snownet.relays import RelayFailed
from firezone_tunnel.core.tunnel import control
from firezone_tunnel.core.tunnel.relays import relay_terms
from firezone_tunnel.core.wireguard.seal import SealBuffer

GOODBYE = control.encode(control.Goodbye())


@attrs.frozen
class ToPortal:
    """A message to send now. It has no value later."""

    message: PortalMessage


class Tunnel(ABC):
    """A data plane without I/O.

    After each call drain `transmits` and `events`, then ask `next_timeout`. Packets are valid only until the next
    `handle_packets` or `handle_datagrams`.
    """

    def __init__(self, role: Role, *, entropy: Entropy, now: float, pool: BufferPool[SealBuffer]) -> None:
        self.node = Node(role=role, entropy=entropy, now=now, pool=pool)
        self._interface: Interface | None = None
        self._own: tuple[bytes, ...] = ()
        self._is_joined = False
        self._events: deque[Any] = deque()

    @property
    def public_key(self) -> bytes:
        """The WireGuard key that the portal gets at login. A client's `reset` makes a new one."""
        return self.node.public_key

    def handle_joined(self) -> None:
        """The portal accepts messages again; its `init` follows."""
        self._is_joined = True

    def handle_left(self) -> None:
        """The portal is gone. Connections and authorizations stay."""
        self._is_joined = False

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None:
        """The addresses that our sockets can be reached at, the preferred one of each family first."""
        self.node.set_local_addresses(addresses, now)
        self._follow_node(now)

    def probe(self, now: float, utc_now: float) -> None:
        """The host was suspended for a moment: ask all relays and peers at once whether they still know us."""
        self.node.probe(now, utc_now)
        self._follow_node(now)

    def close(self, now: float) -> None:
        """Say goodbye to every peer. The next `transmits` are the last."""
        self.node.close(now, farewell=GOODBYE)
        self._follow_node(now)

    def transmits(self) -> Iterator[Transmit]:
        return self.node.transmits()

    def events(self) -> Iterator[Any]:
        """Events in order."""
        events = self._events
        while events:
            yield events.popleft()

    def next_timeout(self) -> Timeout | None:
        return self.node.next_timeout()

    @abstractmethod
    def handle_timeout(self, now: float, utc_now: float) -> None: ...

    def _set_interface(self, interface: Interface) -> None:
        self._interface = interface
        self._own = (interface.ipv4.packed, interface.ipv6.packed)

    def _start_relays(self, relays: Iterable[Relay], now: float) -> None:
        """Use the relays of an `init`, and signal our candidates again: the portal may have lost them."""
        self.node.update_relays((), relay_terms(relays), now)
        self.node.announce()

    def _update_relays(self, presence: RelaysPresence, now: float) -> None:
        self.node.update_relays(presence.disconnected_ids, relay_terms(presence.connected), now)

    def _add_candidates(self, peer_id: str, candidates: Sequence[str], now: float) -> None:
        for candidate in candidates[:MAX_CANDIDATES]:
            self.node.add_remote_candidate(peer_id, candidate, now)

    def _remove_candidates(self, peer_id: str, candidates: Sequence[str], now: float) -> None:
        for candidate in candidates[:MAX_CANDIDATES]:
            self.node.remove_remote_candidate(peer_id, candidate, now)

    def _follow_node(self, now: float) -> None:
        """Pass on the node's events, and signal candidates while the portal is there.

        The node announces them again when the portal is back.
        """
        if not self.node.has_events:
            return
        for event in self.node.events():
            if isinstance(event, NewCandidates | InvalidatedCandidates):
                if self._is_joined:
                    self._events.append(ToPortal(self._broadcast(event)))
                continue
            if isinstance(event, RelayFailed) and event.is_last and self._is_joined:
                self._events.append(ToPortal(NoRelays()))
            self._handle_node_event(event)
            self._events.append(event)

    @abstractmethod
    def _broadcast(self, event: NewCandidates | InvalidatedCandidates) -> PortalMessage:
        """The message that signals candidates to a peer."""

    @abstractmethod
    def _handle_node_event(self, event: ConnectionEvent | RelayNews) -> None:
        """Follow a change of a connection or a relay."""


def ice_credentials(credentials: IceCredentials) -> Credentials:
    return Credentials(credentials.username, credentials.password)

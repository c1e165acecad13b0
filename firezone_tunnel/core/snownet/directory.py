"""Which connection a datagram belongs to (docs/protocol/data-plane.md, 2.5.2 and 2.7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firezone_tunnel.core.ice.agent import TRANSACTION_PREFIX_SIZE
from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.core.stun.message import USERNAME, Kind, Message

if TYPE_CHECKING:
    from firezone_tunnel.core.snownet.connection import Connection


class Directory:
    """The connections of a node by all that datagrams call them."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._by_index: dict[int, Connection] = {}
        self._by_key: dict[bytes, Connection] = {}
        self._by_ufrag: dict[str, Connection] = {}
        self._by_transaction: dict[bytes, list[Connection]] = {}  # by what all transaction ids of an agent begin with
        self.by_index = self._by_index.get
        """The connection that a WireGuard receiver index stands for, or None."""
        self.by_key = self._by_key.get
        """The connection to the owner of a WireGuard public key, or None."""

    def add(self, connection: Connection) -> None:
        self._by_key[connection.terms.remote_public_key] = connection
        self._by_ufrag[connection.terms.local.ufrag] = connection
        self._by_transaction.setdefault(connection.agent.transaction_prefix, []).append(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection; its session indices are its own to release."""
        terms = connection.terms
        if self._by_key.get(terms.remote_public_key) is connection:
            del self._by_key[terms.remote_public_key]
        if self._by_ufrag.get(terms.local.ufrag) is connection:
            del self._by_ufrag[terms.local.ufrag]
        prefix = connection.agent.transaction_prefix
        self._by_transaction[prefix].remove(connection)
        if not self._by_transaction[prefix]:
            del self._by_transaction[prefix]

    def by_stun(self, message: Message) -> Connection | None:
        """The connection that a connectivity check is meant for, or whose check this is the answer to."""
        if message.kind is Kind.REQUEST:
            username = message.get(USERNAME)
            return None if username is None else self._by_ufrag.get(username.partition(":")[0])
        for connection in self._by_transaction.get(message.transaction_id[:TRANSACTION_PREFIX_SIZE], ()):
            if connection.agent.owns_transaction(message.transaction_id):
                return connection
        return None

    def allocate_index(self, connection: Connection) -> int:
        """A random index that no session of this node has."""
        while True:
            index = int.from_bytes(self._entropy(4), "big")
            if index not in self._by_index:
                self._by_index[index] = connection
                return index

    def release_index(self, index: int) -> None:
        del self._by_index[index]

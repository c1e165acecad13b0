"""All allocations of a relay, by client, port and owner, and their deadlines."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from firezone_tunnel.core.deadlines import Deadlines
from firezone_tunnel.core.relay.allocation import Allocation
from firezone_tunnel.core.relay.outputs import ClosePort, Drained, Outbox
from firezone_tunnel.core.relay.port_range import PortRange
from firezone_tunnel.core.sansio import Entropy, SocketAddress, Timeout

RESERVATION_LIFETIME = 30.0  # RFC 8656, section 7.2: at least 30 s
TRANSACTION_LIFETIME = 40.0  # RFC 8489, section 6.2.1: a client retransmits for 39.5 s
TOKEN_SIZE = 8
_MAX_DELETED = 1024


class Reservation(NamedTuple):
    """A port and its families, reserved for an allocation with the token."""

    port: int
    families: tuple[int, ...]


class _Deleted(NamedTuple):
    transaction_id: bytes
    until: float


class Registry:
    """The allocations. It commands the shell to close sockets; `allocator` commands it to open them."""

    def __init__(self, ports: PortRange, outbox: Outbox, entropy: Entropy) -> None:
        self.ports = ports
        self.is_draining = False
        self._outbox = outbox
        self._entropy = entropy
        self._by_client: dict[SocketAddress, Allocation] = {}
        self._by_port: dict[int, Allocation] = {}
        self._owned: dict[str, int] = {}
        self._reservations: dict[bytes, Reservation] = {}
        self._deleted: OrderedDict[SocketAddress, _Deleted] = OrderedDict()
        self._deadlines: Deadlines[Allocation | bytes] = Deadlines()  # a reservation is known by its token
        self.by_client = self._by_client.get
        """The allocation of a client, or None."""
        self.by_port = self._by_port.get
        """The allocation of a relayed port, or None."""

    def __len__(self) -> int:
        return len(self._by_client)

    def owned_by(self, owner: str) -> int:
        return self._owned.get(owner, 0)

    def add(self, allocation: Allocation) -> None:
        self._by_client[allocation.client] = allocation
        self._by_port[allocation.port] = allocation
        self._owned[allocation.owner] = self.owned_by(allocation.owner) + 1
        self._deleted.pop(allocation.client, None)
        self._deadlines.set(allocation, allocation.next_timeout())

    def changed(self, allocation: Allocation, at: float) -> None:
        """Something of the allocation now ends at that time. An earlier deadline stays, even if it is void."""
        self._deadlines.no_later_than(allocation, at, "allocation, channel or permission over")

    def remove(self, allocation: Allocation, families: list[int], now: float) -> None:
        """Drop relayed addresses of an allocation, and the allocation itself with the last."""
        allocation.remove(families)
        self._outbox.commands.append(ClosePort(allocation.port, tuple(families)))
        if allocation.relayed:
            return
        del self._by_client[allocation.client]
        del self._by_port[allocation.port]
        self._owned[allocation.owner] -= 1
        if not self._owned[allocation.owner]:
            del self._owned[allocation.owner]
        self._deadlines.set(allocation, None)
        self.ports.release(allocation.port, now)
        if self.is_draining and not self._by_client:
            self._outbox.commands.append(Drained())

    def drain(self) -> None:
        if not self.is_draining:
            self.is_draining = True
            if not self._by_client:
                self._outbox.commands.append(Drained())

    def remember_deletion(self, client: SocketAddress, transaction_id: bytes, now: float) -> None:
        self._deleted[client] = _Deleted(transaction_id, now + TRANSACTION_LIFETIME)
        if len(self._deleted) > _MAX_DELETED:
            self._deleted.popitem(last=False)

    def was_deleted_by(self, client: SocketAddress, transaction_id: bytes, now: float) -> bool:
        """Whether this is the retransmission of a request that deleted the client's allocation."""
        deleted = self._deleted.get(client)
        return deleted is not None and deleted.transaction_id == transaction_id and now < deleted.until

    def reserve(self, reservation: Reservation, now: float) -> bytes:
        """Reserve a taken port for the client that presents the returned token."""
        token = self._entropy(TOKEN_SIZE)
        self._reservations[token] = reservation
        self._deadlines.set(token, Timeout(now + RESERVATION_LIFETIME, "reservation over"))
        return token

    def claim(self, token: bytes) -> Reservation | None:
        """Take the reservation of this token; None if it is unknown."""
        self._deadlines.set(token, None)
        return self._reservations.pop(token, None)

    def next_timeout(self) -> Timeout | None:
        return self._deadlines.first()

    def handle_timeout(self, now: float) -> None:
        for key in self._deadlines.due(now):
            if isinstance(key, bytes):
                self.ports.release(self._reservations.pop(key).port, now)
                continue
            expired = key.expired(now)
            if expired:
                self.remove(key, expired, now)
            if key.relayed:
                key.prune(now)
                self._deadlines.set(key, key.next_timeout())

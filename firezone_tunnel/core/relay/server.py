"""A STUN and TURN server (RFC 8489 and 8656) without sockets: docs/protocol/gateway-and-relay.md, 7 to 9.

It takes datagrams of clients, and of peers at the relayed addresses, and emits `RelayTransmit`s, which name the
socket. It keeps no state for unauthenticated senders.
"""

from __future__ import annotations

from collections.abc import Iterator

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.relay.allocation import CHANNEL_LIFETIME, PERMISSION_LIFETIME, Allocation, family_of
from firezone_tunnel.core.relay.allocator import Allocator, RelayConfig, granted_lifetime
from firezone_tunnel.core.relay.authentication import (
    AuthenticatedRequest,
    AuthenticationRefusal,
    Authenticator,
    RejectedLogin,
)
from firezone_tunnel.core.relay.budget import ResponseBudget
from firezone_tunnel.core.relay.credentials import CredentialSource
from firezone_tunnel.core.relay.forwarding import Forwarder, buffer_pool
from firezone_tunnel.core.relay.nonce import NONCE_KEY_SIZE, Nonces
from firezone_tunnel.core.relay.outputs import Command, Outbox, RelayCounters, RelayTransmit
from firezone_tunnel.core.relay.peer_policy import PeerPolicy
from firezone_tunnel.core.relay.port_range import PortRange
from firezone_tunnel.core.relay.registry import Registry
from firezone_tunnel.core.relay.responder import Responder, unknown_attributes
from firezone_tunnel.core.sansio import Entropy, Timeout
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, parse
from firezone_tunnel.core.turn.channel_data import (
    FIRST_CHANNEL,
    LAST_PARSED_CHANNEL,
    common_channel_data,
    parse_channel_data,
)


class RelayServer:
    """Sans-IO: after each `handle_*` drain `transmits` and `commands`, whose ports may be opened at once.

    Raises: ValueError from the constructor for a relay without a public address or without ports.
    """

    def __init__(
        self,
        config: RelayConfig,
        *,
        credentials: CredentialSource,
        policy: PeerPolicy,
        entropy: Entropy,
        now: float,
        nonce_key: bytes | None = None,
    ) -> None:
        """`nonce_key` is shared by workers, so that each accepts the others' nonces; None: a random key."""
        if not config.hosts:
            raise ValueError("a relay needs a public address")
        self._same_user_only = config.same_user_only
        self._credentials = credentials
        self._policy = policy
        self._outbox = Outbox()
        nonces = Nonces(nonce_key or entropy(NONCE_KEY_SIZE))
        self._registry = Registry(PortRange(config.own_ports, entropy), self._outbox, entropy)
        self._authenticator = Authenticator(credentials, nonces)
        budget = ResponseBudget(entropy, now, workers=config.workers)
        self._responder = Responder(credentials, nonces, budget, self._outbox)
        self._allocator = Allocator(config, credentials, self._registry, self._responder, self._outbox)
        self._forwarder = Forwarder(self._registry, policy, self._outbox, entropy, buffer_pool())

    @property
    def counters(self) -> RelayCounters:
        return self._outbox.counters

    @property
    def last_rejected(self) -> RejectedLogin | None:
        """The newest of `counters.rejected_logins`."""
        return self._outbox.last_rejected

    @property
    def allocations(self) -> int:
        """The number of allocations."""
        return len(self._registry)

    @property
    def channels(self) -> int:
        """The number of channels, bound or still reserved, of all allocations."""
        return self._allocator.quota.channels

    def handle_client_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> None:
        """Handle a batch that arrived at the listening port."""
        self._catch_up(now)
        if not batch.source.port:
            self._outbox.counters.unrecognized += batch.count
            return
        data = common_channel_data(batch.rows, exact=False)
        if data is not None:
            self._forwarder.from_channel(batch.source, data, batch.ecn, now)
            return
        for index in range(batch.count):
            self._handle_datagram(index, batch, now, utc_now)

    def handle_peer_datagrams(self, port: int, batch: DatagramBatch, now: float) -> None:
        """Handle a batch that arrived at an allocation's relayed address, of the family of its source."""
        self._catch_up(now)
        self._forwarder.from_peer(port, batch, now)

    def handle_port_opened(self, port: int, now: float) -> bool:
        """The port of an `OpenPort` is open. False: it is no longer needed, close it."""
        return self._allocator.handle_port_opened(port, now)

    def handle_port_failed(self, port: int, now: float, *, exhausted: bool = False) -> None:
        """Another process has taken the port, or (`exhausted`) the host has no more sockets."""
        self._allocator.handle_port_failed(port, now, exhausted=exhausted)

    def drain(self) -> None:
        """Refuse new allocations (508). `Drained` follows when the last allocation is gone."""
        self._registry.drain()

    def transmits(self) -> Iterator[RelayTransmit]:
        waiting = self._outbox.waiting
        while waiting:
            yield waiting.popleft()

    def commands(self) -> Iterator[Command]:
        commands = self._outbox.commands
        while commands:
            yield commands.popleft()

    def next_timeout(self) -> Timeout | None:
        return self._registry.next_timeout()

    def handle_timeout(self, now: float) -> None:
        """End whatever has expired."""
        self._registry.handle_timeout(now)

    def _catch_up(self, now: float) -> None:
        """Handle due timeouts first: a late timer must not prolong anything."""
        due = self._registry.next_timeout()
        if due is not None and due.at <= now:
            self._registry.handle_timeout(now)

    def _handle_datagram(self, index: int, batch: DatagramBatch, now: float, utc_now: float) -> None:
        data = parse_channel_data(batch.rows, index, exact=False)
        if data is not None:
            self._forwarder.from_channel(batch.source, data, batch.ecn, now)
            return
        message = parse(batch.rows.row(index))
        if message is not None and (not message.has_fingerprint or message.is_intact()):
            self._handle_message(message, batch, now, utc_now)
            return
        self._outbox.counters.unrecognized += 1

    def _handle_message(self, message: Message, batch: DatagramBatch, now: float, utc_now: float) -> None:
        source, local = batch.source, batch.local
        if message.kind is Kind.INDICATION and message.method == Method.SEND and not unknown_attributes(message):
            self._forwarder.from_indication(source, message, batch.ecn, now)
            return
        if message.kind is not Kind.REQUEST or message.method not in _REQUESTS:
            self._outbox.counters.unrecognized += 1
            return
        if message.method == Method.BINDING:
            self._responder.answer_binding(
                message, source, local, now, proven=self._registry.by_client(source) is not None
            )
            return
        sender = self._authenticator.authenticate(message, source, local, now, utc_now)
        if isinstance(sender, AuthenticationRefusal):
            if sender.rejected is not None:
                self._outbox.reject(sender.rejected)
            self._responder.refuse(sender, message, source, local, now)
            return
        self._handle_request(sender, now)

    def _handle_request(self, request: AuthenticatedRequest, now: float) -> None:
        message = request.message
        unknown = unknown_attributes(message)
        if unknown is not None:
            self._responder.fail(request, 420, unknown)
            return
        if message.method == Method.ALLOCATE:
            self._allocator.handle(request, now)
            return
        allocation = self._registry.by_client(request.client)
        if allocation is None:
            self._handle_without_allocation(request, now)
            return
        if self._same_user_only and allocation.username != request.username:
            self._responder.fail(request, 441)
            return
        allocation.local = request.local
        if message.method == Method.REFRESH:
            self._refresh(request, allocation, now)
        elif message.method == Method.CREATE_PERMISSION:
            self._create_permission(request, allocation, now)
        else:
            self._bind_channel(request, allocation, now)

    def _handle_without_allocation(self, request: AuthenticatedRequest, now: float) -> None:
        message = request.message
        if self._registry.was_deleted_by(request.client, message.transaction_id, now):
            self._responder.succeed(request, (stun.LIFETIME, 0))
            return
        self._responder.fail(request, 437)

    def _refresh(self, request: AuthenticatedRequest, allocation: Allocation, now: float) -> None:
        """RFC 8656, section 8.2."""
        message = request.message
        requested = message.get(stun.REQUESTED_ADDRESS_FAMILY)
        families = [family for family in allocation.relayed if requested in {None, family}]
        if not families:
            self._responder.fail(request, 443)
            return
        if message.get(stun.LIFETIME) == 0:
            self._registry.remove(allocation, families, now)
            self._registry.remember_deletion(request.client, message.transaction_id, now)
            self._responder.succeed(request, (stun.LIFETIME, 0))
            return
        lifetime = granted_lifetime(message)
        allocation.refresh(families, now + lifetime)
        self._registry.changed(allocation, now + lifetime)
        self._responder.succeed(request, (stun.LIFETIME, lifetime))

    def _create_permission(self, request: AuthenticatedRequest, allocation: Allocation, now: float) -> None:
        """RFC 8656, section 10.2: install all of the permissions, or none."""
        hosts = [peer.host for peer in request.message.get_all(stun.XOR_PEER_ADDRESS)]
        if not hosts:
            self._responder.fail(request, 400)
            return
        if any(family_of(host) not in allocation.relayed for host in hosts):
            self._responder.fail(request, 443)
            return
        refused = next((host for host in hosts if not self._policy.permits_host(host)), None)
        if refused is not None:
            self._outbox.refuse_peer(self._policy.private_network(refused))
            self._responder.fail(request, 403)
            return
        if not allocation.may_permit(hosts):
            self._responder.fail(request, 508)
            return
        allocation.permit(hosts, now)
        allocation.wants_indications = True
        self._registry.changed(allocation, now + PERMISSION_LIFETIME)
        self._responder.succeed(request)

    def _bind_channel(self, request: AuthenticatedRequest, allocation: Allocation, now: float) -> None:
        """RFC 8656, section 12.2."""
        number = request.message.get(stun.CHANNEL_NUMBER)
        peer = request.message.get(stun.XOR_PEER_ADDRESS)
        if number is None or peer is None or not peer.port or not FIRST_CHANNEL <= number <= LAST_PARSED_CHANNEL:
            self._responder.fail(request, 400)
            return
        if family_of(peer.host) not in allocation.relayed:
            self._responder.fail(request, 443)
            return
        if not self._policy.permits(peer):
            self._outbox.refuse_peer(self._policy.private_network(peer.host))
            self._responder.fail(request, 403)
            return
        code = allocation.bind(number, peer, now, is_relayed=self._policy.is_relayed(peer.host))
        if code:
            self._responder.fail(request, code)
            return
        self._registry.changed(allocation, now + min(PERMISSION_LIFETIME, CHANNEL_LIFETIME))
        self._responder.succeed(request)


_REQUESTS = frozenset({Method.BINDING, Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND})

"""Handles Allocate requests (RFC 8656, section 7.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs

from firezone_tunnel.core.relay.allocation import Allocation, Quota
from firezone_tunnel.core.relay.authentication import AuthenticatedRequest
from firezone_tunnel.core.relay.credentials import CredentialSource
from firezone_tunnel.core.relay.outputs import OpenPort, Outbox
from firezone_tunnel.core.relay.registry import Registry, Reservation
from firezone_tunnel.core.relay.responder import Responder
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import FAMILY_IPV4, FAMILY_IPV6, AddressError, Attribute, Message

DEFAULT_LIFETIME = 600  # RFC 8656, section 3.2; also the least that is granted
MAX_LIFETIME = 3600  # RFC 8656, section 7.2
MAX_ATTEMPTS = 8
"""Ports that are tried if other processes of the host have taken some."""


@attrs.frozen
class RelayConfig:
    """The addresses that a relay serves, and its limits. It needs at least one public address; 0 is no limit."""

    public_ipv4: str | None = None
    public_ipv6: str | None = None
    lowest_port: int = 49152
    highest_port: int = 65535
    max_allocations: int = 0
    max_allocations_per_user: int = 0
    max_channels: int = 200_000
    max_permissions: int = 400_000
    workers: int = 1
    """How many processes share the listening port (docs/decisions.md, 24), and with it these ports and limits."""
    worker: int = 0
    """The number of this worker, from 0."""
    same_user_only: bool = False
    """Refuse (441) requests of another valid user for an allocation; Firezone's peers change their names."""

    @property
    def hosts(self) -> dict[int, str]:
        """The public addresses by family, IPv4 first."""
        both = {FAMILY_IPV4: self.public_ipv4, FAMILY_IPV6: self.public_ipv6}
        return {family: host for family, host in both.items() if host is not None}

    @property
    def own_ports(self) -> range:
        """This worker's part of the ports. The parts are adjacent and of nearly equal size."""
        count = self.highest_port - self.lowest_port + 1
        first, after = (count * worker // self.workers for worker in (self.worker, self.worker + 1))
        return range(self.lowest_port + first, self.lowest_port + after)

    def share(self, limit: int) -> int:
        """One worker's share of a limit for all workers together."""
        return -(-limit // self.workers)


class AllocationTerms(NamedTuple):
    """The parameters of an Allocate request."""

    families: tuple[int, ...]
    missing: tuple[int, ...] = ()
    """Requested families that this relay doesn't serve."""
    even: bool = False
    reserve_next: bool = False
    token: bytes | None = None

    @classmethod
    def of(cls, message: Message, served: dict[int, str]) -> AllocationTerms | int:
        """Read a request; an error code if it is invalid or can't be granted here."""
        transport = message.get(stun.REQUESTED_TRANSPORT)
        if transport is None:
            return 400
        if transport != stun.UDP:
            return 442
        requested = message.get(stun.REQUESTED_ADDRESS_FAMILY)
        additional = message.get(stun.ADDITIONAL_ADDRESS_FAMILY)
        if additional is None:
            additional = message.get(stun.COTURN_ADDITIONAL_ADDRESS_FAMILY)
        even_port, token = message.get(stun.EVEN_PORT), message.get(stun.RESERVATION_TOKEN)
        if token is not None:
            alone = requested is None and additional is None and even_port is None
            return cls((), token=token) if alone else 400
        if additional is not None:
            if requested is not None or additional != FAMILY_IPV6 or even_port:
                return 400
            wanted: tuple[int, ...] = (FAMILY_IPV4, FAMILY_IPV6)
        else:
            wanted = (FAMILY_IPV4 if requested is None else requested,)
        families = tuple(family for family in wanted if family in served)
        if not families:
            return 440
        missing = tuple(family for family in wanted if family not in served)
        return cls(families, missing, even=even_port is not None, reserve_next=bool(even_port))


class _Opening(NamedTuple):
    """An allocation whose sockets are being opened."""

    request: AuthenticatedRequest
    terms: AllocationTerms
    reserved: int | None
    """The next port, to be reserved."""
    attempt: int


class Allocator:
    """Makes allocations. While sockets are being opened, retransmissions of the request are ignored."""

    def __init__(
        self,
        config: RelayConfig,
        credentials: CredentialSource,
        registry: Registry,
        responder: Responder,
        outbox: Outbox,
    ) -> None:
        self.quota = Quota(config.share(config.max_channels), config.share(config.max_permissions))
        self._config = config
        self._hosts = config.hosts
        self._max_allocations = config.share(config.max_allocations)
        self._max_per_user = config.share(config.max_allocations_per_user)
        self._credentials = credentials
        self._registry = registry
        self._responder = responder
        self._outbox = outbox
        self._opening: dict[int, _Opening] = {}  # by port; more than one only while the shell is busy

    def handle(self, request: AuthenticatedRequest, now: float) -> None:
        if any(opening.request.client == request.client for opening in self._opening.values()):
            return
        terms = AllocationTerms.of(request.message, self._hosts)
        allocation = self._registry.by_client(request.client)
        if allocation is not None:
            if allocation.transaction_id != request.message.transaction_id or isinstance(terms, int):
                self._responder.fail(request, 437)
                return
            self._succeed(request, allocation, terms, now)
            return
        if isinstance(terms, int):
            self._responder.fail(request, terms)
            return
        if terms.reserve_next and self._config.workers > 1:  # any worker might get the token
            self._responder.fail(request, 508)
            return
        code = self._limit(request)
        if code:
            self._responder.fail(request, code)
            return
        if terms.token is None:
            self._open(request, terms, now, attempt=1)
        else:
            self._open_reserved(request, terms, terms.token)

    def handle_port_opened(self, port: int, now: float) -> bool:
        """Grant the allocation. False: nothing is being opened there."""
        opening = self._opening.pop(port, None)
        if opening is None:
            return False
        request, terms, reserved, _ = opening
        token = None
        if reserved is not None:
            token = self._registry.reserve(Reservation(reserved, terms.families), now)
        allocation = Allocation(
            request.client,
            request.local,
            port=port,
            hosts={family: self._hosts[family] for family in terms.families},
            username=request.username,
            owner=self._credentials.owner(request.username),
            transaction_id=request.message.transaction_id,
            expires_at=now + granted_lifetime(request.message),
            quota=self.quota,
            token=token,
        )
        self._registry.add(allocation)
        self._succeed(request, allocation, terms, now)
        return True

    def handle_port_failed(self, port: int, now: float, *, exhausted: bool) -> None:
        """Try another port, unless the host has no more sockets (`exhausted`)."""
        opening = self._opening.pop(port, None)
        if opening is None:
            return
        self._registry.ports.release(port, now)
        if opening.reserved is not None:
            self._registry.ports.release(opening.reserved, now)
        if exhausted or opening.attempt >= MAX_ATTEMPTS or opening.terms.token is not None:
            self._responder.fail(opening.request, 508)
            return
        self._open(opening.request, opening.terms, now, attempt=opening.attempt + 1)

    def _limit(self, request: AuthenticatedRequest) -> int:
        """The error code if a limit is reached, else 0."""
        registry = self._registry
        if registry.is_draining:
            return 508
        total = len(registry) + len(self._opening)
        owner = self._credentials.owner(request.username)
        if self._max_allocations and total >= self._max_allocations:
            return 486
        if self._max_per_user and registry.owned_by(owner) >= self._max_per_user:
            return 486
        return 0

    def _open(self, request: AuthenticatedRequest, terms: AllocationTerms, now: float, *, attempt: int) -> None:
        port = self._registry.ports.take(now, even=terms.even, with_next=terms.reserve_next)
        if port is None:
            self._responder.fail(request, 508)
            return
        reserved = port + 1 if terms.reserve_next else None
        self._opening[port] = _Opening(request, terms, reserved, attempt)
        self._outbox.commands.append(OpenPort(port, terms.families))

    def _open_reserved(self, request: AuthenticatedRequest, terms: AllocationTerms, token: bytes) -> None:
        reservation = self._registry.claim(token)
        if reservation is None:
            self._responder.fail(request, 508)
            return
        terms = terms._replace(families=reservation.families)
        self._opening[reservation.port] = _Opening(request, terms, None, 1)
        self._outbox.commands.append(OpenPort(reservation.port, terms.families))

    def _succeed(
        self, request: AuthenticatedRequest, allocation: Allocation, terms: AllocationTerms, now: float
    ) -> None:
        """Also answers a retransmission, with the remaining lifetime (RFC 8656, section 7.2)."""
        relayed = allocation.relayed.values()
        left = max(0, round(min(allocation.expires_at.values()) - now))
        attributes: list[tuple[Attribute[Any], Any]] = [(stun.XOR_RELAYED_ADDRESS, address) for address in relayed]
        attributes += [(stun.XOR_MAPPED_ADDRESS, request.client), (stun.LIFETIME, left)]
        if allocation.token is not None:
            attributes.append((stun.RESERVATION_TOKEN, allocation.token))
        attributes += [(stun.ADDRESS_ERROR_CODE, AddressError(family, 440)) for family in terms.missing]
        self._responder.succeed(request, *attributes)


def granted_lifetime(message: Message) -> int:
    """In seconds: the requested lifetime within the limits, or the default (RFC 8656, section 7.2)."""
    asked = message.get(stun.LIFETIME)
    return DEFAULT_LIFETIME if asked is None else min(max(asked, DEFAULT_LIFETIME), MAX_LIFETIME)

"""Responses: signed for users, small and few for unauthenticated senders (docs/decisions.md, 22)."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.core.relay.authentication import AuthenticatedRequest, AuthenticationRefusal
from firezone_tunnel.core.relay.budget import MAX_RESPONSE, ResponseBudget
from firezone_tunnel.core.relay.credentials import CredentialSource
from firezone_tunnel.core.relay.nonce import Nonces
from firezone_tunnel.core.relay.outputs import Outbox, RelayTransmit
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Attribute, ErrorCode, Kind, Message

Attributes = tuple[tuple[Attribute[Any], Any], ...]

_MAX_NAMED = 16  # of the unknown attributes, to keep a response below 100 bytes


class Responder:
    """Sends responses, without SOFTWARE, and with a FINGERPRINT if the request has one.

    Only a 401 has a reason, and only where the response is not too large with it.
    """

    def __init__(self, credentials: CredentialSource, nonces: Nonces, budget: ResponseBudget, outbox: Outbox) -> None:
        self._credentials = credentials
        self._nonces = nonces
        self._budget = budget
        self._outbox = outbox

    def succeed(self, request: AuthenticatedRequest, *attributes: tuple[Attribute[Any], Any]) -> None:
        self._answer(request, Kind.SUCCESS, attributes, 0)

    def fail(self, request: AuthenticatedRequest, code: int, *attributes: tuple[Attribute[Any], Any]) -> None:
        self._answer(request, Kind.ERROR, ((stun.ERROR_CODE, ErrorCode(code)), *attributes), code)

    def refuse(
        self, refusal: AuthenticationRefusal, message: Message, client: SocketAddress, local: SocketAddress, now: float
    ) -> None:
        """Refuse an unauthenticated request, with realm and nonce if authentication may help."""
        challenge: Attributes = ()
        if refusal.code in {401, 438}:
            challenge = ((stun.REALM, self._credentials.realm), (stun.NONCE, self._nonces.issue(client, now)))
        response = b""
        for reason in (_UNAUTHORIZED, "") if refusal.code == 401 else ("",):
            error = (stun.ERROR_CODE, ErrorCode(refusal.code, reason))
            response = _response(message, Kind.ERROR, (error, *challenge), refusal.key)
            if len(response) <= _limit(message):
                break
        self._to_unauthenticated(response, message, client, local, refusal.code, now)

    def answer_binding(
        self, message: Message, client: SocketAddress, local: SocketAddress, now: float, *, proven: bool
    ) -> None:
        """Answer a Binding request, which needs no authentication. `proven`: the client has an allocation."""
        unknown = unknown_attributes(message)
        kind = Kind.SUCCESS
        attributes: Attributes = ((stun.XOR_MAPPED_ADDRESS, client),)
        if unknown is not None:
            kind = Kind.ERROR
            attributes = ((stun.ERROR_CODE, ErrorCode(420)), unknown)
        response = _response(message, kind, attributes, None)
        self._to_unauthenticated(response, message, client, local, 420 if unknown else 0, now, proven=proven)

    def _answer(self, request: AuthenticatedRequest, kind: Kind, attributes: Attributes, code: int) -> None:
        response = _response(request.message, kind, attributes, request.key)
        self._send(response, request.message, request.client, request.local, code)

    def _to_unauthenticated(
        self,
        response: bytes,
        message: Message,
        client: SocketAddress,
        local: SocketAddress,
        code: int,
        now: float,
        *,
        proven: bool = False,
    ) -> None:
        size = len(message.raw)
        if not proven:
            self._budget.received(size)
        if len(response) > _limit(message) or not self._budget.spend(client, len(response), now, proven=proven):
            self._outbox.counters.withheld_responses += 1
            return
        self._send(response, message, client, local, code)

    def _send(self, response: bytes, message: Message, client: SocketAddress, local: SocketAddress, code: int) -> None:
        self._outbox.counters.responses[str(code or "success")] += 1
        self._outbox.send(RelayTransmit(client, response, source=local))


def unknown_attributes(message: Message) -> tuple[Attribute[Any], tuple[int, ...]] | None:
    """UNKNOWN-ATTRIBUTES for a message with unknown comprehension-required attributes, else None."""
    numbers = [
        attribute.number
        for attribute, _ in message.attributes
        if attribute.number < _OPTIONAL and attribute.number not in stun.ATTRIBUTES
    ]
    return (stun.UNKNOWN_ATTRIBUTES, tuple(dict.fromkeys(numbers))[:_MAX_NAMED]) if numbers else None


_UNAUTHORIZED = "Unauthorized"  # RFC 8489, section 14.8
_OPTIONAL = 0x8000  # RFC 8489, section 14: comprehension-optional from here on


def _limit(message: Message) -> int:
    """The largest response to an unauthenticated request, in bytes."""
    return max(MAX_RESPONSE, len(message.raw))


def _response(message: Message, kind: Kind, attributes: Attributes, key: bytes | None) -> bytes:
    response = Message(message.method, kind, message.transaction_id, attributes)
    return response.encode(key=key, fingerprint=message.has_fingerprint)

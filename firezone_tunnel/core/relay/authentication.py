"""Authenticates requests (RFC 8489, section 9.2.4), in the order that Firezone's clients rely on.

They send their first Allocate with USERNAME and MESSAGE-INTEGRITY but without NONCE, give up on a second 401, and
ignore responses without MESSAGE-INTEGRITY (docs/protocol/gateway-and-relay.md, 9).
"""

from __future__ import annotations

from typing import NamedTuple

from firezone_tunnel.core.relay.credentials import CredentialSource
from firezone_tunnel.core.relay.nonce import Nonces
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Message


class AuthenticatedRequest(NamedTuple):
    """An authenticated request. Responses to it are signed with `key`."""

    message: Message
    client: SocketAddress
    local: SocketAddress
    username: str
    key: bytes


class RejectedLogin(NamedTuple):
    """Credentials that a client presented in vain."""

    reason: str  # "unknown user", "expired" or "wrong password"
    username: str
    client: SocketAddress


class AuthenticationRefusal(NamedTuple):
    """An error response for an unauthenticated request, signed with the `key` of its USERNAME if that is valid.

    `rejected` is None where the request carries no credentials that could be judged: a first request, a stale nonce.
    """

    code: int
    key: bytes | None
    rejected: RejectedLogin | None = None


class Authenticator:
    def __init__(self, credentials: CredentialSource, nonces: Nonces) -> None:
        self._credentials = credentials
        self._nonces = nonces

    def authenticate(
        self, message: Message, client: SocketAddress, local: SocketAddress, now: float, utc_now: float
    ) -> AuthenticatedRequest | AuthenticationRefusal:
        username = message.get(stun.USERNAME)
        key = None if username is None else self._credentials.key(username)
        if not message.has_integrity:
            return AuthenticationRefusal(401, key)
        if username is None or message.get(stun.REALM) is None:
            return AuthenticationRefusal(400, key)
        nonce = message.get(stun.NONCE)
        if nonce is None:
            return AuthenticationRefusal(401, key)
        if not self._nonces.is_valid(nonce, client, now):
            return AuthenticationRefusal(438, key)
        if key is None:
            return AuthenticationRefusal(401, key, RejectedLogin("unknown user", username, client))
        if not message.is_authentic(key):
            return AuthenticationRefusal(401, key, RejectedLogin("wrong password", username, client))
        if not self._credentials.is_current(username, utc_now):
            return AuthenticationRefusal(401, key, RejectedLogin("expired", username, client))
        return AuthenticatedRequest(message, client, local, username, key)

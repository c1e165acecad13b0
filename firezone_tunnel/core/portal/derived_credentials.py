"""Credentials that the portal derives for two devices that connect (docs/protocol/portal-protocol.md, 3.4, 3.6, 3.7).

Every derivation is deterministic: the same pair with the same keys gets the same credentials, and so keeps its
connection. Public keys are the padded base64 text that goes over the wire.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from firezone_tunnel.core.messages.common import IceCredentials, Relay
from firezone_tunnel.core.relay.credentials import stamp_password
from firezone_tunnel.core.sansio import SocketAddress

FOREVER = 2145916800  # 2038-01-01T00:00:00Z: stands for "never expires" in fields that need a time


def expiry(expires_at: int | None) -> int:
    """The unix time to send for an authorization.

    Upstream's gateways drop a whole `init` in which it is null (docs/decisions.md, 34).
    """
    return FOREVER if expires_at is None else expires_at


class PairCredentials(NamedTuple):
    """ICE credentials of both ends of one connection."""

    client: IceCredentials
    gateway: IceCredentials


class Party(NamedTuple):
    """One end of a connection: its id, its public key and a secret that only the portal knows."""

    id: str
    public_key: str
    psk_base: bytes


def ice_credentials(client: Party, gateway: Party) -> PairCredentials:
    """Base32 of a hash over both identities, cut into four pieces (docs/protocol/portal-protocol.md, 3.6)."""
    seed = f"{client.id}:{client.public_key}:{gateway.id}:{gateway.public_key}"
    text = base64.b32encode(hashlib.sha256(seed.encode()).digest()).decode().rstrip("=").lower()
    return PairCredentials(
        client=IceCredentials(username=text[:4], password=text[4:26]),
        gateway=IceCredentials(username=text[26:30], password=text[30:52]),
    )


def preshared_key(client: Party, gateway: Party) -> bytes:
    """32 bytes, PBKDF2 with one round over both devices' secrets (docs/protocol/portal-protocol.md, 3.7)."""
    salt = f"WG_PSK|C_ID:{client.id}|G_ID:{gateway.id}|C_PK:{client.public_key}|G_PK:{gateway.public_key}"
    return hashlib.pbkdf2_hmac("sha256", client.psk_base + gateway.psk_base, salt.encode(), 1, 32)


def relay_credentials(
    relay_id: str, address: SocketAddress, *, stamp_secret: str, public_key: str, expires_at: int
) -> Relay:
    """A TURN username and password that the relay can recompute from its stamp secret.

    See docs/protocol/portal-protocol.md, 3.4.
    """
    salt = _base64_unpadded(hashlib.sha256(public_key.encode()).digest())
    return Relay(
        id=relay_id,
        addr=str(address),
        username=f"{expires_at}:{salt}",
        password=stamp_password(expires_at, stamp_secret, salt),
        expires_at=expires_at,
    )


def sign_reference(contents: Mapping[str, str], key: bytes) -> str:
    """An opaque, tamper-proof `ref`: base64url contents, a dot, their HMAC-SHA256."""
    body = _base64url(msgspec.json.encode(contents))
    return f"{body}.{_base64url(_mac(body, key))}"


def open_reference(reference: str, key: bytes) -> dict[str, str] | None:
    """The contents of a `ref` that we signed; None for any other text."""
    body, _, signature = reference.partition(".")
    if not reference.isascii() or not hmac.compare_digest(signature, _base64url(_mac(body, key))):
        return None
    padded = body + "=" * (-len(body) % 4)
    return msgspec.json.decode(base64.urlsafe_b64decode(padded), type=dict[str, str])


def json_web_token(claims: Mapping[str, object], key: bytes) -> str:
    """A compact JWS, HS256 (RFC 7515, section 3.1)."""
    header = _base64url(b'{"alg":"HS256","typ":"JWT"}')
    signed = f"{header}.{_base64url(msgspec.json.encode(claims))}"
    return f"{signed}.{_base64url(_mac(signed, key))}"


def _mac(text: str, key: bytes) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")


def _base64_unpadded(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")

"""Who may use the relay: long-term credentials (RFC 8489, section 9.2), derived from a secret or listed.

The portal and the relay derive the same passwords from the relay's stamp secret, and so never need to talk about
them (docs/protocol/gateway-and-relay.md, 6.3).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from firezone_tunnel.core.stun.message import FIREZONE_REALM, long_term_key

MAX_REALM = 32
"""In bytes: a longer realm would make a 401 larger than 100 bytes."""

_MAX_EXPIRY = (1 << 64) - 1
_MAX_EXPIRY_DIGITS = 20


class CredentialSource(Protocol):
    """Provides the keys of users."""

    @property
    def realm(self) -> str: ...

    def key(self, username: str) -> bytes | None:
        """The MESSAGE-INTEGRITY key of a user, expired or not; None for an invalid name."""

    def is_current(self, username: str, utc_now: float) -> bool:
        """Whether the name has not expired."""

    def owner(self, username: str) -> str:
        """The owner that quotas are counted for."""


class StampSecret:
    """Firezone's scheme: names are `<expiry>:<salt>`, passwords a hash of both and the secret.

    See docs/protocol/gateway-and-relay.md, 6.3.
    """

    realm = FIREZONE_REALM

    def __init__(self, secret: str) -> None:
        """`secret` is text: usually 64 hexadecimal digits, used as digits and not decoded."""
        self._secret = secret

    def key(self, username: str) -> bytes | None:
        name = _StampName.parse(username)
        if name is None:
            return None
        return long_term_key(username, self.realm, stamp_password(name.expiry, self._secret, name.salt))

    def is_current(self, username: str, utc_now: float) -> bool:
        name = _StampName.parse(username)
        return name is not None and name.expiry >= utc_now

    def owner(self, username: str) -> str:
        """The salt stands for a peer's key, while each of the peer's credentials has another expiry."""
        name = _StampName.parse(username)
        return username if name is None else name.salt


class StaticUsers:
    """A list of users, for a relay without a portal."""

    def __init__(self, passwords: Mapping[str, str], realm: str) -> None:
        """Raises: ValueError for a realm that is empty or longer than 32 bytes."""
        if not 0 < len(realm.encode()) <= MAX_REALM:
            raise ValueError(f"a realm must have 1 to {MAX_REALM} bytes: {realm!r}")
        self._realm = realm
        self._keys = {name: long_term_key(name, realm, password) for name, password in passwords.items()}

    @property
    def realm(self) -> str:
        return self._realm

    def key(self, username: str) -> bytes | None:
        return self._keys.get(username)

    def is_current(self, username: str, utc_now: float) -> bool:
        return username in self._keys

    def owner(self, username: str) -> str:
        return username


def stamp_password(expiry: int, secret: str, salt: str) -> str:
    """Unpadded base64 of SHA-256 over `<expiry>:<secret>:<salt>` (docs/protocol/gateway-and-relay.md, 6.3)."""
    digest = hashlib.sha256(f"{expiry}:{secret}:{salt}".encode()).digest()
    return base64.b64encode(digest).decode().rstrip("=")


class _StampName(NamedTuple):
    expiry: int
    """Unix time, in seconds."""
    salt: str

    @classmethod
    def parse(cls, username: str) -> _StampName | None:
        expiry, colon, salt = username.partition(":")
        if not colon or ":" in salt or not (expiry.isascii() and expiry.isdecimal()):
            return None
        if len(expiry) > _MAX_EXPIRY_DIGITS or int(expiry) > _MAX_EXPIRY:
            return None
        return cls(int(expiry), salt)

"""The long-term credential mechanism, the client's side (RFC 8489, section 9.2; docs/protocol/data-plane.md, 3.3)."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.core.stun.message import NONCE, REALM, USERNAME, Attribute, Message, long_term_key


class LongTermCredentials:
    """A name and a password, the realm that they are for, and the relay's latest nonce.

    A `realm` of None is learned from the relay's first challenge.
    """

    def __init__(self, username: str, password: str, realm: str | None) -> None:
        """Raises: ValueError, if a message can't carry them."""
        USERNAME.encode(username, b"")
        if realm is not None:
            REALM.encode(realm, b"")
        self.username = username
        self.password = password
        self.realm = realm
        self.nonce: str | None = None
        self.vouched_nonce: str | None = None
        """The latest nonce from a signed message: a 401 to a request that carries it rejects our credentials."""
        self.key = None if realm is None else long_term_key(username, realm, password)
        self._learns_realm = realm is None

    def attributes(self) -> tuple[tuple[Attribute[Any], Any], ...]:
        """The attributes that a signed request carries right before its MESSAGE-INTEGRITY."""
        known = ((USERNAME, self.username), (REALM, self.realm))
        return known if self.nonce is None else (*known, (NONCE, self.nonce))

    def take_challenge(self, message: Message, *, first: bool, is_vouched: bool) -> bool:
        """Sign with the realm and nonce of this 401 or 438 from now on. Returns False if they can't be used.

        Only the `first` challenge of an attempt may name the realm, and only if none was configured. `is_vouched`: the
        message is signed with our key.
        """
        nonce, realm = message.get(NONCE), message.get(REALM)
        if nonce is None:
            return False
        if self._learns_realm and first and realm is not None:
            self.realm = realm
            self.key = long_term_key(self.username, realm, self.password)
        if self.realm is None or realm not in {None, self.realm}:
            return False
        self.nonce = nonce
        if is_vouched:
            self.vouched_nonce = nonce
        return True

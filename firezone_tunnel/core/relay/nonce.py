"""Stateless nonces: the time and a MAC over it and the client's address (RFC 8489, section 9.2)."""

from __future__ import annotations

import base64
import hmac
import struct

from firezone_tunnel.core.sansio import SocketAddress

NONCE_LIFETIME = 3600.0  # docs/protocol/gateway-and-relay.md, 7.4: at least an hour
NONCE_SIZE = 24
"""Characters. A 401 with realm, integrity and fingerprint then has exactly 100 bytes."""
NONCE_KEY_SIZE = 32

_MAC_SIZE = 14
_TIME = struct.Struct("!I")
"""Whole seconds of `now`, modulo 2^32."""
_WRAP = 1 << 32


class Nonces:
    """Issues and verifies nonces. A nonce is valid for one client address for an hour, wherever the key is known."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def issue(self, client: SocketAddress, now: float) -> str:
        time = _TIME.pack(int(now) % _WRAP)
        return base64.urlsafe_b64encode(time + self._mac(time, client)).decode()

    def is_valid(self, nonce: str, client: SocketAddress, now: float) -> bool:
        """Whether we issued it, to this client, no more than an hour ago."""
        if len(nonce) != NONCE_SIZE:
            return False
        try:
            raw = base64.b64decode(nonce, altchars=b"-_", validate=True)
        except ValueError:
            return False
        time, mac = raw[: _TIME.size], raw[_TIME.size :]
        if not hmac.compare_digest(mac, self._mac(time, client)):
            return False
        issued_at: int = _TIME.unpack(time)[0]
        return (int(now) - issued_at) % _WRAP <= NONCE_LIFETIME

    def _mac(self, time: bytes, client: SocketAddress) -> bytes:
        return hmac.digest(self._key, time + str(client).encode(), "sha256")[:_MAC_SIZE]

"""The MACs of handshake messages, and cookies against floods (WireGuard whitepaper, sections 5.3, 5.4.4 and 5.4.7)."""

from __future__ import annotations

import hashlib
import hmac

import attrs
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt as xchacha20poly1305_decrypt,
)
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_encrypt as xchacha20poly1305_encrypt,
)
from nacl.exceptions import CryptoError

from firezone_tunnel.core.sansio import Entropy, SocketAddress
from firezone_tunnel.core.wireguard.handshake import (
    KEY_SIZE,
    MAC_SIZE,
    CookieReply,
    HandshakeInitiation,
    HandshakeResponse,
    StaticKey,
    cookie_reply,
    parse,
    wipe,
)

COOKIE_LIFETIME = 120.0  # whitepaper, section 5.4.7: the secret changes every two minutes
HANDSHAKES_PER_SECOND = 100  # docs/protocol/data-plane.md, 2.1: more than that is load
_NONCE_SIZE = 24
_NO_MAC = bytes(MAC_SIZE)


@attrs.define
class CookieCheckerCounters:
    malformed: int = 0
    forged: int = 0
    """Messages whose mac1 does not match our key: corrupt, or from a sender that doesn't know it."""
    cookie_replies_sent: int = 0


class CookieChecker:
    """Decides which handshake messages are worth the price of an X25519; one for all peers of a static key."""

    def __init__(self, local: StaticKey, entropy: Entropy, counters: CookieCheckerCounters | None = None) -> None:
        self.counters = counters or CookieCheckerCounters()
        self._entropy = entropy
        self._mac1_key = _mac1_key(local.public)
        self._cookie_key = _cookie_key(local.public)
        self._secret = bytearray(KEY_SIZE)
        self._secret_until = float("-inf")
        self._count = 0
        self._second_ends = float("-inf")

    def admit(
        self, datagram: bytes | bytearray | memoryview, source: SocketAddress, now: float
    ) -> HandshakeInitiation | HandshakeResponse | CookieReply | bytes | None:
        """Look at a handshake message before any of its cryptography.

        Returns the message if it may go on to its peer, `bytes` to send back to `source` instead (a cookie reply:
        we are under load and the sender has yet to show that it receives what is sent to it), None to drop it.
        """
        message = parse(datagram)
        if message is None:
            self.counters.malformed += 1
            return None
        if isinstance(message, CookieReply):
            return message
        if not hmac.compare_digest(_mac(self._mac1_key, message.raw[: -2 * MAC_SIZE]), message.mac1):
            self.counters.forged += 1
            return None
        if not self._under_load(now):
            return message
        cookie = self._cookie(source, now)
        if hmac.compare_digest(_mac(cookie, message.raw[:-MAC_SIZE]), message.mac2):
            return message
        self.counters.cookie_replies_sent += 1
        nonce = self._entropy(_NONCE_SIZE)
        sealed = xchacha20poly1305_encrypt(cookie, message.mac1, nonce, self._cookie_key)
        return cookie_reply(message.sender_index, nonce, sealed)

    def _under_load(self, now: float) -> bool:
        if now >= self._second_ends:
            self._second_ends = now + 1.0
            self._count = 0
        self._count += 1
        return self._count > HANDSHAKES_PER_SECOND

    def _cookie(self, source: SocketAddress, now: float) -> bytes:
        if now >= self._secret_until:
            wipe(self._secret)
            self._secret[:] = self._entropy(KEY_SIZE)
            self._secret_until = now + COOKIE_LIFETIME
        return _mac(self._secret, str(source).encode())


class MacStamp:
    """Puts both MACs onto the handshake messages for one peer, and keeps the cookie that it demanded."""

    __slots__ = ("_cookie", "_cookie_key", "_cookie_until", "_last_mac1", "_mac1_key")

    def __init__(self, remote_public_key: bytes) -> None:
        self._mac1_key = _mac1_key(remote_public_key)
        self._cookie_key = _cookie_key(remote_public_key)
        self._cookie = bytearray(MAC_SIZE)
        self._cookie_until = float("-inf")
        self._last_mac1: bytes | None = None

    def finish(self, body: bytes, now: float) -> bytes:
        """The whole message: `body`, mac1, and mac2 (zeros without a cookie)."""
        mac1 = _mac(self._mac1_key, body)
        self._last_mac1 = mac1
        message = body + mac1
        return message + (_mac(self._cookie, message) if now < self._cookie_until else _NO_MAC)

    def handle_cookie_reply(self, reply: CookieReply, now: float) -> bool:
        """Keep the cookie for the next message. False: the reply doesn't answer the last message that we sent."""
        if self._last_mac1 is None:
            return False
        try:
            cookie = xchacha20poly1305_decrypt(reply.sealed_cookie, self._last_mac1, reply.nonce, self._cookie_key)
        except CryptoError:
            return False
        self._last_mac1 = None
        self._cookie[:] = cookie
        self._cookie_until = now + COOKIE_LIFETIME
        return True

    def wipe(self) -> None:
        wipe(self._cookie)
        self._cookie_until = float("-inf")


def _mac1_key(public_key: bytes) -> bytes:
    return hashlib.blake2s(b"mac1----" + public_key).digest()


def _cookie_key(public_key: bytes) -> bytes:
    return hashlib.blake2s(b"cookie--" + public_key).digest()


def _mac(key: bytes | bytearray, data: bytes) -> bytes:
    return hashlib.blake2s(data, digest_size=MAC_SIZE, key=key).digest()

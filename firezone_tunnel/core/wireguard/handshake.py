"""Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s as WireGuard runs it (whitepaper, section 5.4).

The functions below turn keys and messages into messages and transport keys; when to call them is `peer`'s business,
the two MACs at the end of each message are `cookie`'s.

What Python allows for secrets: those that live longer than one call stand in `bytearray`s that are overwritten when
dropped. Key objects of `cryptography` keep a copy of their own that can only be let go of, and what HMAC and X25519
return are immutable `bytes`: they are gone when the allocator reuses their memory, not before.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.errors import ProtocolError

KEY_SIZE = 32
MAC_SIZE = 16
INITIATION_SIZE = 148
RESPONSE_SIZE = 92
COOKIE_REPLY_SIZE = 64

_INITIATION_TYPE, _RESPONSE_TYPE, _COOKIE_REPLY_TYPE = 1, 2, 3

# Type (u8) and three zero bytes read as one u32; everything little-endian (whitepaper, 5.4.2, 5.4.3 and 5.4.7).
_INITIATION = struct.Struct("<II32s48s28s16s16s")  # type, sender, ephemeral, static, timestamp, mac1, mac2
_INITIATION_BODY = struct.Struct("<II32s48s28s")
_RESPONSE = struct.Struct("<III32s16s16s16s")  # type, sender, receiver, ephemeral, nothing, mac1, mac2
_RESPONSE_BODY = struct.Struct("<III32s16s")
_COOKIE_REPLY = struct.Struct("<II24s32s")  # type, receiver, nonce, cookie
_TAI64N = struct.Struct(">QI")  # TAI64 label, nanoseconds

_TAI64_EPOCH = 2**62 + 10  # 1970 in TAI64, as libtai and every WireGuard count it
_NONCE = bytes(12)


class HandshakeInitiation(NamedTuple):
    """The first message, 148 bytes (whitepaper, section 5.4.2)."""

    sender_index: int
    ephemeral: bytes
    sealed_static: bytes
    sealed_timestamp: bytes
    mac1: bytes
    mac2: bytes
    raw: bytes


class HandshakeResponse(NamedTuple):
    """The second message, 92 bytes (whitepaper, section 5.4.3)."""

    sender_index: int
    receiver_index: int
    ephemeral: bytes
    sealed_nothing: bytes
    mac1: bytes
    mac2: bytes
    raw: bytes


class CookieReply(NamedTuple):
    """The reply of a responder under load, 64 bytes (whitepaper, section 5.4.7)."""

    receiver_index: int
    nonce: bytes
    sealed_cookie: bytes


def parse(
    datagram: bytes | bytearray | memoryview,
) -> HandshakeInitiation | HandshakeResponse | CookieReply | None:
    """Read a handshake message by its type and length; None for everything else, transport data included."""
    raw = bytes(datagram) if len(datagram) in _SIZES else b""
    kind = raw[:4], len(raw)
    if kind == (b"\1\0\0\0", INITIATION_SIZE):
        return HandshakeInitiation._make((*_INITIATION.unpack(raw)[1:], raw))
    if kind == (b"\2\0\0\0", RESPONSE_SIZE):
        return HandshakeResponse._make((*_RESPONSE.unpack(raw)[1:], raw))
    if kind == (b"\3\0\0\0", COOKIE_REPLY_SIZE):
        return CookieReply._make(_COOKIE_REPLY.unpack(raw)[1:])
    return None


def cookie_reply(receiver_index: int, nonce: bytes, sealed_cookie: bytes) -> bytes:
    """Assemble the 64 bytes of a cookie reply."""
    return _COOKIE_REPLY.pack(_COOKIE_REPLY_TYPE, receiver_index, nonce, sealed_cookie)


class StaticKey:
    """Our long-lived X25519 key pair, and the clock of the handshakes begun with it.

    Peers remember the newest timestamp of a key, so the clock belongs to the key: it only ever goes forward.
    """

    __slots__ = ("_key", "_last_timestamp_ns", "private", "public")

    def __init__(self, private: bytes) -> None:
        self.private = bytearray(private)
        self._key = X25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()
        self._last_timestamp_ns = 0

    @classmethod
    def generate(cls, entropy: Entropy) -> StaticKey:
        return cls(entropy(KEY_SIZE))

    def exchange(self, public_key: bytes) -> bytes:
        """The secret shared with the owner of `public_key`.

        Raises: ProtocolError for a key that leads to an all-zero secret, which any observer can compute.
        """
        return _exchange(self._key, public_key)

    def timestamp(self, utc_now: float) -> bytes:
        """The next TAI64N label, 12 bytes: greater than every earlier one even if the wall clock was set back."""
        self._last_timestamp_ns = max(self._last_timestamp_ns + 1, int(utc_now * 1e9))
        seconds, nanoseconds = divmod(self._last_timestamp_ns, 1_000_000_000)
        return _TAI64N.pack(_TAI64_EPOCH + seconds, nanoseconds)

    def wipe(self) -> None:
        """Overwrite the private key. The pair can't be used afterwards."""
        wipe(self.private)
        del self._key

    def __repr__(self) -> str:
        return f"<StaticKey {self.public.hex()}>"


@attrs.frozen
class TransportKeys:
    """The keys that both sides share after a handshake, from one side's view."""

    send: bytes = attrs.field(repr=False)
    receive: bytes = attrs.field(repr=False)


class PendingHandshake:
    """An initiation that we sent, until its response comes or it is given up."""

    __slots__ = ("_ephemeral", "_state", "sender_index")

    def __init__(self, sender_index: int, ephemeral: X25519PrivateKey, state: _Symmetric) -> None:
        self.sender_index = sender_index
        self._ephemeral = ephemeral
        self._state = state

    def complete(
        self, local: StaticKey, preshared_key: bytes | bytearray, response: HandshakeResponse
    ) -> TransportKeys:
        """Consume the response (whitepaper, section 5.4.3). A forged one leaves the handshake as it was.

        Raises: ProtocolError.
        """
        state = self._state.copy()
        try:
            state.mix_key(response.ephemeral)
            state.mix_hash(response.ephemeral)
            state.mix_key(_exchange(self._ephemeral, response.ephemeral))
            state.mix_key(local.exchange(response.ephemeral))
            state.open(state.mix_preshared_key(preshared_key), response.sealed_nothing)
            send, receive = state.split()
        finally:
            state.wipe()
        return TransportKeys(send, receive)

    def wipe(self) -> None:
        self._state.wipe()
        del self._ephemeral

    def __repr__(self) -> str:
        return f"<PendingHandshake {self.sender_index:#010x}>"


class OpenedInitiation:
    """An authentic initiation, up to the point where the responder answers: see `open_initiation`."""

    __slots__ = ("_ephemeral", "_state", "remote_public_key", "sender_index", "timestamp")

    def __init__(self, message: HandshakeInitiation, remote_public_key: bytes, timestamp: bytes, state: _Symmetric):
        self.sender_index = message.sender_index
        self.remote_public_key = remote_public_key
        self.timestamp = timestamp
        self._ephemeral = message.ephemeral
        self._state = state

    def respond(
        self, *, preshared_key: bytes | bytearray, sender_index: int, entropy: Entropy
    ) -> tuple[bytes, TransportKeys]:
        """Make the response without its MACs, and the keys (whitepaper, 5.4.3 and 5.4.5). Can be called once.

        A key that leads to no secret does so with any other: `open_initiation` has turned it away already.
        """
        state = self._state
        try:
            ephemeral = X25519PrivateKey.from_private_bytes(entropy(KEY_SIZE))
            public = ephemeral.public_key().public_bytes_raw()
            state.mix_key(public)
            state.mix_hash(public)
            state.mix_key(_exchange(ephemeral, self._ephemeral))
            state.mix_key(_exchange(ephemeral, self.remote_public_key))
            nothing = state.seal(state.mix_preshared_key(preshared_key), b"")
            receive, send = state.split()
        finally:
            state.wipe()
        body = _RESPONSE_BODY.pack(_RESPONSE_TYPE, sender_index, self.sender_index, public, nothing)
        return body, TransportKeys(send, receive)

    def wipe(self) -> None:
        self._state.wipe()


def initiate(
    local: StaticKey,
    remote_public_key: bytes,
    static_secret: bytes | bytearray,
    *,
    sender_index: int,
    timestamp: bytes,
    entropy: Entropy,
) -> tuple[bytes, PendingHandshake]:
    """Begin a handshake (whitepaper, section 5.4.2): the initiation without its MACs, and our half of the state.

    `static_secret` is `local.exchange(remote_public_key)`, which never changes.

    Raises: ProtocolError if the remote key is worthless.
    """
    state = _Symmetric.begin(remote_public_key)
    ephemeral = X25519PrivateKey.from_private_bytes(entropy(KEY_SIZE))
    public = ephemeral.public_key().public_bytes_raw()
    state.mix_key(public)
    state.mix_hash(public)
    static = state.seal(state.mix_key(_exchange(ephemeral, remote_public_key)), local.public)
    sealed_timestamp = state.seal(state.mix_key(static_secret), timestamp)
    body = _INITIATION_BODY.pack(_INITIATION_TYPE, sender_index, public, static, sealed_timestamp)
    return body, PendingHandshake(sender_index, ephemeral, state)


def open_static(local: StaticKey, initiation: HandshakeInitiation) -> bytes:
    """Who sent this? The initiator's static public key, 32 bytes; that it is really theirs is not proven yet.

    Raises: ProtocolError if the message isn't for our key.
    """
    remote_public_key, state = _open_static(local, initiation)
    state.wipe()
    return remote_public_key


def open_initiation(
    local: StaticKey, remote_public_key: bytes, static_secret: bytes | bytearray, initiation: HandshakeInitiation
) -> OpenedInitiation:
    """Authenticate an initiation of one peer. Whether its timestamp is new is for the caller to judge.

    Raises: ProtocolError.
    """
    claimed, state = _open_static(local, initiation)
    if claimed != remote_public_key:
        state.wipe()
        raise ProtocolError("a WireGuard initiation came from another peer than the one asked")
    try:
        timestamp = state.open(state.mix_key(static_secret), initiation.sealed_timestamp)
    except ProtocolError:
        state.wipe()
        raise
    return OpenedInitiation(initiation, claimed, timestamp, state)


def wipe(secret: bytearray) -> None:
    """Overwrite a secret in place."""
    secret[:] = bytes(len(secret))


def _open_static(local: StaticKey, initiation: HandshakeInitiation) -> tuple[bytes, _Symmetric]:
    state = _Symmetric.begin(local.public)
    state.mix_key(initiation.ephemeral)
    state.mix_hash(initiation.ephemeral)
    key = state.mix_key(local.exchange(initiation.ephemeral))
    return state.open(key, initiation.sealed_static), state


class _Symmetric:
    """Noise's chaining key and transcript hash (whitepaper, section 5.4: C and H)."""

    __slots__ = ("chaining_key", "hash")

    def __init__(self, chaining_key: bytes | bytearray, transcript_hash: bytes) -> None:
        self.chaining_key = bytearray(chaining_key)
        self.hash = transcript_hash

    @classmethod
    def begin(cls, responder_public_key: bytes) -> _Symmetric:
        return cls(_INITIAL_CHAINING_KEY, _hash(_INITIAL_HASH, responder_public_key))

    def copy(self) -> _Symmetric:
        return _Symmetric(self.chaining_key, self.hash)

    def mix_hash(self, data: bytes) -> None:
        self.hash = _hash(self.hash, data)

    def mix_key(self, material: bytes | bytearray) -> bytes:
        """Advance the chaining key. Returns the key that KDF2 gives besides; KDF1 is the same without it."""
        self.chaining_key[:], key = _kdf(self.chaining_key, material, 2)
        return key

    def mix_preshared_key(self, preshared_key: bytes | bytearray) -> bytes:
        self.chaining_key[:], tau, key = _kdf(self.chaining_key, preshared_key, 3)
        self.mix_hash(tau)
        return key

    def seal(self, key: bytes, plaintext: bytes) -> bytes:
        sealed = ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, self.hash)
        self.mix_hash(sealed)
        return sealed

    def open(self, key: bytes, sealed: bytes) -> bytes:
        try:
            plaintext = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, self.hash)
        except InvalidTag:
            raise ProtocolError("a WireGuard handshake message is not authentic") from None
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> list[bytes]:
        """The initiator's sending and receiving key (whitepaper, section 5.4.5)."""
        return _kdf(self.chaining_key, b"", 2)

    def wipe(self) -> None:
        wipe(self.chaining_key)


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError("a WireGuard public key leads to no secret") from None


def _kdf(key: bytes | bytearray, material: bytes | bytearray, outputs: int) -> list[bytes]:
    """KDFn of the whitepaper's section 5.4: HKDF over HMAC-BLAKE2s (RFC 5869)."""
    extracted = hmac.digest(key, material, hashlib.blake2s)
    derived = [b""]
    for number in range(1, outputs + 1):
        derived.append(hmac.digest(extracted, derived[-1] + bytes([number]), hashlib.blake2s))
    return derived[1:]


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2s(b"".join(parts)).digest()


_SIZES = (INITIATION_SIZE, RESPONSE_SIZE, COOKIE_REPLY_SIZE)
_INITIAL_CHAINING_KEY = _hash(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s")
_INITIAL_HASH = _hash(_INITIAL_CHAINING_KEY, b"WireGuard v1 zx2c4 Jason@zx2c4.com")

from __future__ import annotations

import base64
import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_scalarmult,
    crypto_scalarmult_base,
)

from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.core.wireguard.cookie import MacStamp
from firezone_tunnel.core.wireguard.handshake import (
    CookieReply,
    HandshakeInitiation,
    HandshakeResponse,
    StaticKey,
    TransportKeys,
    initiate,
    open_initiation,
    open_static,
    parse,
)
from firezone_tunnel.errors import ProtocolError

VECTORS = sorted((Path(__file__).parents[3] / "data" / "vectors").glob("*.jsonl"))
TIMESTAMP = bytes(range(12))
PRESHARED_KEYS = [bytes(32), bytes(range(32))]
LOW_ORDER_POINTS = [bytes(32), b"\1" + bytes(31)]  # RFC 7748, section 6.1: they lead to an all-zero secret


class TestAgainstASecondDerivation:
    """A second implementation of the whitepaper's section 5.4, over libsodium instead of OpenSSL."""

    @pytest.mark.parametrize("preshared_key", PRESHARED_KEYS)
    def test_our_initiation_follows_the_whitepaper(self, preshared_key: bytes) -> None:
        local, remote = key(1), key(2)
        body, _ = begin(local, remote.public, sender_index=0x01020304)

        expected = Reference(remote.public, preshared_key)
        message = expected.initiation(bytes(local.private), stream(77)(32), 0x01020304)

        assert body == message

    @pytest.mark.parametrize("preshared_key", PRESHARED_KEYS)
    def test_our_response_follows_the_whitepaper(self, preshared_key: bytes) -> None:
        local, remote = key(1), key(2)
        reference = Reference(remote.public, preshared_key)
        initiation = parse(reference.initiation(bytes(local.private), b"\5" * 32, 7) + bytes(32))
        assert isinstance(initiation, HandshakeInitiation)

        opened = open_initiation(remote, local.public, remote.exchange(local.public), initiation)
        body, keys = opened.respond(preshared_key=preshared_key, sender_index=9, entropy=stream(3))
        to_responder, to_initiator = reference.finish_as_initiator(bytes(local.private), b"\5" * 32, body)

        assert opened.timestamp == TIMESTAMP
        assert (keys.receive, keys.send) == (to_responder, to_initiator)

    @pytest.mark.parametrize("preshared_key", PRESHARED_KEYS)
    def test_we_complete_a_handshake_that_the_reference_answers(self, preshared_key: bytes) -> None:
        local, remote = key(1), key(2)
        body, pending = begin(local, remote.public, sender_index=7)
        reference = Reference(remote.public, preshared_key)
        reference.initiation(bytes(local.private), stream(77)(32), 7)
        answer, (to_responder, to_initiator) = reference.respond(body, local.public, b"\6" * 32, 8)

        keys = pending.complete(local, preshared_key, response(answer))

        assert (keys.send, keys.receive) == (to_responder, to_initiator)

    def test_the_second_derivation_gives_published_results(self) -> None:
        # RFC 7693, appendix B; the KDF triple is common to the tests of WireGuard implementations.
        assert hashlib.blake2s(b"abc").hexdigest() == "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982"
        assert [part.hex() for part in kdf(b"test-key", b"test-input", 3)] == [
            "6f0e5ad38daba1bea8a0d213688736f19763239305e0f58aba697f9ffc41c633",
            "df1194df20802a4fe594cde27e92991c8cae66c366e8106aaa937a55fa371e8a",
            "fac6e2745a325f5dc5d11a5b165aad08b0ada28e7b4e666b7c077934a4d76c24",
        ]


class TestHandshake:
    @pytest.mark.parametrize("preshared_key", PRESHARED_KEYS)
    def test_both_sides_end_with_each_others_keys(self, preshared_key: bytes) -> None:
        ours, theirs = shake_hands(preshared_key, preshared_key)

        assert (ours.send, ours.receive) == (theirs.receive, theirs.send)
        assert ours.send != ours.receive

    def test_different_preshared_keys_are_noticed_by_the_initiator(self) -> None:
        with pytest.raises(ProtocolError):
            shake_hands(bytes(32), b"\1" * 32)

    def test_the_responder_learns_who_initiates(self) -> None:
        local, remote = key(1), key(2)

        assert open_static(remote, initiation(local, remote.public)) == local.public

    def test_an_initiation_for_another_key_is_not_opened(self) -> None:
        with pytest.raises(ProtocolError):
            open_static(key(3), initiation(key(1), key(2).public))

    def test_an_initiation_of_another_peer_is_not_accepted(self) -> None:
        stranger, remote, expected = key(1), key(2), key(3)

        with pytest.raises(ProtocolError):
            open_initiation(
                remote, expected.public, remote.exchange(expected.public), initiation(stranger, remote.public)
            )

    @given(position=st.integers(8, 115), flip=st.integers(1, 255))
    def test_no_byte_of_an_initiation_can_be_changed(self, position: int, flip: int) -> None:
        local, remote = key(1), key(2)
        raw = bytearray(initiation(local, remote.public).raw)
        raw[position] ^= flip
        message = parse(raw)
        assert isinstance(message, HandshakeInitiation)

        with pytest.raises(ProtocolError):
            open_initiation(remote, local.public, remote.exchange(local.public), message)

    def test_a_forged_response_does_not_end_the_handshake(self) -> None:
        local, remote = key(1), key(2)
        body, pending = begin(local, remote.public, sender_index=7)
        opened = open_initiation(remote, local.public, remote.exchange(local.public), parsed_initiation(body))
        answer, theirs = opened.respond(preshared_key=bytes(32), sender_index=8, entropy=stream(4))
        forged = answer[:-1] + bytes([answer[-1] ^ 1])

        with pytest.raises(ProtocolError):
            pending.complete(local, bytes(32), response(forged))

        assert pending.complete(local, bytes(32), response(answer)).send == theirs.receive

    @pytest.mark.parametrize("point", LOW_ORDER_POINTS)
    def test_keys_that_lead_to_no_secret_are_rejected(self, point: bytes) -> None:
        local, remote = key(1), key(2)
        message = initiation(local, remote.public)

        with pytest.raises(ProtocolError):
            local.exchange(point)
        with pytest.raises(ProtocolError):
            open_static(remote, message._replace(ephemeral=point))


class TestParsing:
    @given(st.binary(max_size=200))
    def test_arbitrary_bytes_are_read_or_rejected_but_never_raise(self, datagram: bytes) -> None:
        message = parse(datagram)

        assert message is None or len(datagram) in {148, 92, 64}

    @pytest.mark.parametrize(("kind", "size"), [(1, 148), (2, 92), (3, 64)])
    def test_only_the_right_length_and_reserved_zeros_are_read(self, kind: int, size: int) -> None:
        good = bytes([kind, 0, 0, 0]) + bytes(size - 4)

        assert parse(memoryview(good)) is not None
        assert parse(good + b"\0") is None
        assert parse(good[:-1]) is None
        assert parse(bytes([kind, 0, 1, 0]) + good[4:]) is None
        assert parse(b"\4" + good[1:]) is None

    def test_indices_are_little_endian(self) -> None:
        answer = parse(b"\2\0\0\0" + bytes.fromhex("0100000002000000") + bytes(80))
        reply = parse(b"\3\0\0\0" + bytes.fromhex("03000000") + bytes(56))

        assert isinstance(answer, HandshakeResponse)
        assert isinstance(reply, CookieReply)
        assert (answer.sender_index, answer.receiver_index, reply.receiver_index) == (1, 2, 3)


class TestStaticKey:
    def test_timestamps_are_tai64n(self) -> None:
        assert key(1).timestamp(1.5) == bytes.fromhex("400000000000000b1dcd6500")

    @given(st.lists(st.floats(0, 4e9), min_size=2))
    def test_timestamps_only_grow_whatever_the_wall_clock_does(self, clock: list[float]) -> None:
        local = key(1)
        stamps = [local.timestamp(utc) for utc in clock]

        assert all(earlier < later for earlier, later in pairwise(stamps))

    def test_no_representation_shows_a_secret(self) -> None:
        local, remote = key(1), key(2)
        _, pending = begin(local, remote.public, sender_index=7)
        keys = TransportKeys(b"SECRETsecretSECRETsecretSECRETse", b"secretSECRETsecretSECRETsecretSE")

        assert repr(local) == f"<StaticKey {local.public.hex()}>"
        assert "secret" not in repr(keys).lower()
        assert repr(pending) == "<PendingHandshake 0x00000007>"

    def test_a_wiped_key_is_gone(self) -> None:
        local = key(1)
        local.wipe()

        assert local.private == bytes(32)
        with pytest.raises(AttributeError):
            local.exchange(key(2).public)


class TestRecordedSessions:
    """Handshakes between upstream's programs, of both generations."""

    @pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
    def test_their_messages_parse_and_carry_a_valid_mac1(self, path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        public = {record["peer"]: public_key(record["connect"]) for record in records if "public_key=" in str(record)}
        handshakes = {"wireguard-initiation": (148, "gateway"), "wireguard-response": (92, "client")}
        seen = 0
        for record in records:
            if record.get("kind") not in handshakes:
                continue
            size, receiver = handshakes[record["kind"]]
            # Messages that were sent together were recorded in one piece: transport data may follow the message.
            message = parse(bytes.fromhex(record["data"])[:size])
            assert isinstance(message, HandshakeInitiation | HandshakeResponse)
            assert [name for name, key in public.items() if carries_mac1_for(key, message)] == [receiver]
            seen += 1

        assert seen >= 2


def carries_mac1_for(public: bytes, message: HandshakeInitiation | HandshakeResponse) -> bool:
    return MacStamp(public).finish(message.raw[:-32], 0.0)[-32:-16] == message.mac1


def public_key(url: str) -> bytes:
    return base64.b64decode(parse_qs(urlsplit(url).query)["public_key"][0])


def key(number: int) -> StaticKey:
    return StaticKey.generate(stream(number))


def stream(seed: int) -> Entropy:
    """Deterministic random bytes."""
    calls = iter(range(1_000_000))
    return lambda size: hashlib.shake_256(struct.pack("<QQ", seed, next(calls))).digest(size)


def begin(local: StaticKey, remote_public_key: bytes, *, sender_index: int) -> tuple[bytes, Any]:
    return initiate(
        local,
        remote_public_key,
        local.exchange(remote_public_key),
        sender_index=sender_index,
        timestamp=TIMESTAMP,
        entropy=stream(77),
    )


def initiation(local: StaticKey, remote_public_key: bytes) -> HandshakeInitiation:
    return parsed_initiation(begin(local, remote_public_key, sender_index=7)[0])


def parsed_initiation(body: bytes) -> HandshakeInitiation:
    message = parse(body + bytes(32))
    assert isinstance(message, HandshakeInitiation)
    return message


def response(body: bytes) -> HandshakeResponse:
    message = parse(body + bytes(32))
    assert isinstance(message, HandshakeResponse)
    return message


def shake_hands(initiators_key: bytes, responders_key: bytes) -> tuple[TransportKeys, TransportKeys]:
    local, remote = key(1), key(2)
    body, pending = begin(local, remote.public, sender_index=7)
    opened = open_initiation(remote, local.public, remote.exchange(local.public), parsed_initiation(body))
    answer, theirs = opened.respond(preshared_key=responders_key, sender_index=8, entropy=stream(4))
    return pending.complete(local, initiators_key, response(answer)), theirs


class TransportPair(NamedTuple):
    to_responder: bytes
    to_initiator: bytes


class Reference:
    """Both roles of a handshake in the whitepaper's notation, such as C and H."""

    def __init__(self, responder_public: bytes, preshared_key: bytes) -> None:
        self.responder_public = responder_public
        self.preshared_key = preshared_key
        self.c = blake2s(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s")
        self.h = blake2s(blake2s(self.c + b"WireGuard v1 zx2c4 Jason@zx2c4.com") + responder_public)

    def initiation(self, static: bytes, ephemeral: bytes, sender: int) -> bytes:
        public = crypto_scalarmult_base(ephemeral)
        (self.c,) = kdf(self.c, public, 1)
        self.h = blake2s(self.h + public)
        self.c, k = kdf(self.c, crypto_scalarmult(ephemeral, self.responder_public), 2)
        sealed_static = self._seal(k, crypto_scalarmult_base(static))
        self.c, k = kdf(self.c, crypto_scalarmult(static, self.responder_public), 2)
        return struct.pack("<II", 1, sender) + public + sealed_static + self._seal(k, TIMESTAMP)

    def respond(
        self, initiation: bytes, initiator_public: bytes, ephemeral: bytes, sender: int
    ) -> tuple[bytes, TransportPair]:
        """Continue from the state after `initiation`, which both sides share."""
        public = crypto_scalarmult_base(ephemeral)
        (self.c,) = kdf(self.c, public, 1)
        self.h = blake2s(self.h + public)
        (self.c,) = kdf(self.c, crypto_scalarmult(ephemeral, initiation[8:40]), 1)
        (self.c,) = kdf(self.c, crypto_scalarmult(ephemeral, initiator_public), 1)
        self.c, tau, k = kdf(self.c, self.preshared_key, 3)
        self.h = blake2s(self.h + tau)
        head = struct.pack("<II", 2, sender) + initiation[4:8]
        return head + public + self._seal(k, b""), TransportPair(*kdf(self.c, b"", 2))

    def finish_as_initiator(self, static: bytes, ephemeral: bytes, answer: bytes) -> TransportPair:
        public = answer[12:44]
        (self.c,) = kdf(self.c, public, 1)
        self.h = blake2s(self.h + public)
        (self.c,) = kdf(self.c, crypto_scalarmult(ephemeral, public), 1)
        (self.c,) = kdf(self.c, crypto_scalarmult(static, public), 1)
        self.c, tau, k = kdf(self.c, self.preshared_key, 3)
        self.h = blake2s(self.h + tau)
        assert crypto_aead_chacha20poly1305_ietf_decrypt(answer[44:60], self.h, bytes(12), k) == b""
        return TransportPair(*kdf(self.c, b"", 2))

    def _seal(self, k: bytes, plaintext: bytes) -> bytes:
        sealed = crypto_aead_chacha20poly1305_ietf_encrypt(plaintext, self.h, bytes(12), k)
        self.h = blake2s(self.h + sealed)
        return sealed


def kdf(secret: bytes, material: bytes, outputs: int) -> list[bytes]:
    """HKDF (RFC 5869) over HMAC (RFC 2104), both spelled out."""
    pseudorandom = hmac_blake2s(secret, material)
    parts: list[bytes] = []
    for number in range(1, outputs + 1):
        parts.append(hmac_blake2s(pseudorandom, (parts[-1] if parts else b"") + bytes([number])))
    return parts


def hmac_blake2s(secret: bytes, data: bytes) -> bytes:
    block = secret.ljust(64, b"\0")
    inner = blake2s(bytes(byte ^ 0x36 for byte in block) + data)
    return blake2s(bytes(byte ^ 0x5C for byte in block) + inner)


def blake2s(data: bytes) -> bytes:
    return hashlib.blake2s(data).digest()

"""The STUN codec, tested with RFC 5769's vectors, recorded sessions of upstream's programs, and arbitrary bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key, parse, short_term_key

_PASSWORD = "VOkJxbRl1RmTxUk/WvJxBt"
_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff80290008932ff9b1"
    "51263b36000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf"
)
_RESPONSE_IPV4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643000800142b91f599"
    "fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
)
_RESPONSE_IPV6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5"
    "bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
)
_LONG_TERM_REQUEST = bytes.fromhex(
    "000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382afe382b900000015001c662f2f3439396b39"
    "353464364f4c33346f4c394653547679363473410014000b6578616d706c652e6f72670000080014f67024656dd64a3e02b8e0712e85c9a2"
    "8ca89666"
)
_ID = bytes(range(12))
_VECTORS = sorted((Path(__file__).parents[3] / "data" / "vectors").glob("*.jsonl"))


def test_the_request_of_rfc_5769_is_read_and_verified() -> None:
    message = _parsed(_REQUEST)

    assert (message.method, message.kind) == (Method.BINDING, Kind.REQUEST)
    assert message.transaction_id.hex() == "b7e7a701bc34d686fa87dfae"
    assert message.attributes == (
        (stun.SOFTWARE, "STUN test client"),
        (stun.PRIORITY, 0x6E0001FF),
        (stun.ICE_CONTROLLED, 0x932FF9B151263B36),
        (stun.USERNAME, "evtj:h6vY"),
    )
    assert message.is_authentic(short_term_key(_PASSWORD))
    assert not message.is_authentic(short_term_key(_PASSWORD.lower()))
    assert message.is_intact()


@pytest.mark.parametrize(
    ("datagram", "address"),
    [
        (_RESPONSE_IPV4, SocketAddress("192.0.2.1", 32853)),
        (_RESPONSE_IPV6, SocketAddress("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
)
def test_the_responses_of_rfc_5769_are_read_and_verified(datagram: bytes, address: SocketAddress) -> None:
    message = _parsed(datagram)

    assert (message.method, message.kind) == (Method.BINDING, Kind.SUCCESS)
    assert message.get(stun.XOR_MAPPED_ADDRESS) == address
    assert message.is_authentic(short_term_key(_PASSWORD))
    assert message.is_intact()


def test_the_long_term_credential_request_of_rfc_5769_is_reproduced() -> None:
    message = _parsed(_LONG_TERM_REQUEST)
    key = long_term_key("マトリックス", "example.org", "TheMatrIX")

    assert message.get(stun.USERNAME) == "マトリックス"
    assert message.is_authentic(key)
    assert not message.has_fingerprint
    assert message.encode(key=key) == _LONG_TERM_REQUEST


def test_the_long_term_key_is_the_md5_of_username_realm_and_password() -> None:
    assert long_term_key("user", "firezone", "pass").hex() == "770ec2ee67cd3e39bcb050cb481dceb8"


@pytest.mark.parametrize("path", _VECTORS, ids=lambda path: path.stem)
def test_recorded_messages_are_read_verified_and_written_back_byte_for_byte(path: Path) -> None:
    session = _Session(path)
    for datagram in session.messages():
        message = _parsed(datagram)
        key = session.key_of(message)

        assert message.has_integrity == (key is not None)
        assert key is None or message.is_authentic(key)
        assert not message.has_fingerprint or message.is_intact()
        assert message.encode(key=key, fingerprint=message.has_fingerprint) == datagram
    assert session.verified > 15


@pytest.mark.parametrize(
    ("attribute", "value", "encoded"),
    [
        (stun.MAPPED_ADDRESS, SocketAddress("192.0.2.1", 32853), "00018055c0000201"),
        (stun.ERROR_CODE, stun.ErrorCode(438, "Stale Nonce"), "00000426" + b"Stale Nonce".hex()),
        (stun.UNKNOWN_ATTRIBUTES, (0x001A, 0x0018), "001a0018"),
        (stun.CHANNEL_NUMBER, 0x4000, "40000000"),
        (stun.LIFETIME, 600, "00000258"),
        (stun.XOR_PEER_ADDRESS, SocketAddress("192.0.2.1", 32853), "0001a147e112a643"),
        (stun.DATA, b"\x00payload", "007061796c6f6164"),
        (stun.REQUESTED_ADDRESS_FAMILY, stun.FAMILY_IPV6, "02000000"),
        (stun.EVEN_PORT, True, "80"),
        (stun.EVEN_PORT, False, "00"),
        (stun.REQUESTED_TRANSPORT, stun.UDP, "11000000"),
        (stun.DONT_FRAGMENT, True, ""),
        (stun.RESERVATION_TOKEN, bytes(range(8)), "0001020304050607"),
        (stun.PRIORITY, 1862270719, "6efffeff"),
        (stun.USE_CANDIDATE, True, ""),
        (stun.ADDITIONAL_ADDRESS_FAMILY, stun.FAMILY_IPV6, "02000000"),
        (stun.ICMP, stun.IcmpError(3, 4, b"\x00\x00\x05\x00"), "0000060400000500"),
        (stun.ALTERNATE_SERVER, SocketAddress("192.0.2.1", 3478), "00010d96c0000201"),
        (stun.ICE_CONTROLLING, 1, "0000000000000001"),
    ],
)
def test_an_attribute_is_written_as_its_rfc_says_and_read_back(
    attribute: stun.Attribute[Any], value: object, encoded: str
) -> None:
    message = Message(Method.ALLOCATE, Kind.SUCCESS, _ID, ((attribute, value),))

    datagram = message.encode()

    assert datagram[20:22] == attribute.number.to_bytes(2, "big")
    assert datagram[22:24] == (len(encoded) // 2).to_bytes(2, "big")
    assert datagram[24 : 24 + len(encoded) // 2].hex() == encoded
    assert parse(datagram) == message


@pytest.mark.parametrize(
    ("method", "kind", "message_type"),
    [
        (Method.BINDING, Kind.REQUEST, 0x0001),
        (Method.BINDING, Kind.SUCCESS, 0x0101),
        (Method.BINDING, Kind.ERROR, 0x0111),
        (Method.SEND, Kind.INDICATION, 0x0016),
        (Method.CHANNEL_BIND, Kind.ERROR, 0x0119),
        (0xFFF, Kind.ERROR, 0x3FFF),
        (0x5A5, Kind.INDICATION, 0x1655),
    ],
)
def test_method_and_class_share_the_message_type_bit_by_bit(method: int, kind: Kind, message_type: int) -> None:
    datagram = Message(method, kind, _ID).encode()

    assert int.from_bytes(datagram[:2], "big") == message_type
    assert parse(datagram) == Message(method, kind, _ID)


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        _REQUEST[:19],
        _REQUEST[:-4],
        _REQUEST + bytes(4),
        b"\x40" + _REQUEST[1:],
        _REQUEST[:4] + b"\x21\x12\xa4\x43" + _REQUEST[8:],
        bytes.fromhex("000100022112a442") + _ID + b"\x80\x22",
        bytes.fromhex("000100042112a442") + _ID + bytes.fromhex("80220001"),
        bytes.fromhex("000100042112a442") + _ID + bytes.fromhex("8022ffff"),
        bytes.fromhex("000100082112a442") + _ID + bytes.fromhex("00240003" + "00000000"),
        bytes.fromhex("000100082112a442") + _ID + bytes.fromhex("00200004" + "00010000"),
        bytes.fromhex("000100082112a442") + _ID + bytes.fromhex("80220004" + "ffffffff"),
        bytes.fromhex("000100082112a442") + _ID + bytes.fromhex("00080004" + "00000000"),
        bytes.fromhex("000101042112a442") + _ID + bytes.fromhex("80300000") * 65,
    ],
    ids=[
        "empty",
        "less than a header",
        "cut off",
        "with a tail",
        "channel data",
        "another cookie",
        "an odd length",
        "a value that is missing",
        "a value beyond the end",
        "a number of three bytes",
        "an address of four bytes",
        "text that is not UTF-8",
        "a short MESSAGE-INTEGRITY",
        "too many attributes",
    ],
)
def test_bytes_that_are_not_a_stun_message_are_rejected(datagram: bytes) -> None:
    assert parse(datagram) is None


def test_attributes_after_the_integrity_are_ignored() -> None:
    key = short_term_key(_PASSWORD)
    sealed = Message(Method.REFRESH, Kind.REQUEST, _ID, ((stun.LIFETIME, 600),)).encode(key=key)
    appended = sealed + bytes.fromhex("000d000400000000")
    forged = _parsed(appended[:2] + (len(appended) - 20).to_bytes(2, "big") + appended[4:])

    assert forged.get_all(stun.LIFETIME) == [600]
    assert forged.is_authentic(key)


def test_a_changed_byte_breaks_integrity_and_fingerprint() -> None:
    changed = _parsed(_REQUEST[:45] + bytes([_REQUEST[45] ^ 1]) + _REQUEST[46:])

    assert not changed.is_authentic(short_term_key(_PASSWORD))
    assert not changed.is_intact()


def test_the_first_of_equal_attributes_wins_and_all_can_be_read() -> None:
    both = (SocketAddress("192.0.2.1", 50000), SocketAddress("2001:db8::1", 50000))
    message = Message(
        Method.ALLOCATE, Kind.SUCCESS, _ID, tuple((stun.XOR_RELAYED_ADDRESS, address) for address in both)
    )

    assert _parsed(message.encode()).get(stun.XOR_RELAYED_ADDRESS) == both[0]
    assert _parsed(message.encode()).get_all(stun.XOR_RELAYED_ADDRESS) == [*both]


def test_an_unknown_attribute_keeps_its_bytes_and_place() -> None:
    datagram = bytes.fromhex("000100102112a442") + _ID + bytes.fromhex("7fff0003" + "61626300" + "8030000400000001")

    message = _parsed(datagram)

    assert [(attribute.number, value) for attribute, value in message.attributes] == [
        (0x7FFF, b"abc"),
        (0x8030, bytes.fromhex("00000001")),
    ]
    assert message.encode() == datagram


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        (stun.PRIORITY, 1 << 32),
        (stun.ERROR_CODE, stun.ErrorCode(299)),
        (stun.RESERVATION_TOKEN, b"short"),
        (stun.USERNAME, "x" * 513),
        (stun.XOR_PEER_ADDRESS, SocketAddress("192.0.2.1", 65536)),
    ],
)
def test_a_value_that_does_not_fit_is_refused(attribute: stun.Attribute[Any], value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Message(Method.BINDING, Kind.REQUEST, _ID, ((attribute, value),)).encode()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_rejected(data: bytes) -> None:
    assert isinstance(parse(data), Message | None)


@given(
    st.integers(0, 0x3FFF),
    st.lists(
        st.tuples(st.sampled_from([*stun.ATTRIBUTES, 0x0008, 0x8028, 0x7777]), st.binary(max_size=40)), max_size=6
    ),
)
def test_arbitrary_attributes_are_a_message_or_rejected(message_type: int, attributes: list[tuple[int, bytes]]) -> None:
    body = b"".join(
        number.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
        for number, value in attributes
    )
    message = parse(
        message_type.to_bytes(2, "big") + len(body).to_bytes(2, "big") + bytes.fromhex("2112a442") + _ID + body
    )

    assert isinstance(message, Message | None)
    if message is not None:
        message.is_authentic(b"key")
        message.is_intact()
        assert parse(message.encode()) == message


@given(st.binary(max_size=4), st.integers(0, len(_REQUEST)), st.integers(0, 8))
def test_a_mangled_message_is_never_authentic(patch: bytes, at: int, cut: int) -> None:
    mangled = _REQUEST[:at] + patch + _REQUEST[at + cut :]
    message = parse(mangled)

    if message is not None and mangled[: len(_REQUEST) - 8] != _REQUEST[:-8]:
        assert not message.is_authentic(short_term_key(_PASSWORD))


class _Session:
    """A recorded session: its STUN messages, and the credentials sent through its portal."""

    def __init__(self, path: Path) -> None:
        self._rows = [json.loads(line) for line in path.read_text().splitlines()]
        self._passwords: dict[str, str] = {}
        self._usernames: dict[bytes, str] = {}
        self.verified = 0
        for row in self._rows:
            self._learn(row.get("frame"))

    def messages(self) -> Iterator[bytes]:
        for row in self._rows:
            data = bytes.fromhex(row.get("data", ""))
            if row.get("kind") == "channel-data":
                data = data[4:]
            elif row.get("kind") != "stun":
                continue
            while data[4:8] == bytes.fromhex("2112a442"):  # several messages of equal size left in one system call
                end = 20 + int.from_bytes(data[2:4], "big")
                yield data[:end]
                data = data[end:]

    def key_of(self, message: Message) -> bytes | None:
        """The integrity key of a message: that of the request's receiver, for the response as well."""
        username = message.get(stun.USERNAME)
        if username is not None:
            self._usernames[message.transaction_id] = username
        username = self._usernames.get(message.transaction_id)
        if username is None:
            return None
        self.verified += 1
        if message.method == Method.BINDING:
            return short_term_key(self._passwords[username.partition(":")[0]])
        return hashlib.md5(f"{username}:firezone:{self._passwords[username]}".encode()).digest()

    def _learn(self, value: object) -> None:
        if isinstance(value, dict):
            if "username" in value and "password" in value:
                self._passwords[value["username"]] = value["password"]
            for inner in value.values():
                self._learn(inner)
        elif isinstance(value, list):
            for inner in value:
                self._learn(inner)


def _parsed(datagram: bytes) -> Message:
    message = parse(datagram)
    assert message is not None
    return message

"""STUN and TURN messages (RFC 8489 and RFC 8656; ICE attributes: RFC 8445, section 16).

A `Message` is a value. `parse` reads a message from a datagram. `Message.encode` writes its attributes in the given
order, followed by MESSAGE-INTEGRITY and FINGERPRINT if requested. Each known attribute is a typed constant of this
module, so `message.get(PRIORITY)` returns an int. The values of unknown attributes are bytes.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import struct
import zlib
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import attrs

from firezone_tunnel.core.sansio import SocketAddress

HEADER_SIZE = 20
TRANSACTION_ID_SIZE = 12
MAGIC_COOKIE = 0x2112A442  # RFC 8489, section 5
FINGERPRINT_XOR = 0x5354554E  # RFC 8489, section 14.7
MAX_ATTRIBUTES = 64  # bounds the work on one datagram; the longest real message has about ten
FIREZONE_REALM = "firezone"  # docs/protocol/data-plane.md, 0.1: upstream's clients refuse any other
UDP = 17  # REQUESTED-TRANSPORT: the protocol number of UDP
FAMILY_IPV4 = 0x01  # RFC 8489, section 14.1
FAMILY_IPV6 = 0x02

_HEADER = struct.Struct("!HHI12s")  # message type, length without the header, magic cookie, transaction id
_ATTRIBUTE = struct.Struct("!HH")  # type, length without padding
_LENGTH = struct.Struct("!H")
_COOKIE_BYTES = MAGIC_COOKIE.to_bytes(4, "big")

_MESSAGE_INTEGRITY = 0x0008
_INTEGRITY_SIZE = 20  # HMAC-SHA1
_FINGERPRINT = 0x8028
_FINGERPRINT_SIZE = 4

T = TypeVar("T")


class Method(enum.IntEnum):
    """RFC 8489, section 18.2, and RFC 8656, section 17."""

    BINDING = 0x001
    ALLOCATE = 0x003
    REFRESH = 0x004
    SEND = 0x006
    DATA = 0x007
    CREATE_PERMISSION = 0x008
    CHANNEL_BIND = 0x009


class Kind(enum.IntEnum):
    """The class of a message (RFC 8489, section 5)."""

    REQUEST = 0
    INDICATION = 1
    SUCCESS = 2
    ERROR = 3


@attrs.frozen(eq=False)
class Attribute(Generic[T]):
    """A row of the attribute table: the number and name of an attribute, and the codec for its value.

    `decode` takes the value without padding and the transaction id, which XOR addresses need. It raises ValueError.
    """

    number: int
    name: str
    encode: Callable[[T, bytes], bytes] = attrs.field(repr=False)
    decode: Callable[[bytes, bytes], T] = attrs.field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attribute) and self.number == other.number

    def __hash__(self) -> int:
        return self.number


@attrs.frozen
class Message:
    """One STUN message. `attributes` are (attribute, value) in wire order, without MESSAGE-INTEGRITY and FINGERPRINT.

    `method` is a plain int for an unknown method. A parsed message also keeps its bytes, which `is_authentic` needs.
    Messages with the same content are equal, regardless of integrity and fingerprint.
    """

    method: int
    kind: Kind
    transaction_id: bytes
    attributes: tuple[tuple[Attribute[Any], Any], ...] = ()
    raw: bytes = attrs.field(default=b"", eq=False, repr=False)
    _integrity_at: int = attrs.field(default=0, eq=False, repr=False)
    _fingerprint_at: int = attrs.field(default=0, eq=False, repr=False)

    def get(self, attribute: Attribute[T]) -> T | None:
        """The value of the first occurrence of an attribute, or None."""
        for present, value in self.attributes:
            if present.number == attribute.number:
                return value  # type: ignore[no-any-return]  # the same number is the same attribute: a T
        return None

    def get_all(self, attribute: Attribute[T]) -> list[T]:
        """All values of an attribute that may repeat, such as XOR-RELAYED-ADDRESS of a dual-stack allocation."""
        return [value for present, value in self.attributes if present.number == attribute.number]

    @property
    def has_integrity(self) -> bool:
        """Whether a parsed message has a MESSAGE-INTEGRITY, valid or not."""
        return self._integrity_at > 0

    @property
    def has_fingerprint(self) -> bool:
        """Whether a parsed message ends with a FINGERPRINT, valid or not."""
        return self._fingerprint_at > 0

    def is_authentic(self, key: bytes) -> bool:
        """Whether a parsed message has a MESSAGE-INTEGRITY that is valid for `key` (RFC 8489, section 14.5)."""
        if not self.has_integrity:
            return False
        value_at = self._integrity_at + _ATTRIBUTE.size
        expected = _integrity(key, self.raw[: self._integrity_at])
        return hmac.compare_digest(expected, self.raw[value_at : value_at + _INTEGRITY_SIZE])

    def is_intact(self) -> bool:
        """Whether a parsed message has a valid FINGERPRINT (RFC 8489, section 14.7)."""
        return self.has_fingerprint and self.raw[-_FINGERPRINT_SIZE:] == _fingerprint(self.raw[: self._fingerprint_at])

    def encode(self, *, key: bytes | None = None, fingerprint: bool = False) -> bytes:
        """The datagram. With a `key` (`short_term_key` or `long_term_key`), MESSAGE-INTEGRITY follows the attributes.

        Raises: ValueError for a value that its attribute can't hold.
        """
        parts = [
            _padded(attribute.number, attribute.encode(value, self.transaction_id))
            for attribute, value in self.attributes
        ]
        body = b"".join(parts)
        data = _HEADER.pack(_message_type(self.method, self.kind), len(body), MAGIC_COOKIE, self.transaction_id) + body
        if key is not None:
            data = _lengthened(data, 4 + _INTEGRITY_SIZE) + _padded(_MESSAGE_INTEGRITY, _integrity(key, data))
        if fingerprint:
            data = _lengthened(data, 4 + _FINGERPRINT_SIZE) + _padded(_FINGERPRINT, _fingerprint(data))
        return data


def parse(data: bytes | bytearray | memoryview) -> Message | None:
    """Parse a datagram as one STUN message (RFC 8489, section 5). Returns None for anything else; never raises.

    The length field must equal the length of the rest of the datagram and be a multiple of 4. Attributes after
    MESSAGE-INTEGRITY are not protected and therefore ignored, except for a FINGERPRINT at the very end. Neither of the
    two is verified here.
    """
    if len(data) < HEADER_SIZE or data[0] & 0xC0:
        return None
    raw = bytes(data)
    message_type, length, cookie, transaction_id = _HEADER.unpack_from(raw)
    if cookie != MAGIC_COOKIE or length % 4 or length != len(raw) - HEADER_SIZE:
        return None
    layout = _layout(raw)
    if layout is None:
        return None
    attributes = []
    for number, start, end in layout.values:
        attribute = ATTRIBUTES.get(number) or Attribute(number, f"0x{number:04X}", _encode_bytes, _decode_bytes)
        try:
            attributes.append((attribute, attribute.decode(raw[start:end], transaction_id)))
        except ValueError:
            return None
    method, kind = _method_and_kind(message_type)
    return Message(
        method, kind, transaction_id, tuple(attributes), raw, layout.integrity_at or 0, layout.fingerprint_at or 0
    )


def short_term_key(password: str) -> bytes:
    """The MESSAGE-INTEGRITY key of ICE (RFC 8489, section 9.1.1). OpaqueString does not change ASCII passwords."""
    return password.encode()


def long_term_key(username: str, realm: str, password: str) -> bytes:
    """The MESSAGE-INTEGRITY key of TURN (RFC 8489, section 9.2.2)."""
    return hashlib.md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


class _Layout(NamedTuple):
    values: list[tuple[int, int, int]]
    """The attribute number, start and end of each value before MESSAGE-INTEGRITY."""
    integrity_at: int | None
    fingerprint_at: int | None


def _layout(raw: bytes) -> _Layout | None:
    """Locate the attributes of a message. Returns None if an attribute exceeds the message."""
    values: list[tuple[int, int, int]] = []
    integrity_at = None
    position, end = HEADER_SIZE, len(raw)
    for _ in range(MAX_ATTRIBUTES):
        if position == end:
            return _Layout(values, integrity_at, None)
        number, length = _ATTRIBUTE.unpack_from(raw, position)  # position and end are multiples of 4
        start = position + _ATTRIBUTE.size
        after = start + length + -length % 4
        if after > end:
            return None
        if number == _FINGERPRINT:
            # FINGERPRINT must be the last attribute; otherwise the message is malformed.
            return _Layout(values, integrity_at, position) if after == end and length == _FINGERPRINT_SIZE else None
        if integrity_at is None:
            if number == _MESSAGE_INTEGRITY:
                if length != _INTEGRITY_SIZE:
                    return None
                integrity_at = position
            else:
                values.append((number, start, start + length))
        position = after
    return _Layout(values, integrity_at, None) if position == end else None


def _message_type(method: int, kind: int) -> int:
    """Interleave the 12 bits of the method with the 2 of the class (RFC 8489, section 5, figure 3)."""
    return (method & 0xF80) << 2 | (method & 0x070) << 1 | method & 0x00F | (kind & 2) << 7 | (kind & 1) << 4


def _method_and_kind(message_type: int) -> tuple[int, Kind]:
    method = (message_type >> 2 & 0xF80) | (message_type >> 1 & 0x070) | message_type & 0x00F
    return method, Kind(message_type >> 7 & 2 | message_type >> 4 & 1)


def _padded(number: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(number, len(value)) + value + bytes(-len(value) % 4)


def _lengthened(data: bytes, more: int) -> bytes:
    """The message with its length field increased by `more` bytes that are still to be appended."""
    return data[:2] + _LENGTH.pack(len(data) - HEADER_SIZE + more) + data[4:]


def _integrity(key: bytes, before: bytes) -> bytes:
    """HMAC-SHA1 over everything before the attribute, with a length field that includes the attribute."""
    return hmac.digest(key, _lengthened(before, 4 + _INTEGRITY_SIZE), "sha1")


def _fingerprint(before: bytes) -> bytes:
    checksum = zlib.crc32(_lengthened(before, 4 + _FINGERPRINT_SIZE))
    return (checksum ^ FINGERPRINT_XOR).to_bytes(_FINGERPRINT_SIZE, "big")


class ErrorCode(NamedTuple):
    """ERROR-CODE (RFC 8489, section 14.8): 300 to 699, and a human-readable reason."""

    code: int
    reason: str = ""


class AddressError(NamedTuple):
    """ADDRESS-ERROR-CODE (RFC 8656, section 18.12): why an allocation lacks an address of a family."""

    family: int
    code: int
    reason: str = ""


class IcmpError(NamedTuple):
    """ICMP (RFC 8656, section 18.13): an ICMP error that a relay received for a datagram it sent to a peer."""

    type: int
    code: int
    data: bytes = bytes(4)


_Codec = tuple[Callable[[T, bytes], bytes], Callable[[bytes, bytes], T]]


def _encode_bytes(value: bytes, _transaction_id: bytes) -> bytes:
    return value


def _decode_bytes(value: bytes, _transaction_id: bytes) -> bytes:
    return value


def _exactly(size: int) -> _Codec[bytes]:
    def check(value: bytes, _transaction_id: bytes) -> bytes:
        if len(value) != size:
            raise ValueError(f"{len(value)} bytes instead of {size}")
        return value

    return check, check


def _text(max_bytes: int) -> _Codec[str]:
    def encode(value: str, _transaction_id: bytes) -> bytes:
        return _at_most(value.encode(), max_bytes)

    def decode(value: bytes, _transaction_id: bytes) -> str:
        return _at_most(value, max_bytes).decode()  # UnicodeDecodeError is a ValueError

    return encode, decode


def _at_most(value: bytes, max_bytes: int) -> bytes:
    if len(value) > max_bytes:
        raise ValueError(f"{len(value)} bytes, at most {max_bytes} fit")
    return value


def _number(layout: str) -> _Codec[int]:
    """An unsigned number, optionally followed by reserved bytes, which are sent as zero and ignored on receipt."""
    form = struct.Struct(layout)

    def encode(value: int, _transaction_id: bytes) -> bytes:
        try:
            return form.pack(value)
        except struct.error as error:
            raise ValueError(str(error)) from error

    def decode(value: bytes, _transaction_id: bytes) -> int:
        if len(value) != form.size:
            raise ValueError(f"{len(value)} bytes instead of {form.size}")
        number: int = form.unpack(value)[0]
        return number

    return encode, decode


def _encode_flag(_value: bool, _transaction_id: bytes) -> bytes:
    return b""


def _decode_flag(value: bytes, _transaction_id: bytes) -> bool:
    if value:
        raise ValueError("a flag must not have a value")
    return True


def _encode_address(address: SocketAddress, _transaction_id: bytes) -> bytes:
    """A zero byte, family, port, address (RFC 8489, section 14.1)."""
    packed = ipaddress.ip_address(address.host).packed
    if not 0 <= address.port <= 0xFFFF:
        raise ValueError(f"port out of range: {address}")
    family = FAMILY_IPV4 if len(packed) == 4 else FAMILY_IPV6
    return bytes((0, family)) + address.port.to_bytes(2, "big") + packed


def _decode_address(value: bytes, _transaction_id: bytes) -> SocketAddress:
    if len(value) == 8 and value[1] == FAMILY_IPV4:
        host = f"{value[4]}.{value[5]}.{value[6]}.{value[7]}"
    elif len(value) == 20 and value[1] == FAMILY_IPV6:
        host = str(ipaddress.IPv6Address(value[4:]))
    else:
        raise ValueError("not an address")
    return SocketAddress(host, int.from_bytes(value[2:4], "big"))


def _xored(value: bytes, transaction_id: bytes) -> bytes:
    """XOR port and address with the cookie, and IPv6 also with the transaction id (RFC 8489, section 14.2)."""
    mask = (bytes(2) + _COOKIE_BYTES[:2] + _COOKIE_BYTES + transaction_id)[: len(value)]
    return (int.from_bytes(value, "big") ^ int.from_bytes(mask, "big")).to_bytes(len(value), "big")


def _encode_xor_address(address: SocketAddress, transaction_id: bytes) -> bytes:
    return _xored(_encode_address(address, transaction_id), transaction_id)


def _decode_xor_address(value: bytes, transaction_id: bytes) -> SocketAddress:
    if len(value) not in {8, 20}:
        raise ValueError("not an address")
    return _decode_address(_xored(value, transaction_id), transaction_id)


def _encode_error_code(error: ErrorCode, _transaction_id: bytes) -> bytes:
    hundreds, rest = divmod(error.code, 100)
    if not 3 <= hundreds <= 6:
        raise ValueError(f"{error.code} is not a valid error code")
    return bytes((0, 0, hundreds, rest)) + _at_most(error.reason.encode(), _MAX_TEXT)


def _decode_error_code(value: bytes, _transaction_id: bytes) -> ErrorCode:
    if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
        raise ValueError("not an error code")
    return ErrorCode((value[2] & 7) * 100 + value[3], _at_most(value[4:], _MAX_TEXT).decode())


def _encode_address_error(error: AddressError, transaction_id: bytes) -> bytes:
    """Same as ERROR-CODE, with the family in the first of the reserved bytes."""
    return bytes((error.family,)) + _encode_error_code(ErrorCode(error.code, error.reason), transaction_id)[1:]


def _decode_address_error(value: bytes, transaction_id: bytes) -> AddressError:
    return AddressError(value[0] if value else 0, *_decode_error_code(value, transaction_id))


def _encode_numbers(numbers: tuple[int, ...], _transaction_id: bytes) -> bytes:
    return b"".join(number.to_bytes(2, "big") for number in numbers)


def _decode_numbers(value: bytes, _transaction_id: bytes) -> tuple[int, ...]:
    if len(value) % 2:
        raise ValueError("the list of attribute numbers has an odd length")
    return tuple(int.from_bytes(value[at : at + 2], "big") for at in range(0, len(value), 2))


def _encode_even_port(reserve_next: bool, _transaction_id: bytes) -> bytes:
    return b"\x80" if reserve_next else b"\x00"


def _decode_even_port(value: bytes, _transaction_id: bytes) -> bool:
    if len(value) != 1:
        raise ValueError("not an EVEN-PORT")
    return bool(value[0] & 0x80)


def _encode_icmp(error: IcmpError, _transaction_id: bytes) -> bytes:
    """Two reserved bytes, 7 bits of type and 9 of code, four bytes of data."""
    return bytes(2) + ((error.type & 0x7F) << 9 | error.code & 0x1FF).to_bytes(2, "big") + error.data


def _decode_icmp(value: bytes, _transaction_id: bytes) -> IcmpError:
    if len(value) != 8:
        raise ValueError("not an ICMP attribute")
    both = int.from_bytes(value[2:4], "big")
    return IcmpError(both >> 9, both & 0x1FF, value[4:])


_MAX_TEXT = 763  # RFC 8489, sections 14.8 to 14.14: fewer than 128 characters of up to 6 bytes
_FLAG = (_encode_flag, _decode_flag)
_ADDRESS = (_encode_address, _decode_address)
_XOR_ADDRESS = (_encode_xor_address, _decode_xor_address)

# Comprehension-required: a receiver that doesn't know such an attribute must reject the request.
MAPPED_ADDRESS = Attribute(0x0001, "MAPPED-ADDRESS", *_ADDRESS)
USERNAME = Attribute(0x0006, "USERNAME", *_text(512))  # RFC 5389, section 15.3, allows more than RFC 8489 (508)
ERROR_CODE = Attribute(0x0009, "ERROR-CODE", _encode_error_code, _decode_error_code)
UNKNOWN_ATTRIBUTES = Attribute(0x000A, "UNKNOWN-ATTRIBUTES", _encode_numbers, _decode_numbers)
CHANNEL_NUMBER = Attribute(0x000C, "CHANNEL-NUMBER", *_number("!Hxx"))
LIFETIME = Attribute(0x000D, "LIFETIME", *_number("!I"))
"""Seconds."""
XOR_PEER_ADDRESS = Attribute(0x0012, "XOR-PEER-ADDRESS", *_XOR_ADDRESS)
DATA = Attribute(0x0013, "DATA", _encode_bytes, _decode_bytes)
REALM = Attribute(0x0014, "REALM", *_text(_MAX_TEXT))
NONCE = Attribute(0x0015, "NONCE", *_text(_MAX_TEXT))
XOR_RELAYED_ADDRESS = Attribute(0x0016, "XOR-RELAYED-ADDRESS", *_XOR_ADDRESS)
REQUESTED_ADDRESS_FAMILY = Attribute(0x0017, "REQUESTED-ADDRESS-FAMILY", *_number("!Bxxx"))
EVEN_PORT = Attribute(0x0018, "EVEN-PORT", _encode_even_port, _decode_even_port)
"""True: reserve the next port as well."""
REQUESTED_TRANSPORT = Attribute(0x0019, "REQUESTED-TRANSPORT", *_number("!Bxxx"))
DONT_FRAGMENT = Attribute(0x001A, "DONT-FRAGMENT", *_FLAG)
XOR_MAPPED_ADDRESS = Attribute(0x0020, "XOR-MAPPED-ADDRESS", *_XOR_ADDRESS)
RESERVATION_TOKEN = Attribute(0x0022, "RESERVATION-TOKEN", *_exactly(8))
PRIORITY = Attribute(0x0024, "PRIORITY", *_number("!I"))
USE_CANDIDATE = Attribute(0x0025, "USE-CANDIDATE", *_FLAG)
# Comprehension-optional.
ADDITIONAL_ADDRESS_FAMILY = Attribute(0x8000, "ADDITIONAL-ADDRESS-FAMILY", *_number("!Bxxx"))
ADDRESS_ERROR_CODE = Attribute(0x8001, "ADDRESS-ERROR-CODE", _encode_address_error, _decode_address_error)
ICMP = Attribute(0x8004, "ICMP", _encode_icmp, _decode_icmp)
SOFTWARE = Attribute(0x8022, "SOFTWARE", *_text(_MAX_TEXT))
ALTERNATE_SERVER = Attribute(0x8023, "ALTERNATE-SERVER", *_ADDRESS)
COTURN_ADDITIONAL_ADDRESS_FAMILY = Attribute(0x8032, "ADDITIONAL-ADDRESS-FAMILY (coturn)", *_number("!Bxxx"))
"""coturn's clients use this number instead of 0x8000, at least up to version 4.6. IANA has not assigned it."""
ICE_CONTROLLED = Attribute(0x8029, "ICE-CONTROLLED", *_number("!Q"))
"""The tie-breaker."""
ICE_CONTROLLING = Attribute(0x802A, "ICE-CONTROLLING", *_number("!Q"))

ATTRIBUTES: dict[int, Attribute[Any]] = {
    attribute.number: attribute for attribute in tuple(globals().values()) if isinstance(attribute, Attribute)
}
"""All known attributes by number."""

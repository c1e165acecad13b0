"""Control packets in the tunnel: the vector of docs/protocol/data-plane.md, 12.2, round trips, arbitrary bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from firezone_tunnel.core.tunnel.control import AssignedIps, DomainStatus, Event, Goodbye, decode, encode, is_control
from tests.unit.core.packet.packets import IP, IPv6, built, udp

_VECTOR = bytes.fromhex(
    "6000000000 64ff00"
    "00000000000000000000000000000000"
    "00000000000000000000000000000000"
    "0100000000000000"
    "7b227265736f75726365223a2230303030303030302d303030302d303030302d303030302d303030303030303030303635222c"
    "22646f6d61696e223a226578616d706c652e636f6d222c22737461747573223a22416374697665227d"
)
_ID = "00000000-0000-0000-0000-000000000065"
_STATUS = DomainStatus(_ID, "example.com", active=True)
_PROXIES = tuple([f"100.96.0.{n}" for n in range(1, 5)] + [f"fd00:2021:1111:8000::{n}" for n in range(4)])


def test_a_domain_status_is_encoded_as_upstream_encodes_it() -> None:
    assert encode(_STATUS) == _VECTOR
    assert len(_VECTOR) == 140


def test_the_vector_is_recognized_and_decoded() -> None:
    packet = _packet(_VECTOR)

    assert is_control(packet)
    assert decode(packet) == _STATUS


@given(
    st.one_of(
        st.builds(AssignedIps, st.text(max_size=36), st.text(max_size=40), st.lists(st.text(max_size=20)).map(tuple)),
        st.builds(DomainStatus, st.text(max_size=36), st.text(max_size=40), active=st.booleans()),
        st.just(Goodbye()),
    )
)
def test_an_encoded_event_is_decoded_again(event: Event) -> None:
    packet = parse(bytearray(encode(event)))
    if packet is None:  # longer than a packet may be
        assert len(encode(event)) > 1280
        return

    assert is_control(packet)
    assert decode(packet) == event


def test_the_longest_name_with_8_addresses_fits_into_one_packet() -> None:
    event = AssignedIps(_ID, "a" * 255, _PROXIES)

    assert decode(_packet(encode(event))) == event


def test_field_order_and_unknown_fields_do_not_matter() -> None:
    body = b'{"status":"Active","future":[1],"domain":"example.com","resource":"%s"}' % _ID.encode()

    assert decode(_control(1, body)) == _STATUS


@pytest.mark.parametrize("status", ["Inactive", "active", "", "Whatever"])
def test_any_status_but_active_means_inactive(status: str) -> None:
    body = f'{{"resource":"{_ID}","domain":"example.com","status":"{status}"}}'.encode()

    assert decode(_control(1, body)) == DomainStatus(_ID, "example.com", active=False)


def test_reserved_bytes_are_ignored() -> None:
    changed = bytearray(_VECTOR)
    changed[41:48] = b"\xff" * 7

    assert decode(_packet(changed)) == _STATUS


def test_the_payload_of_a_goodbye_is_ignored() -> None:
    assert decode(_control(2, b"")) == decode(_control(2, b'{"reason":"roamed"}')) == Goodbye()


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (0, b""),
        (0, b"{}"),
        (0, b'{"resource":"r","domain":"d","proxy_ips":"100.96.0.1"}'),
        (1, b'{"resource":"r","domain":"d"}'),
        (1, b'{"resource":"r","domain":"d","status":1}'),
        (1, b'{"resource":"r","domain":"d","status":"\xff"}'),
        (1, b"[" * 1000),
        (3, b"{}"),
        (255, b""),
    ],
)
def test_unknown_and_malformed_events_are_none_but_still_control_packets(code: int, body: bytes) -> None:
    packet = _control(code, body)

    assert is_control(packet)
    assert decode(packet) is None


def test_a_payload_too_short_for_the_header_is_not_an_event() -> None:
    for length in range(8):
        raw = bytearray(_VECTOR[: 40 + length])
        raw[4:6] = length.to_bytes(2, "big")
        packet = _packet(raw)

        assert is_control(packet)
        assert decode(packet) is None


def test_ordinary_packets_are_not_control_packets() -> None:
    from_somebody = bytearray(_VECTOR)
    from_somebody[23] = 1
    to_somebody = bytearray(_VECTOR)
    to_somebody[39] = 1
    for raw in (
        from_somebody,
        to_somebody,
        built(IP(src="0.0.0.0", dst="0.0.0.0", proto=255), b"\1" + bytes(7)),
        built(IPv6(src="::", dst="::"), udp(), b"x"),
    ):
        assert not is_control(_packet(raw))


@given(st.integers(0, 255), st.binary(max_size=300))
def test_any_bytes_are_an_event_or_none(code: int, body: bytes) -> None:
    event = decode(_control(code, body))

    assert event is None or decode(_packet(encode(event))) == event


def _packet(raw: bytes | bytearray) -> SuperPacket:
    packet = parse(bytearray(raw))
    assert packet is not None
    return packet


def _control(code: int, body: bytes) -> SuperPacket:
    payload = bytes((code,)) + bytes(7) + body
    return _packet(b"\x60\0\0\0" + len(payload).to_bytes(2, "big") + b"\xff\0" + bytes(32) + payload)

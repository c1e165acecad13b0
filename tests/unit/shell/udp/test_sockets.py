"""Control messages: a sent message is parsed to the same values."""

from __future__ import annotations

import socket

import pytest

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.udp.sockets import bind, received, sending


def test_a_plain_datagram_needs_no_control_message() -> None:
    assert sending(is_ipv6=False, source=None, segment_size=0, ecn=0) == []


@pytest.mark.parametrize(("is_ipv6", "source"), [(False, "192.0.2.7"), (True, "2001:db8::7")])
def test_the_source_address_is_sent_as_packet_information(is_ipv6: bool, source: str) -> None:
    [(level, kind, data)] = sending(is_ipv6=is_ipv6, source=source, segment_size=0, ecn=0)

    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    assert (level, kind) == ((41, 50) if is_ipv6 else (0, 8))  # IPV6_PKTINFO, IP_PKTINFO
    assert socket.inet_pton(family, source) == (data[:16] if is_ipv6 else data[4:8])


def test_segment_size_and_ecn_are_sent_in_native_order() -> None:
    assert sending(is_ipv6=False, source=None, segment_size=0x0123, ecn=2) == [
        (17, 103, b"\x23\x01"),
        (0, 1, b"\x02\0\0\0"),
    ]


@pytest.mark.parametrize(
    ("messages", "host", "segment_size", "ecn"),
    [
        ([(0, 8, b"\x02\0\0\0\xc0\0\x02\x01\xc0\0\x02\x01"), (0, 1, b"\x03")], "192.0.2.1", 0, 3),
        ([(41, 50, b"\x20\x01\x0d\xb8" + bytes(11) + b"\x07\x02\0\0\0"), (41, 67, b"\x01\0\0\0")], "2001:db8::7", 0, 1),
        ([(17, 104, b"\x20\x05\0\0")], None, 1312, 0),
        ([], None, 0, 0),
    ],
)
def test_the_control_messages_of_a_batch_are_parsed(
    messages: list[tuple[int, int, bytes]], host: str | None, segment_size: int, ecn: int
) -> None:
    arrival = received(messages)

    assert (arrival.host, arrival.segment_size, arrival.ecn, arrival.overflows) == (host, segment_size, ecn, None)


def test_the_first_free_port_is_taken() -> None:
    taken = bind("127.0.0.1", [0], mark=None)
    port = taken.getsockname()[1]

    other = bind("127.0.0.1", [port, 0], mark=None)

    assert other.getsockname()[1] not in {0, port}
    taken.close()
    other.close()


def test_a_port_that_must_be_had_and_is_taken_is_named() -> None:
    taken = bind("127.0.0.1", [0], mark=None)
    port = taken.getsockname()[1]

    with pytest.raises(PlatformError, match=f"127.0.0.1:{port}.*in use"):
        bind("127.0.0.1", [port], mark=None)
    taken.close()


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(PlatformError, match=r"\[2001:db8::1\]"):
        bind("2001:db8::1", [0], mark=None)

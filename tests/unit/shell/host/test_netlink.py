"""Netlink's framing, and the changes that its notifications report."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.shell.host.netlink import attributes, encode_attribute, encode_message, messages
from firezone_tunnel.shell.host.parts import Aspect
from firezone_tunnel.shell.host.tables import USER_TABLE
from firezone_tunnel.shell.host.watcher import nftables_change, routing_change

OWN_LINK, OTHER_LINK = 7, 3
NEWLINK, NEWADDR, NEWROUTE, NEWRULE, NETCONF = 16, 20, 24, 32, 80
NEWGEN, NEWTABLE = 10 << 8 | 15, 10 << 8
RTA_TABLE = 15
IPV4, IPV6 = 2, 10

_words = st.binary(max_size=64).map(lambda data: data[: len(data) // 4 * 4])


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), _words)))
def test_messages_are_read_as_they_were_written(written: list[tuple[int, int, int, bytes]]) -> None:
    data = memoryview(b"".join(encode_message(*one) for one in written))

    assert [(kind, flags, number, bytes(body)) for kind, flags, number, _, body in messages(data)] == written


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), _words)))
def test_attributes_are_read_as_they_were_written(written: list[tuple[int, bytes]]) -> None:
    data = memoryview(b"".join(encode_attribute(*one) for one in written))

    assert [(kind, bytes(value)) for kind, value in attributes(data)] == written


@given(st.sampled_from([NEWLINK, NEWADDR, NEWROUTE, NEWRULE, NETCONF, NEWGEN, 0]), st.binary(max_size=80))
def test_no_notification_is_too_short_or_too_strange(kind: int, body: bytes) -> None:
    header = struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0)

    for message in messages(memoryview(header + body)):
        routing_change(message, own_index=OWN_LINK, own_ports=())
        nftables_change(message)


@given(st.binary(max_size=200))
def test_reading_what_is_not_netlink_ends(data: bytes) -> None:
    list(messages(memoryview(data)))
    list(attributes(memoryview(data)))


def link(index: int) -> bytes:
    return struct.pack("=BxHiII", 0, 1, index, 0, 0)


def route(length: int, *, family: int = IPV4, table: int = 254) -> bytes:
    number = encode_attribute(RTA_TABLE, struct.pack("=I", table))
    return struct.pack("=BBBBBBBBI", family, length, 0, 0, min(table, 252), 4, 0, 1, 0) + number


@pytest.mark.parametrize(
    ("kind", "body", "aspect"),
    [
        (NEWLINK, link(OWN_LINK), Aspect.LINK),
        (NEWLINK, link(OTHER_LINK), Aspect.UPLINKS),
        (NEWADDR, link(OWN_LINK), Aspect.LINK),
        (NEWADDR, link(OTHER_LINK), Aspect.UPLINKS),
        (NEWRULE, b"", Aspect.RULES | Aspect.UPLINKS),
        (NETCONF, b"", Aspect.SETTINGS),
        (NEWROUTE, route(0), Aspect.UPLINKS),
        (NEWROUTE, route(1), Aspect.UPLINKS),
        (NEWROUTE, route(3, family=IPV6), Aspect.UPLINKS),
        (NEWROUTE, route(24), Aspect(0)),
        (NEWROUTE, route(48, family=IPV6), Aspect(0)),
        (NEWROUTE, route(24, table=USER_TABLE.number), Aspect.ROUTES),
        (NEWROUTE, route(24, table=0x77777777), Aspect(0)),
        (NEWROUTE, b"", Aspect(0)),
        (99, b"", Aspect(0)),
    ],
)
def test_a_notification_names_the_aspect_that_has_changed(kind: int, body: bytes, aspect: Aspect) -> None:
    (message,) = messages(memoryview(encode_message(kind, 0, 0, body)))

    assert routing_change(message, own_index=OWN_LINK, own_ports=()).aspect == aspect


def test_a_change_of_ours_is_none() -> None:
    header = struct.pack("=IHHII", 16, NEWRULE, 0, 0, 4321)
    (message,) = messages(memoryview(header))

    assert routing_change(message, own_index=OWN_LINK, own_ports=(4321,)).aspect == Aspect(0)


def test_the_end_of_a_transaction_names_the_program() -> None:
    body = struct.pack("=BBH", 0, 0, 0) + encode_attribute(1, bytes(4)) + encode_attribute(3, b"firewalld\0\0\0")
    (message,) = messages(memoryview(encode_message(NEWGEN, 0, 0, body)))

    assert nftables_change(message) == (Aspect.NFTABLES, "firewalld")

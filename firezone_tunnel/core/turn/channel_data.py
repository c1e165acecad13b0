"""TURN channel data: four bytes in front of each payload (RFC 8656, section 12.4).

Sources: docs/protocol/data-plane.md, 3.7; docs/protocol/gateway-and-relay.md, 8.6.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from firezone_tunnel.core.packet.layout import Rows, column

HEADER = struct.Struct(">HH")  # channel number, length of the data
HEADER_SIZE = HEADER.size
FIRST_CHANNEL = 0x4000
LAST_CHANNEL = 0x4FFF
LAST_PARSED_CHANNEL = 0x7FFF  # RFC 5766, section 11, allowed more than RFC 8656


class ChannelData(NamedTuple):
    """Payloads that came on one channel."""

    number: int
    payloads: Rows


def parse_channel_data(datagrams: Rows, index: int = 0, *, exact: bool) -> ChannelData | None:
    """Read one datagram as channel data. Returns None for anything else; never raises.

    A relay accepts padding behind the data (RFC 8656, section 12.5). With `exact` the length field must count the
    rest of the datagram, as clients and gateways require of their relay.
    """
    size = datagrams.size_of(index)
    if size < HEADER_SIZE:
        return None
    start = datagrams.offset + index * datagrams.stride
    number, length = HEADER.unpack_from(datagrams.memory, start)
    if not FIRST_CHANNEL <= number <= LAST_PARSED_CHANNEL or length > size - HEADER_SIZE:
        return None
    if exact and length != size - HEADER_SIZE:
        return None
    return ChannelData(number, Rows(datagrams.memory, start + HEADER_SIZE, size, length, 1, length))


def common_channel_data(datagrams: Rows, *, exact: bool) -> ChannelData | None:
    """The payloads, if all datagrams are channel data of one channel and one length, the last one perhaps shorter.

    None also for several without payload: segmentation can't express that.
    """
    memory, offset, stride, _, count, _ = datagrams
    last = parse_channel_data(datagrams, count - 1, exact=exact)
    if last is None or count == 1:
        return last
    first = parse_channel_data(datagrams, 0, exact=exact)
    if first is None or first.number != last.number or not 0 < last.payloads.size <= first.payloads.size:
        return None
    headers = column(memory, "<u4", offset, stride, count - 1).tobytes()
    if headers != headers[:HEADER_SIZE] * (count - 1):  # faster than NumPy for so few
        return None
    size = first.payloads.size
    return ChannelData(first.number, Rows(memory, offset + HEADER_SIZE, stride, size, count, last.payloads.size))


def encode_channel_data(channel: int, payload: bytes | memoryview) -> bytes:
    """The datagram that carries a payload over a channel."""
    return HEADER.pack(channel, len(payload)) + payload


def write_headers(memory: bytearray | memoryview, channel: int, stride: int, count: int, length: int) -> None:
    """Write the headers of `count` datagrams that lie in a row, `stride` bytes apart, `length` bytes in all.

    The bytes after each header are its payload.
    """
    column(memory, ">u4", 0, stride, count)[:] = channel << 16 | stride - HEADER_SIZE
    last = (count - 1) * stride
    HEADER.pack_into(memory, last, channel, length - last - HEADER_SIZE)

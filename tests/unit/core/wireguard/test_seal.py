from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.datagrams import receive_buffer, send_limit
from firezone_tunnel.core.packet.coalesce import Arena, coalesce
from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from firezone_tunnel.core.wireguard.open import Opened, Opener, open_lone, receiver_of
from firezone_tunnel.core.wireguard.seal import SealBuffer, plan, seal_pool
from firezone_tunnel.core.wireguard.transport_data import seal_message
from tests.hypothesis_profiles import examples
from tests.unit.core.packet.packets import (
    IP,
    Packet,
    built,
    frame,
    from_virtio,
    ip,
    pattern,
    rebuilt,
    super_packet,
    tcp,
    udp,
)

CIPHER = ChaCha20Poly1305(bytes(range(32)))
RECEIVER = 0xA1B2C3D4
LAYERS: dict[str, Callable[[], Packet]] = {"tcp": tcp, "udp": udp}


def decrypted(datagrams: bytes | memoryview, size: int, headroom: int = 0) -> list[tuple[int, int, bytes]]:
    """(receiver index, counter, packet) of each datagram, by the whitepaper's formulas."""
    messages = []
    for start in range(0, len(datagrams), size or len(datagrams)):
        message = bytes(datagrams[start : start + (size or len(datagrams))])[headroom:]
        kind, receiver, counter = struct.unpack_from("<IIQ", message)
        assert kind == 4
        nonce = bytes(4) + counter.to_bytes(8, "little")
        messages.append((receiver, counter, CIPHER.decrypt(nonce, message[16:], None)))
    return messages


def sealed(packet: SuperPacket, buffer: SealBuffer | None = None, headroom: int = 0) -> list[tuple[bytes, int]]:
    """The sends of a packet."""
    buffer = buffer or seal_buffer()
    sends = []
    for first, count in plan(packet, headroom):
        datagrams, size = buffer.seal(
            CIPHER, RECEIVER, 500 + first, packet, first_segment=first, count=count, headroom=headroom
        )
        sends.append((bytes(datagrams), size))
    return sends


def received(datagrams: bytes | memoryview, size: int = 0, headroom: int = 0) -> Rows:
    """The messages in a receive buffer; `size` 0 stands for a lone datagram."""
    buffer = receive_buffer()
    buffer[: len(datagrams)] = datagrams
    return Rows.segments(buffer, len(datagrams), size or len(datagrams)).shrink(headroom, 0)


def open_all(messages: Rows) -> Opened:
    return Opener().open(CIPHER, messages, 0, messages.count)


def seal_buffer() -> SealBuffer:
    buffer = seal_pool().borrow()
    assert buffer is not None
    return buffer


@st.composite
def super_packets(draw: st.DrawFn) -> SuperPacket:
    version = draw(st.sampled_from([4, 6]))
    outer = ip(
        version,
        df=draw(st.booleans()),
        traffic_class=draw(st.integers(0, 255)),
        ident=draw(st.sampled_from([0, 7, 65533])),
    )
    if version == 4 and draw(st.booleans()):
        outer.options = b"\x01" * 4
    flags = "".join(draw(st.lists(st.sampled_from("FPC"), unique=True)))
    inner = draw(
        st.sampled_from(
            [
                udp(),
                tcp(
                    seq=draw(st.sampled_from([0, 1000, 0xFFFFFFF0])),
                    flags="A" + flags,
                    options=draw(st.booleans()),
                ),
            ]
        )
    )
    size = draw(st.integers(1, 300))
    length = size * draw(st.integers(1, 12)) + draw(st.integers(1, size))
    payload = draw(st.binary(min_size=20, max_size=20)) * (length // 20) + bytes(length % 20)
    return super_packet(outer, inner, payload, segment_size=size)


@settings(max_examples=examples(150))
@given(super_packets(), st.sampled_from([0, 4]))
def test_sealing_cuts_a_super_packet_into_correct_packets(packet: SuperPacket, headroom: int) -> None:
    original = bytes(packet.data)

    messages = [
        message for send, size in sealed(packet, headroom=headroom) for message in decrypted(send, size, headroom)
    ]

    assert [receiver for receiver, _, _ in messages] == [RECEIVER] * packet.segments
    assert [counter for _, counter, _ in messages] == [500 + row for row in range(packet.segments)]
    for row, (_, _, data) in enumerate(messages):
        assert data == rebuilt(data)
        assert data == bytes(packet.segment(row).data)
    assert bytes(packet.data) == original


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("layer", ["tcp", "udp"])
@pytest.mark.parametrize("last", [1, 700, 1207])
@pytest.mark.parametrize("headroom", [0, 4])
def test_sealed_packets_are_opened_and_merged_again(version: int, layer: str, last: int, headroom: int) -> None:
    packet = super_packet(ip(version), LAYERS[layer](), pattern(52 * 1208 + last), segment_size=1208)
    arena = Arena()
    parts = []

    for datagrams, size in sealed(packet, headroom=headroom):
        messages = received(datagrams, size, headroom)
        opener = Opener()
        assert opener.common_receiver(messages) == RECEIVER
        opened = opener.open(CIPHER, messages, 0, messages.count)
        assert opened.authentic.all()
        parts += coalesce(opened.packets, arena=arena)

    assert [part.segments for part in parts] == [27, 26]
    payload = b"".join(bytes(part.data[part.header_length :]) for part in parts)
    assert payload == bytes(packet.data[packet.header_length :])
    assert [bytes(part.segment(0).data) for part in parts] == [bytes(packet.segment(row).data) for row in (0, 27)]


@settings(max_examples=examples(60))
@given(super_packets())
def test_opening_and_merging_undoes_sealing(packet: SuperPacket) -> None:
    arena = Arena()
    cut: list[bytes] = []
    for datagrams, size in sealed(packet):
        merged = coalesce(open_all(received(datagrams, size)).packets, arena=arena)
        cut += [bytes(each.segment(row).data) for each in merged for row in range(each.segments)]

    assert cut == [bytes(packet.segment(row).data) for row in range(packet.segments)]


@pytest.mark.parametrize(("segments", "sends"), [(1, [1]), (2, [2]), (49, [49]), (50, [25, 25]), (53, [27, 26])])
def test_a_read_too_large_for_one_send_leaves_as_nearly_equal_sends(segments: int, sends: list[int]) -> None:
    packet = parse(built(ip(), tcp(), bytes(1228 * segments)), segment_size=1228, max_size=1280)
    assert packet is not None

    assert [count for _, count in plan(packet)] == sends


@given(st.integers(1, 1228), st.integers(1, 65_000), st.sampled_from([0, 4]))
def test_a_plan_covers_every_segment_once_within_the_limits(size: int, length: int, headroom: int) -> None:
    packet = SuperPacket()
    packet.data = memoryview(bytes(52 + length))
    packet.header_length = 52
    packet.segment_size = size if length > size else 0

    sends = plan(packet, headroom)

    covered = [row for first, count in sends for row in range(first, first + count)]
    assert covered == list(range(packet.segments))
    counts = [count for _, count in sends]
    assert max(counts) - min(counts) <= 1
    if packet.segment_size:
        assert max(counts) <= send_limit(headroom + 32 + 52 + size)
        assert max(counts) <= 64
        assert max(counts) * (headroom + 32 + 52 + size) <= 65_507


def test_a_lone_packet_leaves_as_one_datagram() -> None:
    data = built(ip(), udp(), b"hello")
    packet = parse(data)
    assert packet is not None

    ((datagram, size),) = sealed(packet, headroom=4)

    assert (len(datagram), size) == (4 + 32 + len(data), 0)
    assert decrypted(datagram, 0, 4) == [(RECEIVER, 500, bytes(data))]


@pytest.mark.parametrize("layer", ["tcp", "udp"])
def test_a_partial_checksum_is_completed_before_it_is_sealed(layer: str) -> None:
    data = built(ip(), LAYERS[layer](), b"hello")
    packets = [from_virtio(frame(data, 0)) for _ in range(3)]
    lone = [packet for packet in packets if packet]

    ((alone, _),) = sealed(lone[0])
    together, size = seal_buffer().seal_lone(CIPHER, RECEIVER, 9, lone[1:])

    assert [message[2] for message in decrypted(alone, 0) + decrypted(together, size)] == [data] * 3


@pytest.mark.parametrize("headroom", [0, 4])
@pytest.mark.parametrize("count", [1, 2, 45])
def test_lone_packets_of_equal_size_leave_together(headroom: int, count: int) -> None:
    packets = [parse(built(ip(), udp(port=port), pattern(1200))) for port in range(1, count + 1)]
    lone = [packet for packet in packets if packet]

    datagrams, size = seal_buffer().seal_lone(CIPHER, RECEIVER, 9, lone, headroom=headroom)

    assert size == (0 if count == 1 else headroom + 32 + 1228)
    expected = [(RECEIVER, 9 + row, bytes(packet.data)) for row, packet in enumerate(lone)]
    assert decrypted(datagrams, size, headroom) == expected


def test_a_buffer_serves_peers_and_layouts_in_any_order() -> None:
    buffer = seal_buffer()
    originals = [super_packet(ip(), tcp(), pattern(1000), segment_size=size) for size in range(90, 130)]
    alone = parse(built(ip(), udp(), pattern(300)))
    assert alone is not None

    for turn, packet in enumerate([*originals, *originals[::7], originals[0], originals[0]]):
        for receiver in (turn, turn + 1):
            datagrams, size = buffer.seal(CIPHER, receiver, turn, packet, count=packet.segments)
            messages = decrypted(datagrams, size)
            assert {message[0] for message in messages} == {receiver}
            assert all(rebuilt(message[2]) == message[2] for message in messages)
        assert decrypted(buffer.seal(CIPHER, 3, 3, alone)[0], 0) == [(3, 3, bytes(alone.data))]


def test_a_pool_lends_eight_buffers_and_takes_each_back_once() -> None:
    pool = seal_pool()

    buffers = [pool.borrow() for _ in range(8)]

    assert all(buffers)
    assert (pool.free, pool.borrow()) == (0, None)
    buffer = buffers[0]
    assert buffer is not None
    buffer.release()
    assert pool.free == 1
    with pytest.raises(RuntimeError, match="twice"):
        buffer.release()
    assert pool.borrow() is buffer
    assert pool.free == 0


def test_forged_datagrams_are_distinguished_from_authentic_ones() -> None:
    packet = super_packet(ip(), tcp(), pattern(950), segment_size=100)
    ((datagrams, size),) = sealed(packet)
    forged = bytearray(datagrams)
    forged[3 * size + 20] ^= 1
    forged[9 * size + 8] ^= 1

    opened = open_all(received(forged, size))

    assert opened.authentic.tolist() == [row not in {3, 9} for row in range(10)]
    merged = coalesce(opened.packets, keep=opened.authentic, arena=Arena())
    assert [each.segments for each in merged] == [3, 5]


def test_counters_are_shown_for_the_replay_check() -> None:
    packet = super_packet(ip(), tcp(), pattern(950), segment_size=100)
    ((datagrams, size),) = sealed(packet)

    opened = open_all(received(datagrams, size))

    assert opened.counters.tolist() == list(range(500, 510))


def test_some_of_a_batch_can_be_opened_with_each_key() -> None:
    packet = super_packet(ip(), tcp(), pattern(950), segment_size=100)
    ((datagrams, size),) = sealed(packet)
    other = ChaCha20Poly1305(bytes(32))
    strange = seal_message(other, 77, 1, bytes(packet.segment(0).data))
    mixed = strange + datagrams
    messages = received(mixed, size)
    opener = Opener()

    assert opener.common_receiver(messages) is None
    assert [receiver_of(messages, row) for row in range(11)] == [77] + [RECEIVER] * 10
    first = opener.open(other, messages, 0, 1)
    assert first.authentic.all()
    rest = opener.open(CIPHER, messages, 1, 10)
    middle = [bytes(packet.segment(row).data) for row in range(10)]

    assert rest.authentic.all()
    assert list(map(bytes, first.packets.each())) == middle[:1]
    assert list(map(bytes, rest.packets.each())) == middle
    assert rest.counters.tolist() == list(range(500, 510))


def test_a_lone_datagram_is_opened() -> None:
    for length in range(200):
        message = seal_message(CIPHER, RECEIVER, length, bytes(length))
        messages = received(message)

        assert Opener().common_receiver(messages) == RECEIVER
        packet, counter = open_lone(CIPHER, messages, 0)

        assert (bytes(packet), counter) == (bytes(length), length)
        opened = open_all(received(message))
        assert (opened.authentic.tolist(), opened.counters.tolist()) == ([True], [length])
        assert list(map(bytes, opened.packets.each())) == [bytes(length)]


def test_a_forged_lone_datagram_is_not_authentic() -> None:
    message = bytearray(seal_message(CIPHER, RECEIVER, 1, b"hello"))
    message[-1] ^= 1

    assert open_all(received(message)).authentic.tolist() == [False]
    assert open_lone(CIPHER, received(message), 0)[1] is None


def test_keepalives_in_a_row_are_opened() -> None:
    messages = b"".join(seal_message(CIPHER, RECEIVER, counter, b"") for counter in range(2000))

    opened = open_all(received(messages, 32))

    assert (opened.authentic.all(), opened.packets.count, opened.packets.size) == (True, 2000, 0)
    assert coalesce(opened.packets, arena=Arena()) == []


@pytest.mark.parametrize(
    ("datagrams", "size"),
    [
        (b"", 0),
        (b"\4\0\0\0" + bytes(27), 31),
        (b"\1\0\0\0" + bytes(144), 148),
        (b"\4\0\0\1" + bytes(100), 104),
        ((b"\4\0\0\0" + bytes(60)) * 2 + b"\1" * 40, 64),
        ((b"\4\0\0\0" + bytes(60)) * 2 + b"\4\0\0\0" + bytes(20), 64),
        ((b"\4\0\0\0\1" + bytes(59)) + b"\4\0\0\0\2" + bytes(59), 64),
    ],
)
def test_a_batch_that_is_not_all_of_one_session_has_no_common_receiver(datagrams: bytes, size: int) -> None:
    assert Opener().common_receiver(received(datagrams, size)) is None


def test_the_last_datagram_may_end_where_the_buffer_does() -> None:
    message = seal_message(CIPHER, RECEIVER, 1, bytes(1280))
    last = seal_message(CIPHER, RECEIVER, 2, bytes(65_536 - 49 * 1312 - 32))
    datagrams = message * 49 + last
    assert len(datagrams) == 65_536

    opened = open_all(received(datagrams, 1312))

    assert (opened.authentic.all(), opened.packets.count, opened.packets.last_size) == (True, 50, 1216)


@settings(max_examples=examples(100))
@given(st.binary(min_size=64, max_size=300), st.integers(1, 90), st.sampled_from([0, 4]))
def test_arbitrary_datagrams_are_never_authentic_and_never_fail(data: bytes, size: int, headroom: int) -> None:
    messages = received(data, size, headroom)
    opener = Opener()
    rows = [row for row in range(messages.count) if receiver_of(messages, row) is not None]
    if opener.common_receiver(messages) is not None:
        assert len(rows) == messages.count

    assert not any(opener.open(CIPHER, messages, row, 1).authentic.any() for row in rows)


def test_a_wrong_key_opens_nothing() -> None:
    message = seal_message(CIPHER, RECEIVER, 7, b"keepalive")

    with pytest.raises(InvalidTag):
        ChaCha20Poly1305(bytes(32)).decrypt(bytes(4) + message[8:16], message[16:], None)
    assert decrypted(message, 0) == [(RECEIVER, 7, b"keepalive")]


def test_identifications_count_up_across_sends_where_fragmenting_is_allowed() -> None:
    packet = super_packet(ip(df=False, ident=65_530), udp(), pattern(30_000), segment_size=300)

    packets = [message[2] for send, size in sealed(packet) for message in decrypted(send, size)]

    assert [IP(data).id for data in packets] == [(65_530 + row) % 65_536 for row in range(100)]

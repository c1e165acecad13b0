"""The data path: channels, permissions and indications, batches, and allocations that talk to each other."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.datagrams import MAX_SEGMENTS, MAX_SEND_SIZE, DatagramBatch, send_limit
from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.relay.allocation import MAX_PERMISSIONS
from firezone_tunnel.core.relay.forwarding import buffer_pool, gather
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import FAMILY_IPV4, Kind, Message, Method
from tests.unit.core.relay.world import (
    CLIENT4,
    CLIENT6,
    LISTEN4,
    PEER4,
    PEER6,
    RELAY4,
    RELAY6,
    Client,
    Sent,
    World,
    channel_data,
    code_of,
    parsed,
)

OTHER_PORT = SocketAddress(PEER4.host, 7001)


@pytest.mark.parametrize(("client", "peer"), list(itertools.product([CLIENT4, CLIENT6], [PEER4, PEER6])))
def test_ping_and_pong_pass_a_channel_of_any_families(client: SocketAddress, peer: SocketAddress) -> None:
    world = World()
    sender = Client(world, client)
    port = sender.allocate_dual()
    sender.bind(0x4000, peer)

    (ping,) = sender.send_on(0x4000, b"ping", ecn=2)
    (pong,) = world.deliver_to_port(port, peer, b"pong", ecn=1)

    host = RELAY6 if peer.is_ipv6 else RELAY4
    assert ping == Sent(peer, port, SocketAddress(host, port), [b"ping"], 2, False)
    assert (pong.to, pong.port, pong.datagrams, pong.ecn) == (client, 0, [channel_data(0x4000, b"pong")], 1)


@pytest.mark.parametrize(("client", "peer"), list(itertools.product([CLIENT4, CLIENT6], [PEER4, PEER6])))
def test_ping_and_pong_pass_as_indications_of_any_families(client: SocketAddress, peer: SocketAddress) -> None:
    world = World()
    sender = Client(world, client)
    port = sender.allocate_dual()
    sender.permit(peer)

    (ping,) = sender.indicate(peer, b"ping")
    (pong,) = world.deliver_to_port(port, peer, b"pong")

    assert (ping.to, ping.port, ping.datagrams) == (peer, port, [b"ping"])
    indication = parsed(pong.datagrams[0])
    assert (pong.to, pong.port) == (client, 0)
    assert (indication.method, indication.kind) == (Method.DATA, Kind.INDICATION)
    assert indication.attributes == ((stun.XOR_PEER_ADDRESS, peer), (stun.DATA, b"pong"))


@pytest.mark.parametrize("number", [0x4000, 0x4FFF, 0x5000, 0x7FFF])
def test_channels_of_both_rfcs_work(number: int) -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()

    assert code_of(client.bind(number, PEER4)) == 0

    assert [sent.datagrams for sent in client.send_on(number, b"to")] == [[b"to"]]
    assert [sent.datagrams for sent in world.deliver_to_port(port, PEER4, b"fro")] == [[channel_data(number, b"fro")]]


@pytest.mark.parametrize("number", [0, 1, 0x3FFF, 0x8000, 0xFFFF])
def test_other_numbers_are_400(number: int) -> None:
    client = Client(World())
    client.allocate()

    assert code_of(client.bind(number, PEER4)) == 400


def test_a_bind_without_peer_number_or_port_is_400_and_a_bind_of_another_family_443() -> None:
    client = Client(World())
    client.allocate()

    assert code_of(client.request(Method.CHANNEL_BIND, (stun.CHANNEL_NUMBER, 0x4000))) == 400
    assert code_of(client.request(Method.CHANNEL_BIND, (stun.XOR_PEER_ADDRESS, PEER4))) == 400
    assert code_of(client.bind(0x4000, SocketAddress(PEER4.host, 0))) == 400
    assert code_of(client.bind(0x4000, PEER6)) == 443


def test_a_channel_is_for_one_peer_and_a_peer_has_one_channel() -> None:
    client = Client(World())
    client.allocate()
    client.bind(0x4000, PEER4)

    assert code_of(client.bind(0x4000, OTHER_PORT)) == 400
    assert code_of(client.bind(0x4001, PEER4)) == 400
    assert code_of(client.bind(0x4000, PEER4)) == 0
    assert code_of(client.bind(0x4001, OTHER_PORT)) == 0


def test_a_channel_lasts_600_seconds_then_rests_for_300_before_it_is_free() -> None:
    world = World()
    client = Client(world)
    client.allocate((stun.LIFETIME, 3600))
    client.bind(0x4000, PEER4)

    world.advance(599)
    assert client.send_on(0x4000, b"in time")
    world.advance(1)
    assert client.send_on(0x4000, b"late") == []
    assert code_of(client.bind(0x4000, OTHER_PORT)) == 400
    assert code_of(client.bind(0x4001, PEER4)) == 400
    world.advance(300)
    assert world.server.channels == 0
    assert code_of(client.bind(0x4000, OTHER_PORT)) == 0
    assert [sent.to for sent in client.send_on(0x4000, b"new")] == [OTHER_PORT]


def test_a_channel_renewed_while_it_rests_carries_data_both_ways_again() -> None:
    world = World()
    client = Client(world)
    client.allocate((stun.LIFETIME, 3600))
    port = next(iter(world.open))[0]
    client.bind(0x4000, PEER4)
    world.advance(700)
    assert world.deliver_to_port(port, PEER4, b"fro") == []

    assert code_of(client.bind(0x4000, PEER4)) == 0

    assert client.send_on(0x4000, b"to")
    assert world.deliver_to_port(port, PEER4, b"fro")
    world.advance(599)
    assert client.send_on(0x4000, b"to")


def test_a_bound_channel_carries_data_although_its_permission_is_over() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)

    world.advance(301)  # Firezone's clients renew channels after 300 s

    assert client.send_on(0x4000, b"to")


def test_a_channel_is_also_a_permission_for_the_host_for_300_seconds() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)

    assert [sent.to for sent in client.indicate(OTHER_PORT, b"data")] == [OTHER_PORT]
    world.advance(300)
    assert client.indicate(OTHER_PORT, b"data") == []


def test_a_permission_is_for_all_ports_of_a_host_and_lasts_300_seconds() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.refresh(3600)
    client.permit(SocketAddress(PEER4.host, 0))

    world.advance(299)
    assert client.indicate(PEER4, b"1")
    assert client.indicate(OTHER_PORT, b"2")
    assert world.deliver_to_port(port, OTHER_PORT, b"3")
    world.advance(1)
    assert client.indicate(PEER4, b"4") == []
    assert world.deliver_to_port(port, PEER4, b"5") == []
    client.permit(PEER4)
    world.advance(200)
    client.permit(PEER4)
    world.advance(200)
    assert client.indicate(PEER4, b"6")


def test_permissions_are_installed_all_or_none() -> None:
    client = Client(World())
    client.allocate()

    assert code_of(client.permit()) == 400
    assert code_of(client.permit(PEER4, PEER6)) == 443
    assert client.indicate(PEER4, b"data") == []
    assert code_of(client.permit(PEER4, SocketAddress("8.8.8.8", 1))) == 0
    assert client.indicate(PEER4, b"data")
    assert client.indicate(SocketAddress("8.8.8.8", 2), b"data")


def test_permissions_are_bounded() -> None:
    client = Client(World())
    client.allocate()
    hosts = [SocketAddress(f"8.{number // 250}.{number % 250}.1", 1) for number in range(MAX_PERMISSIONS + 1)]

    codes = [code_of(client.permit(*hosts[at : at + 50])) for at in range(0, len(hosts), 50)]

    assert codes == [0] * (MAX_PERMISSIONS // 50) + [508]
    assert code_of(client.permit(hosts[0])) == 0


def test_channels_of_all_clients_together_are_bounded_and_come_back() -> None:
    world = World(max_channels=3)
    clients = [Client(world, SocketAddress("5.5.5.5", port)) for port in (1000, 1001)]
    for client in clients:
        client.allocate()

    codes = [
        code_of(clients[number % 2].bind(0x4000 + number, SocketAddress("8.8.8.8", 1 + number))) for number in range(4)
    ]

    assert codes == [0, 0, 0, 508]
    clients[0].refresh(0)
    assert code_of(clients[1].bind(0x4003, PEER4)) == 0
    assert world.server.channels == 2


def test_a_client_that_never_asked_for_permissions_gets_no_indications() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)

    assert world.deliver_to_port(port, OTHER_PORT, b"data") == []
    assert world.server.counters.without_channel == 1


def test_strangers_do_not_reach_any_client() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.permit(PEER4)

    assert world.deliver_to_port(port, SocketAddress("8.8.8.8", 7000), b"data") == []
    assert world.deliver_to_port(port, PEER6, b"data") == []
    assert world.deliver_to_port(port, SocketAddress(PEER4.host, 0), b"data") == []
    assert client.indicate(SocketAddress("8.8.8.8", 7000), b"data") == []
    assert world.deliver(CLIENT6, channel_data(0x4000, b"data")) == []


def test_freeing_an_allocation_ends_all_its_channels_and_the_next_owner_of_its_port_hears_nothing_of_its_peers() -> (
    None
):
    world = World(lowest_port=50_000, highest_port=50_000)
    first, second = Client(world), Client(world, SocketAddress("5.5.5.5", 1))
    first.allocate()
    first.bind(0x4000, PEER4)
    first.refresh(0)
    assert world.server.channels == 0
    assert first.send_on(0x4000, b"data") == []

    assert code_of(second.allocate()) == 0

    assert world.deliver_to_port(50_000, PEER4, b"data") == []


@pytest.mark.parametrize("size", [0, 1, 3, 101, 1312])
def test_channel_data_may_be_padded_but_answers_are_not(size: int) -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)

    (sent,) = client.send_on(0x4000, b"x" * size, padding=b"\xff\xff\xff")

    assert sent.datagrams == [b"x" * size]
    (back,) = world.deliver_to_port(port, PEER4, b"y" * (size or 1))
    assert back.datagrams == [channel_data(0x4000, b"y" * (size or 1))]


def test_data_with_a_length_beyond_the_datagram_or_an_unknown_channel_is_dropped() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)

    assert world.deliver(CLIENT4, channel_data(0x4000, b"data")[:-1]) == []
    assert world.deliver(CLIENT4, b"\x40\x00\x00") == []
    assert client.send_on(0x4001, b"data") == []
    assert world.server.counters.unrecognized == 2
    assert world.server.counters.without_channel == 1


def test_a_send_indication_keeps_its_dont_fragment_and_needs_peer_and_data() -> None:
    world = World()
    client = Client(world)
    client.allocate((stun.DONT_FRAGMENT, True))
    client.permit(PEER4)

    assert client.indicate(PEER4, b"data", (stun.DONT_FRAGMENT, True))[0].dont_fragment
    assert not client.indicate(PEER4, b"data")[0].dont_fragment
    assert client.indicate(PEER4, b"")[0].datagrams == [b""]
    unknown: stun.Attribute[bytes] = stun.Attribute(0x7FFF, "?", lambda value, _: value, lambda value, _: value)
    assert client.indicate(PEER4, b"data", (unknown, b"")) == []
    assert client.indicate(SocketAddress(PEER4.host, 0), b"data") == []
    for attribute in ((stun.XOR_PEER_ADDRESS, PEER4), (stun.DATA, b"data")):
        half = Message(Method.SEND, Kind.INDICATION, bytes(12), (attribute,))
        assert world.deliver(CLIENT4, half.encode()) == []


@pytest.mark.parametrize(("count", "size", "last"), [(2, 1312, 1312), (49, 1312, 7), (64, 1, 1), (50, 1279, 1279)])
def test_a_batch_on_one_channel_leaves_as_one_send_in_each_direction(count: int, size: int, last: int) -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)
    payloads = [random.Random(number).randbytes(size) for number in range(count - 1)] + [b"l" * last]

    (to,) = client.send_on(0x4000, *payloads)
    (fro,) = world.deliver_to_port(port, PEER4, b"".join(payloads), segment_size=size)

    assert (to.to, to.port, to.datagrams) == (PEER4, port, payloads)
    assert (fro.to, fro.port) == (CLIENT4, 0)
    assert fro.datagrams == [channel_data(0x4000, payload) for payload in payloads]


def test_a_batch_too_large_with_its_headers_leaves_as_two_nearly_equal_sends() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)
    payloads = [random.Random(number).randbytes(1309) for number in range(49)] + [b"last"]

    sent = world.deliver_to_port(port, PEER4, b"".join(payloads), segment_size=1309)

    assert [len(send.datagrams) for send in sent] == [25, 25]
    assert [datagram for send in sent for datagram in send.datagrams] == [
        channel_data(0x4000, payload) for payload in payloads
    ]
    assert all(sum(map(len, send.datagrams)) <= MAX_SEND_SIZE for send in sent)


def test_padded_channel_data_is_still_one_batch() -> None:
    client = Client(World())
    client.allocate()
    client.bind(0x4000, PEER4)

    (sent,) = client.send_on(0x4000, *([b"x" * 1309] * 40), padding=b"\0\0\0")

    assert sent.datagrams == [b"x" * 1309] * 40


def test_a_mixed_batch_is_taken_apart() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)
    client.bind(0x4001, OTHER_PORT)
    binding = Message(Method.BINDING, Kind.REQUEST, bytes(12)).encode()
    first, second = channel_data(0x4000, b"a" * 16), channel_data(0x4001, b"b" * 16)
    shorter = channel_data(0x4000, b"c" * 9)

    sent = world.deliver(CLIENT4, first + binding + second + first + b"\xff" * 20 + shorter, segment_size=20)

    assert [(send.to, send.port != 0) for send in sent] == [
        (PEER4, True),
        (CLIENT4, False),
        (OTHER_PORT, True),
        (PEER4, True),
        (PEER4, True),
    ]
    assert [send.datagrams[0] for send in sent if send.port] == [b"a" * 16, b"b" * 16, b"a" * 16, b"c" * 9]
    assert world.server.counters.unrecognized == 1


def test_data_for_a_neighbours_allocation_never_leaves_the_process() -> None:
    world = World()
    first, second = Client(world, CLIENT4), Client(world, CLIENT6)
    first_port, second_port = first.allocate_dual(), second.allocate_dual()
    first.bind(0x4001, SocketAddress(RELAY6, second_port))
    payloads = [random.Random(number).randbytes(1312) for number in range(20)] + [b"last"]
    assert first.send_on(0x4001, *payloads) == []  # the second hasn't allowed it yet
    second.bind(0x4ABC, SocketAddress(RELAY6, first_port))

    (there,) = first.send_on(0x4001, *payloads, ecn=1)
    (back,) = second.send_on(0x4ABC, b"back")

    assert (there.to, there.port, there.ecn) == (CLIENT6, 0, 1)
    assert there.datagrams == [channel_data(0x4ABC, payload) for payload in payloads]
    assert (back.to, back.port, back.datagrams) == (CLIENT4, 0, [channel_data(0x4001, b"back")])


def test_neighbours_talk_by_indications_too() -> None:
    world = World()
    first, second = Client(world, CLIENT4), Client(world, CLIENT6)
    first_port, second_port = first.allocate_dual(), second.allocate_dual()
    first.permit(SocketAddress(RELAY4, 0))
    second.permit(SocketAddress(RELAY4, 0))

    (there,) = first.indicate(SocketAddress(RELAY4, second_port), b"there")

    assert (there.to, there.port) == (CLIENT6, 0)
    assert parsed(there.datagrams[0]).get(stun.XOR_PEER_ADDRESS) == SocketAddress(RELAY4, first_port)
    assert parsed(there.datagrams[0]).get(stun.DATA) == b"there"


def test_an_allocation_of_another_worker_is_reached_through_the_kernel() -> None:
    world = World(workers=2, worker=1)
    client = Client(world)
    port = client.allocate_dual()
    elsewhere = SocketAddress(RELAY4, 49152)
    client.bind(0x4000, elsewhere)

    (sent,) = client.send_on(0x4000, b"data")

    assert (sent.to, sent.port) == (elsewhere, port)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_without_an_allocation_is_never_reached(workers: int) -> None:
    world = World(workers=workers, worker=workers - 1)
    client = Client(world)
    port = client.allocate_dual()
    other = 65_535 if port != 65_535 else 65_534
    client.bind(0x4000, SocketAddress(RELAY4, other))

    assert client.send_on(0x4000, b"data") == []
    assert world.server.counters.without_allocation == 1


def test_a_neighbour_that_has_only_the_other_family_is_not_reached() -> None:
    world = World()
    first, second = Client(world, CLIENT4), Client(world, CLIENT6)
    first.allocate_dual()
    answer = second.allocate((stun.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV4))
    second.permit(SocketAddress(RELAY4, 0))
    port = answer.get_all(stun.XOR_RELAYED_ADDRESS)[0].port
    first.bind(0x4000, SocketAddress(RELAY6, port))

    assert first.send_on(0x4000, b"data") == []


def test_answers_and_data_leave_from_the_address_that_the_client_uses() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)
    assert [sent.source for sent in world.deliver_to_port(port, PEER4, b"data")] == [LISTEN4]
    other = SocketAddress("9.1.1.99", 3478)

    world.deliver(CLIENT4, client.encode(Method.REFRESH), local=other)

    assert [sent.source for sent in world.deliver_to_port(port, PEER4, b"data")] == [other]


def test_without_a_free_buffer_batches_are_dropped_and_counted_and_lone_datagrams_pass() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)
    held = []
    for _ in range(33):
        world.buffer[:2600] = b"z" * 2600
        batch = DatagramBatch.received(world.buffer, 2600, 1300, PEER4, SocketAddress(RELAY4, port))
        world.server.handle_peer_datagrams(port, batch, world.now)
        held += list(world.server.transmits())

    assert len(held) == 32
    assert world.server.counters.without_buffer == 2
    assert world.deliver_to_port(port, PEER4, b"lone")
    for transmit in held:
        transmit.release()
    assert world.deliver_to_port(port, PEER4, b"z" * 2600, segment_size=1300)


def test_relayed_data_is_counted() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)
    client.send_on(0x4000, b"x" * 100, b"x" * 50)
    world.deliver_to_port(port, PEER4, b"y" * 30, segment_size=10)

    counters = world.server.counters

    assert (counters.relayed_to_peers, counters.relayed_to_clients, counters.relayed_bytes) == (2, 3, 180)


@given(
    st.integers(1, 64),
    st.integers(1, 40),
    st.integers(0, 8),
    st.integers(0, 8),
    st.sampled_from([None, 0x4000, 0x7FFF]),
)
def test_gathering_moves_every_payload_and_nothing_else(
    count: int, size: int, offset: int, gap: int, channel: int | None
) -> None:
    last_size = max(1, size // 2)
    stride = size + gap
    memory = random.Random(count).randbytes(offset + stride * count)
    rows = Rows(memoryview(memory), offset, stride, size, count, last_size)
    expected = [memory[offset + at * stride :][: last_size if at == count - 1 else size] for at in range(count)]
    if channel is not None:
        expected = [channel_data(channel, payload) for payload in expected]

    gathered = gather(rows, buffer_pool(1), channel)

    assert gathered is not None
    assert bytes(gathered.payload) == b"".join(expected)
    assert gathered.segment_size == (len(expected[0]) if count > 1 else 0)


@given(st.integers(0, 70_000))
def test_a_send_holds_as_many_as_the_kernel_takes(size: int) -> None:
    most = send_limit(size)

    assert 1 <= most <= MAX_SEGMENTS
    assert most == 1 or most * size <= MAX_SEND_SIZE


def test_a_batch_whose_last_datagram_is_on_another_channel_is_taken_apart() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)
    client.bind(0x4001, OTHER_PORT)

    sent = world.deliver(CLIENT4, channel_data(0x4000, b"12") * 2 + channel_data(0x4001, b"3"), segment_size=6)

    assert [(send.to, send.datagrams) for send in sent] == [(PEER4, [b"12"]), (PEER4, [b"12"]), (OTHER_PORT, [b"3"])]


def test_a_channel_whose_permission_finds_no_room_is_508() -> None:
    client = Client(World(max_permissions=1))
    client.allocate()
    client.bind(0x4000, PEER4)

    assert code_of(client.bind(0x4001, OTHER_PORT)) == 0
    assert code_of(client.bind(0x4002, SocketAddress("8.8.8.8", 1))) == 508
    assert client.send_on(0x4002, b"data") == []


def test_a_late_timer_lets_no_peer_through() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    world.advance(100)
    client.bind(0x4000, PEER4)

    world.now += 500  # the allocation has ended, the channel not yet, and handle_timeout was not called

    assert world.deliver_to_port(port, PEER4, b"data") == []

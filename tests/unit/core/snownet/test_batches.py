"""Received batches: of one session or many, replayed, forged, foreign and malformed; congestion; loss and disorder."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.ice.agent import Credentials
from firezone_tunnel.core.packet.rewrite import CE
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionFailed
from firezone_tunnel.core.wireguard.seal import POOL_SIZE
from firezone_tunnel.core.wireguard.session import PeerCounters
from tests.hypothesis_profiles import examples
from tests.unit.core.packet.packets import rebuilt
from tests.unit.core.snownet.world import (
    DATA,
    INITIATION,
    LATENCY,
    Host,
    World,
    assert_no_slot_is_lost,
    assert_traffic_flows,
    connected,
    datagram,
    everything,
    nothing,
    run_of_segments,
)

_STRANGER = SocketAddress("192.0.2.66", 6666)


def test_a_run_arrives_as_the_same_bytes_in_one_piece() -> None:
    world, client, gateway = connected()
    sent = run_of_segments(segments=40)

    client.send(gateway, sent)
    world.run(LATENCY)

    ((_, packet),) = gateway.packets
    assert packet.segments == 40
    assert [bytes(packet.segment(i).data) for i in range(40)] == [bytes(sent.segment(i).data) for i in range(40)]


def test_one_run_after_another_arrives_in_one_piece() -> None:
    world, client, gateway = connected()
    for _ in range(10):
        client.send(gateway, run_of_segments(segments=40))
        world.run(LATENCY)

    assert [packet.segments for _, packet in gateway.packets] == [40] * 10


def test_a_run_too_large_for_one_send_leaves_in_two_sends_of_nearly_equal_size() -> None:
    world, client, gateway = connected()
    client.sent.clear()

    client.send(gateway, run_of_segments(segments=53, segment_size=1228))
    world.run(LATENCY)

    assert len(client.sent) == 53
    assert sum(packet.segments for _, packet in gateway.packets) == 53
    assert len(gateway.packets) <= 2


def test_a_run_without_a_free_buffer_is_dropped_and_counted_and_later_runs_pass() -> None:
    world, client, gateway = connected()
    borrowed = [client.slots.borrow() for _ in range(POOL_SIZE)]

    client.send(gateway, run_of_segments(segments=20), datagram("lone packets need none"))
    world.run(LATENCY)
    assert client.node.counters.packets_without_buffer == 20
    assert gateway.texts() == ["lone packets need none"]

    for slot in borrowed:
        assert slot is not None
        slot.release()
    client.send(gateway, run_of_segments(segments=20))
    world.run(LATENCY)
    assert gateway.packets[-1][1].segments == 20


def test_lone_packets_of_one_size_leave_as_one_send_and_others_do_not_wait_for_them() -> None:
    world, client, gateway = connected()
    transmits = _transmits_of(client, gateway, world, [datagram(str(number)) for number in range(20)])
    assert transmits == [(20 * 132, 132)]

    sizes = [100, 100, 100, 100, 300, 100]
    transmits = _transmits_of(client, gateway, world, [datagram("x", size=size) for size in sizes])
    assert transmits == [(4 * 132, 132), (332, 0), (132, 0)]


def test_lone_packets_that_differ_in_ecn_leave_apart_and_each_with_its_own() -> None:
    world, client, _gateway = connected()
    client.node.encapsulate("gateway", datagram("a", ecn=2), world.now, world.utc)
    client.node.encapsulate("gateway", datagram("b", ecn=0), world.now, world.utc)
    client.node.encapsulate("gateway", run_of_segments(segments=3, ecn=1), world.now, world.utc)
    client.node.flush(world.now)

    transmits = list(client.node.transmits())
    assert [transmit.ecn for transmit in transmits] == [2, 0, 1]
    for transmit in transmits:
        transmit.release()


def test_congestion_on_the_way_is_marked_on_ecn_capable_packets() -> None:
    world, client, gateway = connected()
    source, local = client.addresses[0], gateway.addresses[0]

    sealed = _sealed_by(client, gateway, world, datagram("capable", ecn=2), datagram("incapable", ecn=0))
    for message in sealed:
        gateway.handle([message], source, local, ecn=CE)

    assert [packet.ecn for _, packet in gateway.packets] == [CE, 0]
    assert [bytes(packet.data) for _, packet in gateway.packets] == [
        rebuilt(packet.data) for _, packet in gateway.packets
    ]


def test_no_congestion_leaves_packets_as_they_were_sent() -> None:
    world, client, gateway = connected()
    for ecn in (0, 1, 2, 3):
        (sealed,) = _sealed_by(client, gateway, world, datagram("x", ecn=ecn))
        gateway.handle([sealed], client.addresses[0], gateway.addresses[0], ecn=ecn if ecn != CE else 0)

    assert [packet.ecn for _, packet in gateway.packets] == [0, 1, 2, 3]


# Replays and forgeries


def test_a_replay_is_dropped_and_counted_alone_or_between_others() -> None:
    world, client, gateway = connected()
    first, second, third = _sealed_by(client, gateway, world, *[datagram(text) for text in "abc"])
    source, local = client.addresses[0], gateway.addresses[0]

    gateway.handle([first, second], source, local)
    gateway.handle([first], source, local)
    gateway.handle([second, third, third], source, local)

    assert gateway.texts() == ["a", "b", "c"]
    assert _peer_counters(gateway, client).replayed == 3


def test_a_forged_message_is_dropped_and_does_not_shut_out_the_genuine_message() -> None:
    world, client, gateway = connected()
    sealed = _sealed_by(client, gateway, world, *[datagram(text) for text in "abcd"])
    forged = bytearray(sealed[1])
    forged[40] ^= 1
    source, local = client.addresses[0], gateway.addresses[0]

    gateway.handle([sealed[0], bytes(forged), sealed[2], sealed[3]], source, local)
    gateway.handle([sealed[1]], source, local)

    assert gateway.texts() == ["a", "c", "d", "b"]
    assert _peer_counters(gateway, client).forged == 1


def test_messages_may_come_over_any_path() -> None:
    world, client, gateway = connected()
    (sealed,) = _sealed_by(client, gateway, world, datagram("from elsewhere"))

    gateway.handle([sealed], _STRANGER, gateway.addresses[0])

    assert gateway.texts() == ["from elsewhere"]


def test_an_unknown_session_is_counted_per_datagram() -> None:
    world, client, gateway = connected()
    unknown = b"\4\0\0\0" + b"\xff\xff\xff\xff" + bytes(8) + bytes(80)

    gateway.handle([unknown, unknown, unknown], _STRANGER, gateway.addresses[0])

    assert gateway.node.counters.unknown_sessions == 3
    assert_traffic_flows(world, client, gateway)


def test_a_malformed_packet_inside_is_counted_and_its_neighbours_pass() -> None:
    world, client, gateway = connected()
    broken = datagram("broken")
    broken.data[0] = 0x55  # no IP version
    sealed = _sealed_by(client, gateway, world, datagram("a"), broken, datagram("b"))

    gateway.handle(sealed, client.addresses[0], gateway.addresses[0])

    assert gateway.texts() == ["a", "b"]
    assert gateway.node.counters.malformed_packets == 1


def test_handshakes_of_strangers_and_replayed_ones_change_nothing() -> None:
    world, client, gateway = connected()
    stranger = world.client("stranger", "10.0.9.1")
    stranger.node.upsert_connection(
        "gateway",
        remote_public_key=gateway.node.public_key,
        preshared_key=bytes(32),
        local=_some_credentials(),
        remote=_some_credentials(),
        now=world.now,
        utc_now=world.utc,
    )
    connection = stranger.node._connections["gateway"]
    connection.peer.initiate(world.now, world.utc)
    (initiation,) = connection.peer.transmits()
    recorded = [data for _, data in client.sent if data[0] == INITIATION and len(data) == 148]

    gateway.handle([initiation], stranger.addresses[0], gateway.addresses[0])
    gateway.handle([recorded[0]], _STRANGER, gateway.addresses[0])

    assert gateway.node.counters.unknown_peers == 1
    assert _peer_counters(gateway, client).initiations_replayed == 1
    assert_traffic_flows(world, client, gateway)


# Several sessions in one batch


def test_a_batch_of_two_clients_datagrams_is_taken_apart_in_order() -> None:
    world = World()
    gateway = world.gateway()
    clients = [world.client("alice", "10.0.1.1"), world.client("bob", "10.0.3.1")]
    for client in clients:
        world.introduce(client, gateway)
        client.send(gateway, datagram("hello"))
    world.run(1.0)
    gateway.packets.clear()
    alice, bob = (
        _sealed_by(client, gateway, world, *[datagram(f"{client.name} {number}") for number in range(4)])
        for client in clients
    )

    gateway.handle(
        [alice[0], alice[1], bob[0], alice[2], bob[1], bob[2], bob[3], alice[3]], _STRANGER, gateway.addresses[0]
    )

    assert gateway.texts(clients[0]) == [f"alice {number}" for number in range(4)]
    assert gateway.texts(clients[1]) == [f"bob {number}" for number in range(4)]


def test_handshakes_checks_and_data_in_one_batch_each_do_their_work() -> None:
    world, client, gateway = connected()
    checks = [data for _, data in client.sent if data[:2] == b"\0\1" and len(data) == len(client.sent[0][1])]
    check = checks[0]
    sealed = _sealed_by(client, gateway, world, *[datagram("x", size=len(check) - 32) for _ in range(3)])
    assert {len(message) for message in (*sealed, check)} == {len(check)}
    answered = _answers(gateway)

    gateway.handle([sealed[0], check, sealed[1], sealed[2]], client.addresses[0], gateway.addresses[0])

    assert gateway.texts() == ["x", "x", "x"]
    assert _answers(gateway) == answered + 1


def test_a_keepalive_among_packets_is_not_delivered() -> None:
    world, client, gateway = connected()
    world.run(11.0)  # the passive keepalive
    keepalives = [data for _, data in client.sent if data[0] == DATA and len(data) == 32]

    assert keepalives != []
    assert gateway.packets == []


# Arbitrary bytes


@settings(max_examples=examples(200))
@given(st.binary(max_size=3000), st.integers(0, 1500), st.sampled_from([0, 1, 2, 3]))
def test_any_batch_of_any_bytes_is_taken_in_without_error(data: bytes, segment_size: int, ecn: int) -> None:
    client, gateway = _shared_pair()

    for host in (client, gateway):
        host.take_in(data, segment_size, _STRANGER, host.addresses[0], ecn)

    assert client.packets == gateway.packets == []


@settings(max_examples=examples(200))
@given(st.data())
def test_changed_datagrams_raise_no_error_and_deliver_only_sent_packets(data: st.DataObject) -> None:
    client, gateway = _shared_pair()
    world = client.world
    gateway.packets.clear()
    sealed = _sealed_by(client, gateway, world, *[datagram(text) for text in "abcde"])
    recorded = [datagram for _, datagram in client.sent[:50]]
    mixed = data.draw(st.lists(st.sampled_from([*sealed, *recorded]), min_size=1, max_size=8))
    joined = bytearray(b"".join(mixed))
    for position in data.draw(st.lists(st.integers(0, len(joined) - 1), max_size=4)):
        joined[position] ^= data.draw(st.integers(0, 255))
    gateway.take_in(bytes(joined), data.draw(st.integers(1, len(joined))), _STRANGER, gateway.addresses[0])

    assert set(gateway.texts()) <= set("abcde")


# Loss and disorder


@settings(max_examples=examples(25))
@given(st.integers(0, 2**32), st.floats(0.0, 0.4), st.floats(0.0, 0.3))
def test_after_the_network_heals_packets_flow_again(seed: int, loss: float, jitter: float) -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    chance = random.Random(seed)
    world.lose = lambda sender, data: chance.random() < loss
    world.delay = lambda sender: LATENCY + chance.random() * jitter
    world.introduce(client, gateway)
    for number in range(60):
        packets = [datagram(f"{number}.{index}") for index in range(chance.randrange(4))]
        if chance.random() < 0.3:
            packets.append(run_of_segments(segments=chance.randrange(2, 20)))
        client.send(gateway, *packets)
        gateway.send(client, *packets)
        world.run(chance.random())
    _assert_nothing_twice(gateway)
    world.lose, world.delay = nothing, lambda sender: LATENCY
    world.run(8.0)

    if client.of(ConnectionFailed) or gateway.of(ConnectionFailed):  # ask the portal again, as a packet would
        world.introduce(client, gateway)
        client.send(gateway, datagram("again"))
        world.run(8.0)
    assert_traffic_flows(world, client, gateway)
    assert_no_slot_is_lost(world.hosts.values())


@pytest.mark.parametrize("seconds", [1.0, 5.0, 9.0])
def test_an_outage_during_the_handshake_only_delays_it(seconds: float) -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))
    world.run(0.06)
    world.lose = everything
    world.run(seconds)
    world.lose = nothing

    world.run_until(lambda: gateway.texts() == ["hello"], within=6.0)


def _sealed_by(client: Host, gateway: Host, world: World, *packets: SuperPacket) -> list[bytes]:
    """The sealed datagrams of these packets, without sending them."""
    for packet in packets:
        client.node.encapsulate(gateway.name, packet, world.now, world.utc)
        client.node.flush(world.now)
    sealed = [bytes(transmit.payload) for transmit in client.node.transmits()]
    assert len(sealed) == len(packets)
    return sealed


def _transmits_of(client: Host, gateway: Host, world: World, packets: list[SuperPacket]) -> list[tuple[int, int]]:
    """(bytes, segment size) of each send."""
    for packet in packets:
        client.node.encapsulate(gateway.name, packet, world.now, world.utc)
    client.node.flush(world.now)
    sends = []
    for transmit in client.node.transmits():
        sends.append((len(transmit.payload), transmit.segment_size))
        transmit.release()
    return sends


def _peer_counters(host: Host, peer: Host) -> PeerCounters:
    return host.node._connections[peer.name].peer.counters


def _answers(host: Host) -> int:
    return sum(1 for _, data in host.sent if data[:2] == b"\1\1")


def _assert_nothing_twice(host: Host) -> None:
    texts = [
        bytes(packet.segment(index).data[28:])
        for _, packet in host.packets
        if packet.protocol == 17
        for index in range(packet.segments)
    ]
    assert len(texts) == len(set(texts))


def _some_credentials() -> Credentials:
    return Credentials("some", "some password of 22 ch")


_PAIRS: list[tuple[Host, Host]] = []


def _shared_pair() -> tuple[Host, Host]:
    """A connected pair for all examples: no input may change it."""
    if not _PAIRS:
        _, client, gateway = connected()
        _PAIRS.append((client, gateway))
    return _PAIRS[0]

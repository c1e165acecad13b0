"""Senders at a relay's address can do no harm: invalid channel data is counted and never raises."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionFailed, Role
from firezone_tunnel.core.turn.channel_data import HEADER
from tests.hypothesis_profiles import examples
from tests.simulation.internet import Internet, exchange, way
from tests.unit.core.snownet.world import Host, assert_no_slot_is_lost, datagram, run_of_segments


def relayed() -> tuple[Internet, Host, Host]:
    internet = Internet()
    internet.relay()
    client, gateway = (internet.host_behind("udp-blocked", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    exchange(internet, client, gateway, within=2.0)
    internet.run(1.0)
    assert way(client, gateway) == "relayed"
    client.packets.clear()
    gateway.packets.clear()
    return internet, client, gateway


def sealed(internet: Internet, host: Host, peer: Host, *packets: SuperPacket) -> list[bytes]:
    """The channel data in which `peer` would get these packets of `host`. The relay does not deliver them."""
    relay = internet.relays[0]
    relay.alive = False
    internet.arrived.clear()
    before = len(host.sent)
    host.send(peer, *packets)
    own = [data for _, data in host.sent[before:] if 0x40 <= data[0] <= 0x4F]
    internet.run(0.05)
    relay.alive = True
    number = next(
        channel.number
        for allocation in relay.server._registry._by_client.values()
        if allocation.username.endswith(peer.name)
        for channel in allocation.channels.values()
        if channel.peer == host.path(peer)[0]
    )
    return [HEADER.pack(number, len(message) - 4) + message[4:] for message in own]


def test_channel_data_on_an_unbound_channel_is_counted() -> None:
    internet, client, gateway = relayed()
    relay = internet.relays[0].listening[0]
    (message,) = sealed(internet, client, gateway, datagram("kept"))

    internet.inject(gateway, [HEADER.pack(0x4F00, len(message) - 4) + message[4:]], relay)
    assert gateway.node.counters.unbound_channels == 1
    internet.inject(gateway, [HEADER.pack(0x4F00, 40) + bytes(40)] * 7, relay)
    assert gateway.node.counters.unbound_channels == 8
    assert gateway.packets == []

    internet.inject(gateway, [message], relay)
    assert gateway.texts() == ["kept"]


def test_channel_data_with_a_wrong_length_is_dropped_and_counted() -> None:
    internet, client, gateway = relayed()
    relay = internet.relays[0].listening[0]
    (message,) = sealed(internet, client, gateway, datagram("kept"))
    before = gateway.node.counters.unrecognized

    for wrong in (message + b"\0", message[:-1], message[:3], message[:1], HEADER.pack(0x4000, 0xFFFF) + message[4:]):
        internet.inject(gateway, [wrong], relay)

    assert gateway.packets == []
    assert gateway.node.counters.unrecognized == before + 5
    internet.inject(gateway, [message], relay)
    assert gateway.texts() == ["kept"]


def test_one_wrong_header_in_a_batch_costs_that_datagram_alone() -> None:
    internet, client, gateway = relayed()
    batch = sealed(internet, client, gateway, *(datagram(str(number)) for number in range(6)))
    batch[2] = HEADER.pack(0x4EEE, len(batch[2]) - 4) + batch[2][4:]
    batch[4] = HEADER.pack(struct.unpack(">H", batch[4][:2])[0], 3) + batch[4][4:]

    internet.inject(gateway, batch, internet.relays[0].listening[0])

    assert gateway.texts() == ["0", "1", "3", "5"]
    assert gateway.node.counters.unbound_channels == 1


def test_peer_datagrams_from_the_relays_address_still_reach_their_connection() -> None:
    internet, client, gateway = relayed()
    (message,) = sealed(internet, client, gateway, datagram("bare"))

    internet.inject(gateway, [message[4:]], internet.relays[0].listening[0])

    assert gateway.texts() == ["bare"]


def test_channel_data_from_another_address_is_not_channel_data() -> None:
    internet, client, gateway = relayed()
    (message,) = sealed(internet, client, gateway, datagram("kept"))

    internet.inject(gateway, [message], SocketAddress("203.0.113.99", 3478))

    assert gateway.packets == []
    assert gateway.node.counters.unrecognized == 1


def test_a_relay_that_was_taken_away_is_a_stranger_like_any_other() -> None:
    internet, client, gateway = relayed()
    (message,) = sealed(internet, client, gateway, datagram("late"))
    internet.announce_relays(gateway, [], gone=internet.relays)

    internet.inject(gateway, [message], internet.relays[0].listening[0])

    assert gateway.packets == []
    assert (gateway.node.counters.unrecognized, gateway.node.counters.unbound_channels) == (1, 0)


_HEADERS = st.one_of(
    st.tuples(st.sampled_from([0x4000, 0x4001, 0x4002, 0x4005, 0x4FFF, 0x7FFF]), st.none()),
    st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)),
)
_PAYLOADS = st.one_of(
    st.binary(max_size=120),
    st.sampled_from([b"\1", b"\2", b"\3", b"\4"]).flatmap(lambda kind: st.binary(max_size=150).map(kind.__add__)),
    st.binary(min_size=8, max_size=60).map(lambda rest: b"\0\1\0\0\x21\x12\xa4\x42" + rest),
)
_DATAGRAMS = st.tuples(_HEADERS, _PAYLOADS).map(
    lambda both: HEADER.pack(both[0][0], len(both[1]) if both[0][1] is None else both[0][1]) + both[1]
)


@settings(max_examples=examples(200))
@given(batches=st.lists(st.tuples(st.binary(max_size=400) | _DATAGRAMS, st.integers(1, 200)), max_size=8))
def test_any_batch_from_a_relays_address_is_taken_in_without_error(
    shared: tuple[Internet, Host, Host], batches: list[tuple[bytes, int]]
) -> None:
    internet, client, _gateway = shared
    for data, segment_size in batches:
        if data:
            relay = internet.relays[0].listening[0]
            client.take_in(data, min(segment_size, len(data)), relay, client.addresses[0])
            client.take_in(data, len(data), relay, client.addresses[0])
    assert client.packets == []
    assert client.node.next_timeout() is not None
    assert client.of(ConnectionFailed) == []


@settings(max_examples=examples(150))
@given(data=st.data())
def test_changed_channel_data_delivers_only_sent_packets(
    shared: tuple[Internet, Host, Host], data: st.DataObject
) -> None:
    internet, client, gateway = shared
    internet.run(0.5)  # `sealed` silences the relay: without time to answer in between, it would count as broken
    gateway.packets.clear()
    batch = sealed(internet, client, gateway, *(datagram(str(number)) for number in range(4)))
    whole = bytearray(b"".join(batch))
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)))):
        whole[position] = value
    cut = data.draw(st.integers(1, len(whole)))

    gateway.take_in(bytes(whole[:cut]), len(batch[0]), internet.relays[0].listening[0], gateway.addresses[0])

    assert gateway.texts() == [text for text in ["0", "1", "2", "3"] if text in gateway.texts()]


def test_the_connection_still_works_afterwards_and_no_slot_is_lost(shared: tuple[Internet, Host, Host]) -> None:
    internet, client, gateway = shared
    client.packets.clear()
    exchange(internet, client, gateway, within=20.0)
    gateway.packets.clear()
    client.send(gateway, run_of_segments(segments=40))
    internet.run(0.1)
    assert [packet.segments for _, packet in gateway.packets] == [40]
    assert_no_slot_is_lost([client, gateway])


@pytest.fixture(scope="module")
def shared() -> tuple[Internet, Host, Host]:
    """A connection that has to survive everything that the tests above send."""
    return relayed()

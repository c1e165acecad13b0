"""Peers without a direct path connect through relays: channels carry everything that a direct path does."""

from __future__ import annotations

import struct

import pytest

from firezone_tunnel.core.packet.rewrite import CE
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionEstablished, ConnectionFailed, PathChanged, Role
from firezone_tunnel.core.wireguard.cookie import HANDSHAKES_PER_SECOND
from tests.simulation.internet import Internet, Relay, exchange, longest_gap, ping, way
from tests.unit.core.snownet.world import LATENCY, Host, assert_no_slot_is_lost, datagram, run_of_segments

_ECT0 = 2
_INITIATION, _COOKIE = b"\1\0\0\0", b"\3\0\0\0"
_STRANGER = SocketAddress("203.0.113.200", 4000)
_WAYS = ("one relay", "two relays", "relay to relay", "client's only", "gateway's only")


def _introduced(topology: str = "one relay", *, ahead: float = 1.0) -> tuple[Internet, Host, Host]:
    """A client and a gateway that got their relays `ahead` seconds before they were introduced to each other."""
    internet = Internet()
    first = internet.relay()
    both: list[Relay] = [first] if topology == "one relay" else [first, internet.relay()]
    of_client, of_gateway = both, both
    client_nat = gateway_nat = "udp-blocked"
    match topology:
        case "relay to relay":
            of_client, of_gateway = both[:1], both[1:]
        case "client's only":
            of_gateway, gateway_nat = [], "none"
        case "gateway's only":
            of_client, client_nat = [], "none"
    client = internet.host_behind(client_nat, Role.CLIENT, relays=of_client)
    gateway = internet.host_behind(gateway_nat, Role.GATEWAY, relays=of_gateway)
    internet.run(ahead)
    internet.introduce(client, gateway)
    return internet, client, gateway


def relayed(topology: str = "one relay") -> tuple[Internet, Host, Host]:
    """A relayed connection that has carried packets both ways."""
    internet, client, gateway = _introduced(topology)
    exchange(internet, client, gateway, within=2.0)
    internet.run(1.0)
    assert (way(client, gateway), way(gateway, client)) == ("relayed", "relayed")
    for host in (client, gateway):
        host.packets.clear()
        host.sent.clear()
    for relay in internet.relays:
        relay.batches.clear()
    internet.arrived.clear()
    return internet, client, gateway


@pytest.mark.parametrize("topology", _WAYS)
@pytest.mark.parametrize("ahead", [0.0, 0.05, 1.0])
def test_packets_sent_before_there_is_a_path_all_arrive_in_order(topology: str, ahead: float) -> None:
    internet, client, gateway = _introduced(topology, ahead=ahead)
    for number in range(20):
        client.send(gateway, datagram(str(number)))

    took = internet.run_until(lambda: len(gateway.texts()) == 20, within=0.5)
    assert gateway.texts() == [str(number) for number in range(20)]
    internet.run(1.0)
    gateway.send(client, *(datagram(str(number)) for number in range(20)))
    internet.run(0.1)

    assert client.texts() == [str(number) for number in range(20)]
    assert (way(client, gateway), way(gateway, client)) == ("relayed", "relayed")
    one_way = 0.06 if topology == "relay to relay" else 0.04
    allocating = max(0.0, 0.12 - ahead)  # BINDING, ALLOCATE and again ALLOCATE
    assert (
        took < allocating + LATENCY + 5 * one_way + 0.015
    )  # the introduction, a check, the handshake and the packet itself


@pytest.mark.parametrize(("near", "far"), [(0.005, 0.06), (0.06, 0.005)])
def test_a_relay_near_to_one_side_and_far_from_the_other_costs_no_extra_wait(near: float, far: float) -> None:
    internet, client, gateway = _introduced()
    latency = {client.name: near, gateway.name: far}
    internet.delay = lambda sender: latency[sender.name]
    client.send(gateway, datagram("first"))

    took = internet.run_until(lambda: bool(gateway.texts()), within=1.0)

    # Each of the first packet, the handshake before it and the check before that takes these; less than a resent check.
    assert took < 0.02 + 3 * 2 * (near + far) + 0.05


@pytest.mark.parametrize("segments", [2, 50])
@pytest.mark.parametrize("topology", _WAYS)
def test_a_run_stays_one_batch_on_the_whole_way(topology: str, segments: int) -> None:
    internet, client, gateway = relayed(topology)
    for sender, receiver in ((client, gateway), (gateway, client)):
        sent = run_of_segments(segments=segments)
        for relay in internet.relays:
            relay.batches.clear()
        internet.arrived.clear()

        sender.send(receiver, sent)
        internet.run(0.1)

        at_relays = [batch for relay in internet.relays for batch in relay.batches if len(batch[1]) > batch[0]]
        arrived = [
            datagrams for _, host, _, datagrams, _ in internet.arrived if host is receiver and len(datagrams) > 1
        ]
        sends = [datagrams for datagrams in arrived if len(datagrams) == segments]
        assert len(sends) == len(arrived) == 1
        assert all(len(data) == segments * size for size, data, _ in at_relays)
        if topology in {"one relay", "relay to relay"}:
            (header,) = dict.fromkeys(data[:4] for data in arrived[0])
            channel, length = struct.unpack(">HH", header)
            assert 0x4000 <= channel <= 0x4FFF
            assert length == len(arrived[0][0]) - 4
        ((name, packet),) = receiver.packets
        assert name == sender.name
        assert [bytes(packet.segment(i).data) for i in range(packet.segments)] == [
            bytes(sent.segment(i).data) for i in range(segments)
        ]
    assert_no_slot_is_lost([client, gateway])


def test_a_run_with_a_shorter_last_segment_and_lone_packets_around_it_keep_their_order() -> None:
    internet, client, gateway = relayed()
    for sender, receiver in ((client, gateway), (gateway, client)):
        sender.send(receiver, datagram("1"), datagram("2"), run_of_segments(segments=9), datagram("3", size=77))
        internet.run(0.1)

        assert [packet.segments for _, packet in receiver.packets if packet.segment_size][-1] == 9
        assert [len(bytes(packet.data)) for _, packet in receiver.packets][-1] == 77


def test_lone_packets_of_a_turn_leave_as_one_send() -> None:
    internet, client, gateway = relayed()

    client.send(gateway, *(datagram(str(number)) for number in range(30)))
    internet.run(0.1)

    assert gateway.texts() == [str(number) for number in range(30)]
    assert [len(data) // size for size, data, _ in internet.relays[0].batches if len(data) // size > 1] == [30]


def test_ecn_is_carried_outside_and_congestion_on_the_way_is_marked_inside() -> None:
    internet, client, gateway = relayed()
    for sender, receiver in ((client, gateway), (gateway, client)):
        internet.congested = False
        sender.send(receiver, datagram("clear", ecn=_ECT0), run_of_segments(segments=5, ecn=_ECT0))
        internet.run(0.1)
        assert {packet.ecn for _, packet in receiver.packets} == {_ECT0}
        receiver.packets.clear()

        internet.congested = True
        sender.send(receiver, datagram("full", ecn=_ECT0), run_of_segments(segments=5, ecn=_ECT0), datagram("deaf"))
        internet.run(0.1)
        assert [packet.ecn for _, packet in receiver.packets] == [CE, CE, 0]


def test_a_connection_without_packets_lives_on_keepalives_and_its_session_is_renewed() -> None:
    internet, client, gateway = relayed()

    internet.run(400.0)

    initiations = [at for at, data in client.sent if _inner(data).startswith(_INITIATION)]
    assert 2 <= len(initiations) <= 4
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert exchange(internet, client, gateway, within=1.0) < 0.3


def test_a_gateway_under_load_demands_a_cookie_through_the_relay_and_believes_it() -> None:
    internet, client, gateway = _introduced()
    client.send(gateway, datagram("first"))
    internet.run(1.0)
    initiation = next(_inner(data) for _, data in client.sent if _inner(data).startswith(_INITIATION))
    late = internet.host_behind("udp-blocked", Role.CLIENT, name="late")
    internet.run(1.0)
    gateway.sent.clear()

    internet.introduce(late, gateway)
    late.send(gateway, datagram("late"))
    for _ in range(60):
        for _ in range(HANDSHAKES_PER_SECOND + 5):
            internet.inject(gateway, [initiation], _STRANGER)
        internet.run(0.1)

    cookies = [data for _, data in gateway.sent if _inner(data).startswith(_COOKIE) and data[:1] == b"\x40"]
    assert len(cookies) == 1
    assert gateway.texts(late) == ["late"]


def test_when_the_direct_path_opens_the_connection_takes_it_and_loses_no_packet() -> None:
    internet = Internet()
    internet.relay()
    client, gateway = (internet.host_behind("cone", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.direct = False
    internet.introduce(client, gateway)
    exchange(internet, client, gateway, within=2.0)
    assert (way(client, gateway), way(gateway, client)) == ("relayed", "relayed")
    client.packets.clear()
    gateway.packets.clear()

    for number in range(200):
        internet.direct = number > 60
        client.send(gateway, datagram(str(number)))
        gateway.send(client, datagram(str(number)))
        internet.run(0.05)
    internet.run(0.1)

    assert (way(client, gateway), way(gateway, client)) == ("direct", "direct")
    assert client.texts() == gateway.texts() == [str(number) for number in range(200)]
    for host in (client, gateway):
        assert len(host.of(ConnectionEstablished)) == 1
        assert [event.path for event in host.of(PathChanged)][-1:] == ["direct"]


def test_when_the_direct_path_dies_the_connection_goes_on_through_the_relay() -> None:
    internet = Internet()
    internet.relay()
    client, gateway = (internet.host_behind("cone", role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    exchange(internet, client, gateway, within=2.0)
    ping(internet, client, gateway, seconds=10.0)
    assert (way(client, gateway), way(gateway, client)) == ("direct", "direct")

    internet.direct = False
    start = internet.now
    answers = ping(internet, client, gateway, seconds=20.0)

    assert longest_gap(answers, start, internet.now) < 5.0
    assert (way(client, gateway), way(gateway, client)) == ("relayed", "relayed")
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert_no_slot_is_lost([client, gateway])


def _inner(sent: bytes) -> bytes:
    """The payload of channel data. Other datagrams are returned unchanged."""
    return sent[4:] if 0x40 <= sent[0] <= 0x4F else sent

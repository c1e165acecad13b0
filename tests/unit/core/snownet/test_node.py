"""A client and a gateway: connecting, the first packets, staying connected, idling, replacing and closing."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.ice.agent import Credentials
from firezone_tunnel.core.ice.candidate import parse_sdp
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionFailed,
    NewCandidates,
    PairNominated,
    PathChanged,
)
from firezone_tunnel.core.tunnel import control
from firezone_tunnel.errors import ProtocolError
from tests.unit.core.snownet.world import (
    DATA,
    INITIATION,
    LATENCY,
    RESPONSE,
    World,
    assert_no_slot_is_lost,
    assert_traffic_flows,
    connected,
    credentials,
    datagram,
    everything,
    nothing,
    run_of_segments,
)

# Connecting


def test_the_first_packet_arrives_within_a_few_round_trips() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, datagram("hello"))

    took = world.run_until(lambda: gateway.texts() == ["hello"], within=1.0)

    assert took <= 10 * LATENCY
    assert client.is_established(gateway)
    assert gateway.is_established(client)
    assert_no_slot_is_lost(world.hosts.values())


def test_an_established_connection_is_reported_once_with_its_path() -> None:
    _world, client, gateway = connected(seconds=60.0)

    assert client.of(ConnectionEstablished) == [
        ConnectionEstablished("gateway", "direct", client.addresses[0], gateway.addresses[0])
    ]
    assert len(gateway.of(ConnectionEstablished)) == 1
    assert client.of(PathChanged) == []
    ours, theirs = client.addresses[0], gateway.addresses[0]
    assert client.of(PairNominated) == [PairNominated("gateway", "host", ours, "host", theirs)]
    assert gateway.of(PairNominated) == [PairNominated("client", "host", theirs, "host", ours)]


def test_candidates_are_signalled_best_first_and_with_our_ufrag() -> None:
    world = World()
    client, gateway = world.client("client", "10.0.1.1", "10.0.1.2", "2001:db8::1"), world.gateway()
    world.introduce_to(client, gateway)

    ((announced,),) = [event.candidates for event in client.of(NewCandidates)] and [client.of(NewCandidates)]
    read = [parse_sdp(text) for text in announced.candidates]
    assert [candidate.address.host for candidate in read if candidate] == ["2001:db8::1", "10.0.1.1", "10.0.1.2"]
    assert {candidate.ufrag for candidate in read if candidate} == {credentials(client, gateway).ufrag}


def test_only_the_client_makes_the_first_handshake() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    gateway.send(client, datagram("too early"))
    world.run(5.0)

    assert len(client.messages(INITIATION)) == 1
    assert gateway.messages(INITIATION) == []
    assert len(gateway.messages(RESPONSE)) == 1
    assert gateway.node.counters.packets_unconnected == 1
    assert client.texts() == []


def test_a_datagram_that_comes_twice_is_delivered_once_and_counted_even_when_its_connection_is_gone() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, datagram("once"))
    world.run(1.0)
    sealed = [data for _, data in client.sent if data.startswith(b"\4\0\0\0")][-1]

    gateway.handle([sealed, sealed], *client.path(gateway))
    gateway.node.close_connection(client.name, world.now)

    assert gateway.texts() == ["once"]
    assert gateway.node.layers.wireguard.replayed == 2


def test_a_gateway_with_a_path_still_waits_for_the_clients_handshake() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.lose = lambda sender, data: data[:4] == b"\1\0\0\0"
    world.introduce(client, gateway)
    world.run(2.0)
    assert client.messages(INITIATION) != []
    for _ in range(10):
        gateway.send(client, datagram("not yet"))
        world.run(0.5)

    assert gateway.messages(INITIATION) == []
    assert gateway.node.counters.packets_unconnected == 10


def test_a_handshake_that_overtakes_the_gateways_nomination_is_answered_once_there_is_a_path() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    # The gateway's checks, and so the USE-CANDIDATE to it, are lost until the client's first initiation has arrived.
    world.lose = lambda sender, data: sender is client and b"\x00\x25\x00\x00" in data[20:]
    client.send(gateway, datagram("hello"))
    world.run(1.5)
    assert client.messages(INITIATION) != []
    assert gateway.messages(RESPONSE) == []

    world.lose = nothing
    world.run_until(lambda: gateway.texts() == ["hello"], within=3.0)


def test_waiting_packets_are_sent_in_order_and_the_oldest_of_more_than_128_are_dropped() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, *[datagram(str(number)) for number in range(70)])
    client.send(gateway, *[datagram(str(number)) for number in range(70, 140)])
    world.run(2.0)

    assert gateway.texts() == [str(number) for number in range(12, 140)]
    assert client.node.counters.packets_overwritten == 12
    assert_no_slot_is_lost(world.hosts.values())


def test_a_packet_that_waits_is_kept_though_its_memory_is_used_again() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    packet = datagram("mine")
    client.send(gateway, packet)
    packet.data[:] = bytes(len(packet.data))
    world.run(2.0)

    assert gateway.texts() == ["mine"]


def test_super_packets_and_lone_ones_keep_their_order() -> None:
    world, client, gateway = connected()

    client.send(gateway, datagram("1"), datagram("2"), run_of_segments(segments=3), datagram("3"))
    world.run(0.1)

    kinds = [packet.protocol for _, packet in gateway.packets for _ in range(packet.segments)]
    assert kinds == [17, 17, 6, 6, 6, 17]


def test_a_worthless_public_key_is_refused_and_the_older_connection_goes_on() -> None:
    world, client, gateway = connected()

    with pytest.raises(ProtocolError):
        client.node.upsert_connection(
            "gateway",
            remote_public_key=bytes(32),
            preshared_key=bytes(32),
            local=Credentials("a", "b"),
            remote=Credentials("c", "d"),
            now=world.now,
            utc_now=world.utc,
        )

    assert_traffic_flows(world, client, gateway)


# Repeated and changed terms


def test_the_same_terms_keep_the_connection_and_repeat_the_candidates() -> None:
    world, client, gateway = connected(seconds=3.0)
    announced = len(client.of(NewCandidates))
    data = len(client.messages(INITIATION))

    world.introduce(client, gateway)
    client.send(gateway, datagram("still here"))
    world.run(LATENCY)

    assert gateway.texts() == ["still here"]
    assert len(client.of(NewCandidates)) == announced + 1
    assert client.of(NewCandidates)[-1] == client.of(NewCandidates)[0]
    assert len(client.messages(INITIATION)) == data  # 20 s have not passed
    assert len(client.of(ConnectionEstablished)) == 1


def test_the_same_terms_make_the_client_renew_a_handshake_of_more_than_20_seconds_ago() -> None:
    world, client, gateway = connected(seconds=25.0)

    world.introduce(client, gateway)
    world.run(1.0)

    assert len(client.messages(INITIATION)) == 2
    assert gateway.messages(INITIATION) == []
    assert_traffic_flows(world, client, gateway)


def test_other_terms_replace_the_connection() -> None:
    world, client, gateway = connected(seconds=3.0)

    world.introduce(client, gateway, generation="2")
    client.send(gateway, datagram("over the new one"))
    world.run(2.0)

    assert gateway.texts() == ["over the new one"]
    assert len(client.of(ConnectionEstablished)) == 2
    assert client.of(ConnectionClosed) == client.of(ConnectionFailed) == []


def test_other_terms_block_packets_of_the_old_connection() -> None:
    world, client, gateway = connected(seconds=3.0)

    world.introduce_to(gateway, client, generation="2")
    client.send(gateway, datagram("over the old one"))
    world.run(1.0)

    assert gateway.texts() == []
    assert gateway.node.counters.unknown_sessions == 1


@pytest.mark.parametrize("preshared_key", [b"\1" * 32])
def test_different_preshared_keys_never_connect(preshared_key: bytes) -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce_to(gateway, client)
    world.introduce_to(client, gateway, preshared_key=preshared_key)
    start = world.now
    world.run(30.0)

    at, reason = client.failure()
    assert reason == "no answer to a handshake for 15 s"
    assert 15.0 <= at - start <= 17.0
    assert client.of(ConnectionEstablished) == gateway.of(ConnectionEstablished) == []


def test_a_gateway_that_was_restarted_is_connected_to_anew() -> None:
    world, client, _gateway = connected(seconds=30.0)

    again = world.gateway()  # another key, nothing remembered
    world.introduce(client, again)
    client.send(again, datagram("hello again"))
    took = world.run_until(lambda: again.texts() == ["hello again"], within=1.0)

    assert took <= 10 * LATENCY
    assert client.of(ConnectionFailed) == []
    assert_traffic_flows(world, client, again)


def test_a_client_that_was_restarted_is_let_in_again() -> None:
    world, _client, gateway = connected(seconds=30.0)

    again = world.client()
    world.introduce(again, gateway)
    again.send(gateway, datagram("hello again"))
    world.run(1.0)

    assert gateway.texts() == ["hello again"]
    assert_traffic_flows(world, again, gateway)


# Staying connected


def test_a_connection_without_traffic_stays_usable_for_an_hour() -> None:
    world, client, gateway = connected()

    for _ in range(12):
        world.run(300.0)
        assert_traffic_flows(world, client, gateway)

    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []


def test_a_connection_with_traffic_renews_its_session_without_losing_a_packet() -> None:
    world, client, gateway = connected()

    for number in range(400):
        client.send(gateway, datagram(str(number)))
        gateway.send(client, datagram(str(number)))
        world.run(1.0)

    assert gateway.texts() == client.texts() == [str(number) for number in range(400)]
    assert len(client.messages(INITIATION)) >= 4


def test_after_20_seconds_without_packets_checks_become_rare_and_a_packet_makes_them_frequent() -> None:
    world, client, gateway = connected()
    world.run(15.0)
    before = _checks_within(world, 4.0)
    world.run(20.0)
    during = _checks_within(world, 100.0)

    client.send(gateway, datagram("wake up"))
    world.run(LATENCY)
    assert gateway.texts() == ["wake up"]
    world.run(2.0)
    after = _checks_within(world, 4.0)

    assert 2 <= before[0] <= 4
    assert during[0] == during[1] == 4
    assert 2 <= after[0] <= 4
    assert 2 <= after[1] <= 4


def test_an_idle_connection_wakes_on_a_packet_of_the_other_side() -> None:
    world, client, gateway = connected()
    world.run(60.0)

    gateway.send(client, datagram("wake up"))
    world.run(2.0)

    assert client.texts() == ["wake up"]
    assert 2 <= _checks_within(world, 4.0)[0] <= 4


def test_an_idle_connection_wakes_on_the_packet_that_confirms_a_new_session() -> None:
    world, client, gateway = connected(seconds=60.0)
    # The client renews its session at 180 s; the keepalive that should show it to the gateway is lost.
    world.lose = lambda sender, data: sender is client and data[0] == DATA and len(data) == 32
    world.run_until(lambda: len(gateway.messages(RESPONSE)) == 2, within=200.0)
    world.run(1.0)

    client.send(gateway, datagram("wake up"))
    world.run(2.0)

    assert gateway.texts() == ["wake up"]
    assert 2 <= _checks_within(world, 4.0)[1] <= 4


def test_keepalives_and_checks_do_not_keep_a_connection_from_being_idle() -> None:
    world, client, gateway = connected()
    world.run(19.0)  # a passive keepalive was due after 10
    assert len(client.messages(DATA)) + len(gateway.messages(DATA)) > 2

    world.run(10.0)

    assert _checks_within(world, 100.0) == (4, 4)


def test_every_timeout_has_a_reason_and_none_is_in_the_past() -> None:
    world, client, gateway = connected()
    for _ in range(500):
        world.run(0.37)
        for host in (client, gateway):
            timeout = host.node.next_timeout()
            assert timeout is not None
            assert timeout.reason
            assert timeout.at >= world.now - 1e-9


def test_an_idle_connection_wakes_its_host_up_less_than_once_in_5_seconds() -> None:
    world, client, _gateway = connected(seconds=60.0)
    calls = 0
    handle_timeout = client.handle_timeout

    def counted() -> None:
        nonlocal calls
        calls += 1
        handle_timeout()

    client.handle_timeout = counted
    world.run(600.0)

    assert calls < 120


# Failing


def test_without_candidates_of_the_other_side_it_fails_after_10_seconds() -> None:
    world = World()
    world.portal_is_up = False
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    start = world.now
    world.run(20.0)

    for host in (client, gateway):
        assert host.failure() == (start + 10.0, "no candidates of the other side")
        assert not host.node.has_connection("client")
        assert not host.node.has_connection("gateway")
        assert host.node.next_timeout() is None


def test_without_an_answer_it_fails_two_seconds_after_the_checks_end() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)
    client.send(gateway, *[datagram(str(number)) for number in range(10)])
    world.lose = everything
    start = world.now
    world.run(30.0)

    for host in (client, gateway):
        at, reason = host.failure()
        assert at - start == pytest.approx(LATENCY + 15.25 + 2.0)
        assert reason == "no path answers any longer"
    assert_no_slot_is_lost(world.hosts.values())


def test_a_peer_that_vanishes_is_noticed_within_20_seconds() -> None:
    world, client, gateway = connected(seconds=5.0)
    gateway.is_gone = True
    start = world.now
    for _ in range(200):
        client.send(gateway, datagram("anyone?"), run_of_segments(segments=10))
        world.run(0.1)

    at, reason = client.failure()
    assert 15.25 < at - start <= 15.25 + 1.5 + 2.0 + 0.1
    assert reason == "no path answers any longer"
    assert client.node.counters.packets_without_connection > 0
    assert_no_slot_is_lost([client])


def test_a_peer_that_vanishes_while_idle_is_noticed_soon_after_there_is_traffic() -> None:
    world, client, gateway = connected(seconds=60.0)
    gateway.is_gone = True
    world.run(30.0)

    client.send(gateway, datagram("anyone?"))

    world.run_until(lambda: client.of(ConnectionFailed) != [], within=20.0)


def test_an_outage_shorter_than_the_grace_costs_no_connection() -> None:
    world, client, gateway = connected(seconds=30.0)
    client.send(gateway, datagram("busy"))
    world.lose = everything
    world.run(14.0)
    world.lose = nothing
    world.run(3.0)

    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert_traffic_flows(world, client, gateway)


def test_after_a_failure_the_same_terms_connect_again() -> None:
    world, client, gateway = connected(seconds=5.0)
    client.send(gateway, datagram("busy"))
    world.lose = everything
    world.run_until(lambda: client.of(ConnectionFailed) != [] and gateway.of(ConnectionFailed) != [], within=60.0)
    world.lose = nothing

    world.introduce(client, gateway)
    client.send(gateway, datagram("again"))
    world.run(2.0)

    assert gateway.texts()[-1] == "again"
    assert_traffic_flows(world, client, gateway)


def test_a_connection_that_is_gone_leaves_no_session_index_behind() -> None:
    world, client, gateway = connected(seconds=400.0)
    for generation in range(5):
        world.introduce(client, gateway, generation=str(generation))
        client.send(gateway, datagram("hello"))
        world.run(1.0)
    assert 1 <= len(gateway.node._directory._by_index) <= 2
    world.lose = everything
    world.run(200.0)

    for host in (client, gateway):
        assert len(host.of(ConnectionFailed)) == 1
        assert host.node._directory._by_index == {}
        assert host.node._directory._by_ufrag == host.node._directory._by_transaction == {}


# Closing


def test_closing_is_reported_and_leaves_nothing_to_do() -> None:
    world, client, _gateway = connected()

    client.node.close_connection("gateway", world.now)
    client.drain()

    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]
    assert client.node.next_timeout() is None
    assert not client.node.has_connection("gateway")
    client.node.close_connection("gateway", world.now)
    client.drain()
    assert len(client.of(ConnectionClosed)) == 1


def test_a_goodbye_is_the_last_packet_that_arrives() -> None:
    world, client, gateway = connected()

    client.node.close_connection("gateway", world.now, farewell=control.encode(control.Goodbye()))
    client.drain()
    world.run(LATENCY)

    ((peer_id, packet),) = gateway.packets
    assert peer_id == "client"
    assert control.is_control(packet)
    assert control.decode(packet) == control.Goodbye()


def test_a_goodbye_is_not_sent_without_a_path() -> None:
    world = World()
    client, gateway = world.client(), world.gateway()
    world.introduce(client, gateway)

    client.node.close_connection("gateway", world.now, farewell=control.encode(control.Goodbye()))
    client.drain()
    world.run(15.0)

    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]
    assert gateway.packets == []


def test_a_reset_says_goodbye_to_all_closes_all_and_makes_another_key() -> None:
    world = World()
    client = world.client()
    gateways = [world.gateway("gateway", "10.0.2.1"), world.gateway("other", "10.0.3.1")]
    for gateway in gateways:
        world.introduce(client, gateway)
        client.send(gateway, datagram("hello"))
    world.run(2.0)
    key = client.node.public_key
    client.node.encapsulate("gateway", run_of_segments(segments=20), world.now, world.utc)

    client.node.reset(world.now, farewell=control.encode(control.Goodbye()))
    client.drain()
    world.run(LATENCY)

    assert client.node.public_key != key
    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway"), ConnectionClosed("other")]
    for gateway in gateways:
        assert control.decode(gateway.packets[-1][1]) == control.Goodbye()
    assert client.node.next_timeout() is None
    assert_no_slot_is_lost(world.hosts.values())


def test_after_a_reset_it_connects_with_the_new_key() -> None:
    world, client, gateway = connected(seconds=30.0)
    client.move("10.0.7.1")
    client.node.reset(world.now)
    client.drain()

    world.introduce(client, gateway)
    client.send(gateway, datagram("from elsewhere"))
    took = world.run_until(lambda: gateway.texts() == ["from elsewhere"], within=1.0)

    assert took <= 10 * LATENCY
    assert client.path(gateway)[0] == SocketAddress("10.0.7.1", 52625)


def test_packets_for_unknown_peers_are_counted() -> None:
    world, client, gateway = connected()

    client.node.encapsulate("unknown", run_of_segments(segments=4), world.now, world.utc)
    client.node.add_remote_candidate("unknown", "candidate:1 1 udp 1 10.0.0.1 1 typ host", world.now)
    client.node.add_remote_candidate("gateway", "candidate:nonsense", world.now)
    client.node.remove_remote_candidate("unknown", "candidate:1 1 udp 1 10.0.0.1 1 typ host", world.now)
    client.node.remove_remote_candidate("gateway", "candidate:nonsense", world.now)

    assert client.node.counters.packets_without_connection == 4
    assert client.node.counters.candidates_without_connection == 1
    assert client.node.counters.candidates_rejected == 1
    assert_traffic_flows(world, client, gateway)


def _checks_within(world: World, seconds: float) -> tuple[int, int]:
    """The number of checks that client and gateway sent while time passed."""
    client, gateway = world.hosts["client"], world.hosts["gateway"]
    start = world.now
    world.run(seconds)
    return tuple(
        sum(1 for at, data in host.sent if at > start and data[:2] == b"\0\1" and data[4:8] == b"\x21\x12\xa4\x42")
        for host in (client, gateway)
    )

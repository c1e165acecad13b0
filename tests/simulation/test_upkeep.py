"""Relayed connections stay alive for hours, and allocations are released when connections or relays end."""

from __future__ import annotations

import pytest

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionFailed, InvalidatedCandidates, PathChanged, Role
from firezone_tunnel.core.snownet.relays import RelayAllocated, RelayFailed
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Method
from tests.simulation.internet import Internet, exchange, longest_gap, ping, way
from tests.unit.core.snownet.world import Host, assert_no_slot_is_lost, datagram, run_of_segments


def relayed(*, relays: int = 1, nat: str = "udp-blocked") -> tuple[Internet, Host, Host]:
    internet = Internet()
    for _ in range(relays):
        internet.relay()
    client, gateway = (internet.host_behind(nat, role) for role in (Role.CLIENT, Role.GATEWAY))
    internet.introduce(client, gateway)
    exchange(internet, client, gateway, within=2.0)
    assert way(client, gateway) == way(gateway, client) == "relayed"
    client.packets.clear()
    gateway.packets.clear()
    return internet, client, gateway


def requests(host: Host, method: Method) -> list[float]:
    """The times at which a host sent these requests to its relays."""
    found = [(at, stun.parse(data)) for at, data in host.sent if data[:1] == b"\0"]
    return [at for at, message in found if message is not None and message.method == method]


def test_twenty_minutes_of_traffic_outlive_channels_permissions_and_sessions_without_a_lost_packet() -> None:
    internet, client, gateway = relayed(nat="symmetric")
    for number in range(1200):
        client.send(gateway, datagram(str(number)))
        gateway.send(client, datagram(str(number)))
        internet.run(1.0)

    everything = [str(number) for number in range(1200)]
    assert gateway.texts(client) == everything
    assert client.texts(gateway) == everything
    assert len(requests(client, Method.CHANNEL_BIND)) > 4
    assert len(client.of(RelayAllocated)) == 2
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert_no_slot_is_lost([client, gateway])


def test_an_hour_without_traffic_keeps_allocation_and_connection_for_few_wake_ups() -> None:
    internet, client, gateway = relayed(relays=2)
    internet.run(60.0)
    client.sent.clear()
    client.wake_ups = 0

    internet.run(3600.0)

    assert client.wake_ups < 3600 / 2
    assert len(requests(client, Method.REFRESH)) == pytest.approx(2 * 3600 / 300, abs=2)
    assert len(client.of(RelayAllocated)) == 2 * 2
    assert [relay.server.allocations for relay in internet.relays] == [2, 2]
    start = internet.now
    exchange(internet, client, gateway, within=1.0)
    assert internet.now - start < 0.4
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []


@pytest.mark.parametrize("waker", ["client", "gateway"])
def test_an_idle_relayed_connection_wakes_at_the_first_packet(waker: str) -> None:
    internet, client, gateway = relayed()
    internet.run(150.0)
    host, peer = (client, gateway) if waker == "client" else (gateway, client)
    checks = len(host.sent)
    internet.run(24.0)
    assert len(host.sent) - checks <= 6

    host.send(peer, datagram("wake"))
    internet.run(0.2)  # time for a handshake, if the last session is over just now

    assert peer.texts(host) == ["wake"]
    checks = len(host.sent)
    internet.run(6.0)
    assert len(host.sent) - checks >= 4


@pytest.mark.parametrize("minutes", [6, 11, 16, 31])
def test_a_channel_that_expired_with_its_idle_peer_is_bound_again_when_needed(minutes: int) -> None:
    internet, client, gateway = relayed()
    internet.run(minutes * 60.0)

    exchange(internet, client, gateway, within=1.0)

    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []


def test_a_channel_left_to_expire_is_kept_after_all_if_its_peer_speaks() -> None:
    internet, client, _gateway = relayed()
    peer = SocketAddress("203.0.113.99", 5000)
    client.node.add_remote_candidate("gateway", f"candidate:1 1 udp 1 {peer.host} {peer.port} typ srflx", internet.now)
    client.drain()
    internet.run(400.0)
    before = len(requests(client, Method.CHANNEL_BIND))
    internet.run(10.0)
    assert len(requests(client, Method.CHANNEL_BIND)) == before

    relayed_address = next(event.address for event in client.of(RelayAllocated))
    internet._send([b"hello"], peer, relayed_address, 0, 0.02)
    internet.run(1.1)

    assert len(requests(client, Method.CHANNEL_BIND)) == before + 1


def test_a_packet_that_finds_its_channel_expired_asks_for_it_and_follows_right_behind() -> None:
    internet, client, gateway = relayed()
    ping(internet, client, gateway, seconds=5.0)
    gateway.packets.clear()
    client.sent.clear()
    for allocation in client.node._relays._allocations.values():
        for binding in allocation._grant.channels._bindings.values():
            binding.bound_at = internet.now - 700.0

    client.send(gateway, datagram("late"))

    assert requests(client, Method.CHANNEL_BIND) == [internet.now]
    assert [data[:1] for _, data in client.sent] == [b"\0", b"\x40"]
    internet.run(0.1)
    assert gateway.texts() == ["late"]


def test_a_gateway_whose_sockets_moved_restarts_its_relays_and_keeps_its_connections() -> None:
    internet, client, gateway = relayed(relays=2)
    ping(internet, client, gateway, seconds=10.0)
    start = internet.now
    old = gateway.addresses[0]

    internet.rebind(gateway, SocketAddress("10.0.77.1", 52626))
    answers = ping(internet, client, gateway, seconds=10.0)

    assert longest_gap(answers, start, internet.now) < 2.0
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    gone = [text for event in gateway.of(InvalidatedCandidates) for text in event.candidates]
    assert {text.split()[7] for text in gone} == {"host", "srflx", "relay"}
    assert any(old.host in text for text in gone)
    assert gateway.path(client)[0] != client.path(gateway)[0]


def test_a_gateway_that_moves_while_direct_is_direct_again_at_once() -> None:
    internet = Internet()
    internet.relay(), internet.relay()
    client, gateway = internet.host_behind("cone", Role.CLIENT), internet.host_behind("cone", Role.GATEWAY)
    internet.introduce(client, gateway)
    ping(internet, client, gateway, seconds=10.0)
    start = internet.now

    internet.rebind(gateway, SocketAddress("10.0.77.1", 52625))
    answers = ping(internet, client, gateway, seconds=10.0)

    assert longest_gap(answers, start, internet.now) < 2.0
    assert way(client, gateway) == way(gateway, client) == "direct"


def test_a_client_that_resets_forgets_relays_and_connects_anew_with_another_key() -> None:
    internet, client, gateway = relayed(relays=2)
    key = client.node.public_key
    client.node.reset(internet.now)
    client.drain()
    client.move("10.0.88.1")
    internet.announce_relays(client, internet.relays)

    internet.introduce(client, gateway)
    start = internet.now
    exchange(internet, client, gateway, within=2.0)

    assert client.node.public_key != key
    assert internet.now - start < 0.6


def test_closing_says_goodbye_through_the_relay_and_gives_allocations_back() -> None:
    internet, client, gateway = relayed(relays=2)
    goodbye = datagram("goodbye")

    client.node.close(internet.now, farewell=bytes(goodbye.data))
    client.drain()
    internet.run(0.1)

    assert gateway.texts(client) == ["goodbye"]
    assert [relay.server.allocations for relay in internet.relays] == [1, 1]
    assert client.node.next_timeout() is None
    gateway.node.close(internet.now)
    gateway.drain()
    internet.run(0.1)
    assert [relay.server.allocations for relay in internet.relays] == [0, 0]


def test_a_closed_connection_leaves_the_allocation_to_others() -> None:
    internet, _client, gateway = relayed()
    late = internet.host_behind("udp-blocked", Role.CLIENT, name="late")
    internet.introduce(late, gateway)
    exchange(internet, late, gateway, within=2.0)

    gateway.node.close_connection("client", internet.now)
    gateway.drain()
    internet.run(5.0)

    exchange(internet, late, gateway, within=1.0)


def test_a_dropped_allocation_that_a_path_still_leads_through_swallows_packets_and_nothing_else() -> None:
    internet, client, gateway = relayed()

    internet.announce_relays(client, [], gone=internet.relays)
    for _ in range(20):
        client.send(gateway, run_of_segments(segments=20), datagram("lone"), run_of_segments(segments=3))
        gateway.send(client, run_of_segments(segments=20), datagram("lone"))
        internet.run(0.05)
    assert gateway.texts() == client.texts() == []
    assert_no_slot_is_lost([client, gateway])

    internet.announce_relays(client, internet.relays)
    exchange(internet, client, gateway, within=1.0)
    assert client.of(ConnectionFailed) == client.of(RelayFailed) == []
    assert client.of(PathChanged)


def test_runs_sent_while_relays_come_and_go_cost_no_slot() -> None:
    internet, client, gateway = relayed(relays=2)
    for turn in range(60):
        relay = internet.relays[turn // 20 % 2]
        if turn % 10 == 0:
            for host in (client, gateway):
                internet.announce_relays(host, [relay] if turn % 20 else [], gone=[] if turn % 20 else [relay])
        client.send(gateway, run_of_segments(segments=53, segment_size=1200), *(datagram(str(n)) for n in range(10)))
        gateway.send(client, run_of_segments(segments=53, segment_size=1200), *(datagram(str(n)) for n in range(10)))
        internet.run(0.1)

    assert_no_slot_is_lost([client, gateway])
    assert client.node.counters.packets_without_buffer == gateway.node.counters.packets_without_buffer == 0
    exchange(internet, client, gateway, within=2.0)

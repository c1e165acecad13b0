"""Malformed input from the network, the host, the peer or the portal: nothing raises, and flows go on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.messages.common import RelaysPresence
from firezone_tunnel.core.packet.superpacket import SuperPacket, parse
from firezone_tunnel.core.sansio import SocketAddress
from tests.hypothesis_profiles import examples
from tests.unit.core.tunnel.world import (
    SITE,
    Client,
    Device,
    Gateway,
    World,
    answers,
    connected,
    control_packet,
    datagram,
    inject,
    passes,
)

MAX_CONTROL = 1240  # a packet of 1280 bytes without its IPv6 header
NAMES = st.sampled_from(["client", "gateway"])
BOTH = pytest.mark.parametrize("name", ["client", "gateway"])
NOWHERE = SocketAddress("10.9.9.9", 1)


@settings(max_examples=examples(100))
@given(name=NAMES, data=st.binary(min_size=1, max_size=4000), size=st.integers(1, 1400), from_the_peer=st.booleans())
def test_garbage_datagrams_are_only_counted(name: str, data: bytes, size: int, from_the_peer: bool) -> None:
    world, client, gateway = shared()
    device, peer = (client, gateway) if name == "client" else (gateway, client)

    device.take_in(data, min(size, len(data)), peer.addresses[0] if from_the_peer else NOWHERE, device.addresses[0])

    assert device.received == []
    assert_traffic_flows(world, client, gateway)


@settings(max_examples=examples(100))
@given(name=NAMES, kind=st.sampled_from([1, 2, 3, 4]), body=st.binary(max_size=1400))
def test_garbage_that_looks_like_wireguard_is_only_counted(name: str, kind: int, body: bytes) -> None:
    world, client, gateway = shared()
    device = world.devices[name]

    device.handle([bytes((kind, 0, 0, 0)) + body], NOWHERE, device.addresses[0])

    assert device.received == []
    assert_traffic_flows(world, client, gateway)


@settings(max_examples=examples(60))
@given(name=NAMES, data=st.data())
def test_corrupted_datagrams_of_the_peer_deliver_no_corrupted_packet(name: str, data: st.DataObject) -> None:
    world, client, gateway = connected()
    device, peer = (client, gateway) if name == "client" else (gateway, client)
    world.lose = lambda sender, _: sender is peer
    peer.sent.clear()
    inject(world, peer, device, *(datagram(f"packet {number}") for number in range(3)))
    changed = [bytearray(sent) for _, sent in peer.sent]
    for raw in changed:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    world.lose = lambda sender, _: False

    device.handle([bytes(raw) for raw in changed], peer.addresses[0], device.addresses[0])

    assert set(device.texts()) <= {"packet 0", "packet 1", "packet 2"}
    device.received.clear()
    assert_traffic_flows(world, client, gateway)


@settings(max_examples=examples(200))
@given(name=NAMES, data=st.data())
def test_odd_packets_inside_the_tunnel_never_raise(name: str, data: st.DataObject) -> None:
    """The peer holds the keys but is not trusted."""
    world, client, gateway = shared()
    device, peer = (client, gateway) if name == "client" else (gateway, client)
    packets = data.draw(_lists)

    inject(world, peer, device, *packets)

    for packet in device.received:
        assert packet.source != packet.destination or any(packet.source)
    device.received.clear()
    peer.received.clear()
    assert_traffic_flows(world, client, gateway)


@settings(max_examples=examples(200))
@given(name=NAMES, packets=st.deferred(lambda: _lists))
def test_odd_packets_from_the_host_never_raise(name: str, packets: list[SuperPacket]) -> None:
    world, client, gateway = shared()

    world.devices[name].packets_in(*packets)
    world.run(0.1)

    client.received.clear()
    gateway.received.clear()
    assert_traffic_flows(world, client, gateway)


@settings(max_examples=examples(200))
@given(name=NAMES, event=st.sampled_from([0, 1, 3, 255]), body=st.binary(max_size=MAX_CONTROL - 8))
def test_garbage_control_packets_are_only_counted(name: str, event: int, body: bytes) -> None:
    world, client, gateway = shared()
    device, peer = (client, gateway) if name == "client" else (gateway, client)
    before = device.tunnel.counters.unknown_control

    inject(world, peer, device, control_packet(bytes((event,)) + bytes(7) + body))

    assert device.tunnel.counters.unknown_control == before + 1
    assert device.received == []
    assert_traffic_flows(world, client, gateway)


@BOTH
@pytest.mark.parametrize("opening", [b"", b'{"x":', b'{"resource":'])
@pytest.mark.parametrize("event", [0, 1])
def test_a_control_packet_full_of_brackets_is_only_counted(name: str, opening: bytes, event: int) -> None:
    world, client, gateway = connected()
    device, peer = (client, gateway) if name == "client" else (gateway, client)

    inject(world, peer, device, control_packet((bytes((event,)) + bytes(7) + opening).ljust(MAX_CONTROL, b"[")))

    assert device.tunnel.counters.unknown_control == 1
    assert_traffic_flows(world, client, gateway)


@BOTH
@pytest.mark.parametrize("size", range(9))
def test_a_control_packet_that_is_too_short_is_harmless(name: str, size: int) -> None:
    world, client, gateway = connected()
    device, peer = (client, gateway) if name == "client" else (gateway, client)

    inject(world, peer, device, control_packet(bytes(size)))

    assert device.received == []
    assert_traffic_flows(world, client, gateway)


@pytest.mark.parametrize(
    "message",
    [
        to_client.IceCandidates(gateway_id="gateway", candidates=["", "candidate:", "x" * 10_000]),
        to_client.IceCandidates(gateway_id="nobody", candidates=["candidate:1 1 UDP 1 10.0.0.1 1 typ host"]),
        to_client.InvalidateIceCandidates(gateway_id="gateway", candidates=["", "nonsense"]),
        to_client.InvalidateIceCandidates(gateway_id="nobody", candidates=["nonsense"]),
        to_client.ResourceDeleted(id="no such"),
        RelaysPresence(disconnected_ids=["no such"], connected=[]),
        to_client.ResourceChanged(
            resource=to_client.CidrResource(id="odd", name="", address="10.0.0.1/8", gateway_groups=[])
        ),
        to_client.ResourceChanged(
            resource=to_client.DnsResource(id="dns", name="dns", address="*.example.com", gateway_groups=[SITE])
        ),
        to_client.ResourceChanged(resource=to_client.InternetResource(id="internet", gateway_groups=[])),
        to_client.FlowCreationFailed(resource_id="net", reason=""),
    ],
)
def test_a_senseless_message_of_the_portal_is_harmless_to_a_client(message: to_client.FromPortal) -> None:
    world, client, gateway = connected()

    client.hear(message)
    world.run(1)

    assert_traffic_flows(world, client, gateway)


@pytest.mark.parametrize(
    "message",
    [
        to_gateway.IceCandidates(client_id="client", candidates=["", "candidate:", "x" * 10_000]),
        to_gateway.IceCandidates(client_id="nobody", candidates=["candidate:1 1 UDP 1 10.0.0.1 1 typ host"]),
        to_gateway.InvalidateIceCandidates(client_id="client", candidates=["", "nonsense"]),
        to_gateway.InvalidateIceCandidates(client_id="nobody", candidates=["nonsense"]),
        to_gateway.RejectAccess(client_id="nobody", resource_id="net"),
        to_gateway.RejectAccess(client_id="client", resource_id="no such"),
        to_gateway.ExpiryUpdated(client_id="nobody", resource_id="net", expires_at=0),
        to_gateway.ExpiryUpdated(client_id="client", resource_id="no such", expires_at=0),
        to_gateway.ResourceUpdated(resource=to_gateway.InternetResource(id="net")),
        to_gateway.ResourceUpdated(
            resource=to_gateway.DnsResource(id="net", name="", address="example.com", filters=[])
        ),
        RelaysPresence(disconnected_ids=["no such"], connected=[]),
    ],
)
def test_a_senseless_message_of_the_portal_is_harmless_to_a_gateway(message: to_gateway.FromPortal) -> None:
    world, client, gateway = connected()

    gateway.hear(message)
    world.run(1)

    assert_traffic_flows(world, client, gateway)


def test_before_the_first_init_packets_and_datagrams_are_dropped() -> None:
    world = World()
    devices: list[Device] = [world.add_client(), world.add_gateway()]

    for device in devices:
        device.packets_in(datagram("hello"))
        device.handle([b"\4" + bytes(99)], NOWHERE, device.addresses[0])
        device.handle_timeout()
        assert device.received == []

    world.run(60)


@st.composite
def _packets(draw: st.DrawFn) -> SuperPacket:
    """Any parsable packet, often with addresses that are in use."""
    version = draw(st.sampled_from([4, 6]))
    size = {4: 4, 6: 16}[version]
    addresses = st.one_of(st.sampled_from(_ADDRESSES[version]), st.binary(min_size=size, max_size=size))
    protocol = draw(st.one_of(st.sampled_from([1, 6, 17, 58, 132]), st.integers(0, 254)))
    payload = draw(st.binary(max_size=120))
    source, destination = draw(addresses), draw(addresses)
    if version == 4:
        fragment = draw(st.sampled_from([0, 0, 0x2000, 0x0001, 0x2010]))
        header = bytes((0x45, 0)) + (20 + len(payload)).to_bytes(2, "big") + bytes(2) + fragment.to_bytes(2, "big")
        raw = header + bytes((64, protocol, 0, 0)) + source + destination + payload
    else:
        raw = (6 << 28).to_bytes(4, "big") + len(payload).to_bytes(2, "big") + bytes((protocol, 64))
        raw += source + destination + payload
    packet = parse(bytearray(raw))
    return datagram("well-formed after all") if packet is None else packet


_lists = st.lists(_packets(), max_size=5)
_ADDRESSES = {
    4: [bytes(4), b"\xff" * 4, b"\x64\x40\0\1", b"\x64\x40\0\xc8", b"\x0a\x14\0\5"],
    6: [bytes(16), b"\xff" * 16, bytes.fromhex("fd002021111100000000000000000001"), bytes(15) + b"\1"],
}


def assert_traffic_flows(world: World, client: Client, gateway: Gateway) -> None:
    assert passes(world, client, gateway)
    assert answers(world, client, gateway)
    client.received.clear()
    gateway.received.clear()


_shared: list[tuple[World, Client, Gateway]] = []


def shared() -> tuple[World, Client, Gateway]:
    """One connected pair for many examples; each leaves it to the next."""
    if not _shared:
        _shared.append(connected())
    return _shared[0]

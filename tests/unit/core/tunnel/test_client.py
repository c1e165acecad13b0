"""A client's data plane: when it asks for flows, where packets go, which packets come back, and its events."""

from __future__ import annotations

import ipaddress
from typing import Any

import attrs
import msgspec
import pytest
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded

from firezone_tunnel.core.messages import client as messages
from firezone_tunnel.core.messages.common import Filter, Interface, Network
from firezone_tunnel.core.packet import superpacket
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionClosed, ConnectionEstablished, ConnectionFailed
from firezone_tunnel.core.tunnel import control
from firezone_tunnel.core.tunnel.client import (
    ASK_AGAIN_AFTER,
    PUBLISH_INTERVAL,
    RECENT_TRAFFIC,
    FlowIgnored,
    FlowRefused,
    PacketFiltered,
    ResourcesChanged,
    TunConfigChanged,
)
from firezone_tunnel.core.tunnel.resources import OFFLINE_FOR, ResourceView, Status
from firezone_tunnel.core.tunnel.waiting import CAPACITY
from tests.unit.core.packet.packets import ICMP, IP, TCP, UDP, Packet, built
from tests.unit.core.snownet.world import LATENCY
from tests.unit.core.tunnel.world import (
    Access,
    Client,
    World,
    announced_candidates,
    answer,
    answers,
    arrives,
    connected,
    control_packet,
    datagram,
    fragment,
    icmp_about,
    inject,
    joined,
    packet_of,
    passes,
    ping,
    segment,
)

NET = Access("net", "10.20.0.0/24", "gateway")
OTHER_NET = Access("other", "10.30.0.0/24", "gateway")
UDP_5000 = Filter(protocol="udp", port_range_start=5000, port_range_end=5000)
PROHIBITED = [(3, 13)]
PROHIBITED_IPV6 = [(1, 1)]
FLOW_TIME = 1.0  # more than portal, ICE and WireGuard take for a flow


# Asking for flows


def test_only_the_first_packet_asks_for_a_flow() -> None:
    world, client, _ = joined()
    world.portal.mute = True

    for number in range(20):
        client.packets_in(datagram(str(number)))
        world.run(0.05)

    assert client.ask_count("net") == 1


def test_traffic_asks_again_after_two_seconds_without_an_answer() -> None:
    world, client, _ = joined()
    world.portal.mute = True
    client.packets_in(datagram("first"))
    world.run(ASK_AGAIN_AFTER)

    client.packets_in(datagram("second"))
    world.run(LATENCY)

    assert client.ask_count("net") == 2


def test_without_traffic_nothing_is_asked_again() -> None:
    world, client, _ = joined()
    world.portal.mute = True
    client.packets_in(datagram("only"))

    world.run(600)

    assert client.ask_count() == 1


def test_packets_that_waited_for_the_flow_arrive_once_and_in_order() -> None:
    world, client, gateway = joined()
    texts = [str(number) for number in range(CAPACITY)]
    for text in texts:
        client.packets_in(datagram(text))

    world.run(2)

    assert gateway.texts() == texts


def test_of_too_many_waiting_packets_the_newest_arrive() -> None:
    world, client, gateway = joined()
    for number in range(CAPACITY + 10):
        client.packets_in(datagram(str(number)))

    world.run(2)

    assert gateway.texts() == [str(number) for number in range(10, CAPACITY + 10)]
    assert client.tunnel.counters.waiting_overwritten == 10


def test_packets_keep_their_order_while_the_flow_is_created() -> None:
    world, client, gateway = joined()

    for number in range(100):
        client.packets_in(datagram(str(number)))
        world.run(0.01)
    world.run(1)

    assert gateway.texts() == [str(number) for number in range(100)]


def test_a_packet_for_no_resource_is_dropped_counted_and_asks_for_nothing() -> None:
    world, client, _ = joined()

    for destination in ("8.8.8.8", "100.64.0.77", "224.0.0.251", "ff02::2", "2001:db8::1"):
        assert client.packets_in(datagram("lost", destination)) == []
    world.run(1)

    assert (client.ask_count(), client.tunnel.counters.without_resource) == (0, 5)


def test_a_request_lists_the_connected_gateways_the_latest_first() -> None:
    world, client, _ = joined(NET, Access("other", "10.30.0.0/24", "second"), Access("third", "10.40.0.0/24", "second"))
    second = world.add_gateway("second", 201)
    second.join()
    for destination in ("10.20.0.5", "10.30.0.5"):
        client.packets_in(datagram("hello", destination))
        world.run(1)

    client.packets_in(datagram("hello", "10.40.0.5"))
    world.run(1)

    asked = [heard.message for heard in world.portal.heard if isinstance(heard.message, messages.CreateFlow)]
    assert [message.connected_gateway_ids for message in asked] == [[], ["gateway"], ["second", "gateway"]]


def test_two_resources_behind_one_gateway_share_its_connection() -> None:
    world, client, gateway = connected(NET, OTHER_NET)

    client.packets_in(datagram("more", "10.30.0.5"))
    world.run(1)

    assert gateway.texts() == ["more"]
    assert client.ask_count("other") == 1
    assert client.of(ConnectionEstablished | ConnectionClosed) == []
    assert passes(world, client, gateway)


def test_an_unexpected_answer_is_ignored() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    _, created = world.portal.flow(client, "other")
    again = msgspec.structs.replace(world.portal.flow(client, "net")[1], gateway_id="somewhere else")

    client.hear(created)
    client.hear(again)

    assert client.reported == []
    assert passes(world, client, gateway)


def test_an_answer_for_a_resource_that_was_deleted_meanwhile_is_ignored() -> None:
    world, client, _ = joined()
    client.packets_in(datagram("hello"))
    _, created = world.portal.flow(client, "net")
    client.hear(messages.ResourceDeleted(id="net"))

    client.hear(created)
    world.run(5)

    assert client.of(ConnectionEstablished) == []


# Refusals


def test_a_refusal_because_all_gateways_are_offline_shows_for_five_minutes() -> None:
    world, client, _ = joined()
    world.portal.refusals["net"] = "offline"
    client.packets_in(datagram("hello"))
    world.run(2 * LATENCY)

    assert client.of(FlowRefused) == [FlowRefused("net", "offline")]
    world.run(PUBLISH_INTERVAL)
    assert statuses(client) == {"net": Status.OFFLINE}
    world.run(OFFLINE_FOR)
    assert statuses(client) == {"net": Status.UNKNOWN}


def test_once_a_gateway_is_online_again_traffic_gets_through_and_older_packets_are_dropped() -> None:
    world, client, gateway = joined()
    world.portal.refusals["net"] = "offline"
    client.packets_in(datagram("too early"))
    world.run(ASK_AGAIN_AFTER)
    world.portal.refusals.clear()

    client.packets_in(datagram("in time"))
    world.run(1)

    assert gateway.texts() == ["in time"]
    assert statuses(client) == {"net": Status.ONLINE}


@pytest.mark.parametrize("reason", ["offline", "forbidden", "not_found", "version_mismatch", "something new"])
def test_after_a_refusal_traffic_asks_again_only_after_two_seconds(reason: str) -> None:
    world, client, _ = joined()
    world.portal.refusals["net"] = reason
    for _ in range(19):
        client.packets_in(datagram("hello"))
        world.run(0.1)
    asked = client.ask_count()

    world.run(0.2)
    client.packets_in(datagram("again"))
    world.run(2 * LATENCY)

    assert (asked, client.ask_count()) == (1, 2)
    assert client.of(FlowRefused) == [FlowRefused("net", reason)] * 2
    assert statuses(client) == {"net": Status.OFFLINE if reason == "offline" else Status.UNKNOWN}


def test_many_packets_for_many_refused_resources_ask_once_for_each_every_two_seconds() -> None:
    world, client, _ = joined()
    for number in range(5):
        rid = f"refused-{number}"
        world.portal.refusals[rid] = "offline"
        resource = Access(rid, f"10.21.{number}.0/24", "gateway").for_client()
        client.hear(messages.ResourceChanged(resource=resource))

    for _ in range(100):
        for number in range(5):
            client.packets_in(datagram("hello", f"10.21.{number}.1"))
        world.run(0.05)

    assert client.ask_count() == 5 * 3  # at 0, 2 and 4 s


def test_a_refusal_of_an_unknown_resource_is_harmless() -> None:
    _, client, _ = joined()

    client.hear(messages.FlowCreationFailed(resource_id="no such", reason="offline"))

    assert client.of(FlowRefused) == [FlowRefused("no such", "offline")]


@pytest.mark.parametrize(
    "changes",
    [
        {"gateway_public_key": bytes(32)},
        {"gateway_public_key": b"\1" + bytes(31)},
        {"gateway_ipv4": "not an address"},
        {"gateway_ipv4": ""},
        {"gateway_ipv6": "100.64.0.200"},
        {"gateway_ipv6": "fd00:2021:1111::1%"},
    ],
)
def test_a_flow_to_an_invalid_gateway_is_reported_and_leaves_nothing(changes: dict[str, Any]) -> None:
    world, client, gateway = joined()
    world.portal.mute = True
    client.packets_in(datagram("hello"))
    _, created = world.portal.flow(client, "net", **changes)

    client.hear(created)

    assert [(event.rid, event.gid) for event in client.of(FlowIgnored)] == [("net", "gateway")]
    assert not client.node.has_connection("gateway")
    world.portal.mute = False
    world.run(ASK_AGAIN_AFTER)
    client.packets_in(datagram("try again"))
    world.run(2)
    assert gateway.texts() == ["hello", "try again"]


def test_a_connection_survives_an_invalid_answer_for_another_resource() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    world.portal.mute = True
    client.packets_in(datagram("hello", "10.30.0.5"))

    client.hear(world.portal.flow(client, "other", gateway_public_key=bytes(32))[1])

    assert [event.rid for event in client.of(FlowIgnored)] == ["other"]
    assert passes(world, client, gateway)


# Resources come and go


def test_a_resource_created_later_is_routed_and_reached() -> None:
    world, client, gateway = connected()

    world.portal.add(OTHER_NET)
    client.hear(messages.ResourceChanged(resource=OTHER_NET.for_client()))
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)

    assert network("10.30.0.0/24") in routes(client)
    assert gateway.texts() == ["hello"]


def test_a_deleted_resource_is_cut_off_in_the_same_turn_in_both_directions() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)
    gateway.packets_in(answer("too late"))  # it is under way while the resource goes

    client.hear(messages.ResourceDeleted(id="net"))

    assert network("10.20.0.0/24") not in routes(client)
    assert not passes(world, client, gateway)
    assert client.received == []
    assert client.tunnel.counters.unexpected_source == 1
    assert passes(world, client, gateway, "10.30.0.5")


def test_a_gateway_without_resources_gets_a_goodbye() -> None:
    world, client, gateway = connected()

    client.hear(messages.ResourceDeleted(id="net"))
    world.run(PUBLISH_INTERVAL)

    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]
    assert gateway.of(ConnectionClosed) == [ConnectionClosed("client")]
    assert statuses(client) == {}


def test_a_resource_that_has_moved_is_asked_for_again() -> None:
    world, client, gateway = connected()
    moved = world.portal.add(attrs.evolve(NET, address="10.99.0.0/24"))

    client.hear(messages.ResourceChanged(resource=moved.for_client()))
    client.packets_in(datagram("hello", "10.99.0.5"))
    world.run(1)

    assert client.ask_count("net") == 1
    assert gateway.texts() == ["hello"]
    assert not passes(world, client, gateway, "10.20.0.5")


def test_a_renamed_resource_keeps_its_flow() -> None:
    world, client, gateway = connected()
    renamed = msgspec.structs.replace(NET.for_client(), name="Something else")

    client.hear(messages.ResourceChanged(resource=renamed))
    world.run(PUBLISH_INTERVAL)

    assert views(client)[-1].name == "Something else"
    assert passes(world, client, gateway)
    assert client.ask_count() == 0


def test_filters_change_live() -> None:
    world, client, gateway = connected()

    client.hear(messages.ResourceChanged(resource=attrs.evolve(NET, filters=[UDP_5000]).for_client()))

    assert passes(world, client, gateway)
    client.packets_in(datagram("refused", port=5001))
    assert client.errors() == PROHIBITED


def test_a_moved_resource_does_not_take_the_addresses_of_one_in_use() -> None:
    """Its flow leads to its former place, so it is not in use at the new one."""
    used, moving = Access("z used", "10.20.0.0/24", "gateway"), Access("a moving", "10.30.0.0/24", "gateway")
    world, client, gateway = connected(used, moving)
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)

    client.hear(messages.ResourceChanged(resource=attrs.evolve(moving, address="10.20.0.0/24").for_client()))

    assert passes(world, client, gateway)
    assert client.ask_count("a moving") == 1


def test_of_overlapping_resources_the_most_specific_one_is_used() -> None:
    world, client, gateway = connected(NET, Access("host", "10.20.0.7/32", "second"))
    second = world.add_gateway("second", 201)
    second.join()

    client.packets_in(datagram("for the host", "10.20.0.7"), datagram("for the network", "10.20.0.8"))
    world.run(1)

    assert (second.texts(), gateway.texts()) == (["for the host"], ["for the network"])


def test_when_the_more_specific_resource_goes_the_other_takes_over() -> None:
    world, client, gateway = connected(NET, Access("host", "10.20.0.7/32", "second"))
    world.add_gateway("second", 201).join()
    client.packets_in(datagram("hello", "10.20.0.7"))
    world.run(1)

    client.hear(messages.ResourceDeleted(id="host"))

    assert passes(world, client, gateway, "10.20.0.7")


def test_another_resource_of_the_same_network_does_not_displace_one_in_use() -> None:
    world, client, gateway = connected()

    client.hear(messages.ResourceChanged(resource=Access("zz", "10.20.0.0/24", "second").for_client()))

    assert passes(world, client, gateway)


def test_an_init_cuts_off_resources_that_it_does_not_list() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    del world.portal.resources["net"]

    client.join()
    world.run(PUBLISH_INTERVAL)

    assert routes(client) == [network(text) for text in ("100.64.0.0/11", "10.30.0.0/24", "fd00:2021:1111::/107")]
    assert not passes(world, client, gateway)


def test_an_init_that_changes_nothing_disturbs_nothing() -> None:
    world, client, gateway = connected()

    client.join()
    world.run(LATENCY)

    assert client.reported == []
    assert passes(world, client, gateway)
    assert client.ask_count() == 0


def test_a_lone_change_is_reported_at_once() -> None:
    world, client, _ = joined()
    world.run(1)

    client.hear(messages.ResourceChanged(resource=OTHER_NET.for_client()))

    assert network("10.30.0.0/24") in routes(client)
    assert set(statuses(client)) == {"net", "other"}


def test_of_many_changes_in_a_row_the_newest_is_reported_a_few_times_a_second() -> None:
    world, client, _ = joined()
    world.run(1)

    for number in range(1000):
        access = Access("other", f"10.{number >> 8}.{number & 255}.0/24", "gateway")
        client.hear(messages.ResourceChanged(resource=access.for_client()))
        world.run(0.001)
    world.run(PUBLISH_INTERVAL)

    assert len(client.of(TunConfigChanged)) == len(client.of(ResourcesChanged)) == 1 / PUBLISH_INTERVAL + 1
    assert network("10.3.231.0/24") in routes(client)


def test_of_changes_that_nobody_has_read_only_the_newest_is_reported() -> None:
    world, client, _ = joined()

    for number in (1, 2, 3):
        address = ipaddress.IPv4Address(f"100.64.0.{number}")
        interface = Interface(ipv4=address, ipv6=ipaddress.IPv6Address("fd00:2021:1111::1"))
        client.tunnel.handle_message(messages.ConfigChanged(interface=interface), world.now + number, world.utc)
    events = list(client.tunnel.events())

    assert [str(event.config.ipv4) for event in events if isinstance(event, TunConfigChanged)] == ["100.64.0.3"]


def test_packets_must_have_the_address_that_the_portal_assigned_last() -> None:
    _, client, _ = connected()
    interface = Interface(ipv4=ipaddress.IPv4Address("100.64.0.9"), ipv6=ipaddress.IPv6Address("fd00:2021:1111::9"))

    client.hear(messages.ConfigChanged(interface=interface))
    client.packets_in(datagram("from the old address"))

    assert client.tunnel.counters.foreign_source == 1


# Dropped and refused packets


@pytest.mark.parametrize(("destination", "expected"), [("10.20.0.5", PROHIBITED), ("fd00:20::5", PROHIBITED_IPV6)])
def test_filters_refuse_packets_at_once_even_before_there_is_a_flow(
    destination: str, expected: list[tuple[int, int]]
) -> None:
    allowed = Filter(protocol="tcp", port_range_start=80, port_range_end=80)
    network_of = {"10.20.0.5": "10.20.0.0/24", "fd00:20::5": "fd00:20::/64"}
    _, client, _ = joined(Access("net", network_of[destination], "gateway", filters=[allowed]))

    refused = client.packets_in(datagram("no", destination))

    assert client.errors() == expected
    assert refused[0].source == ipaddress.ip_address(destination).packed
    assert (client.ask_count(), client.tunnel.counters.filtered) == (0, 1)
    assert client.of(PacketFiltered) == [PacketFiltered("net", superpacket.UDP, 5000)]


def test_a_fragment_passes_only_where_everything_does() -> None:
    world, client, gateway = connected()
    assert arrives(world, client, gateway, fragment())
    assert arrives(world, client, gateway, fragment(first=False))
    client.hear(messages.ResourceChanged(resource=attrs.evolve(NET, filters=[UDP_5000]).for_client()))

    assert not arrives(world, client, gateway, fragment())
    assert not arrives(world, client, gateway, fragment(first=False))

    assert client.errors() == PROHIBITED  # about the first fragment; a later one is never answered


# Packets from a foreign source: the client's host has 10.0.1.1 and, where it is given, fd00:1::1


@pytest.mark.parametrize("source", ["10.0.1.1", "100.64.0.2", "fd00:1::1", "fd00:2021:1111::2"])
def test_a_datagram_from_a_foreign_source_is_answered_with_icmp(source: str) -> None:
    world, client, gateway = connected()
    destination = "fd00:20::5" if ":" in source else "10.20.0.5"

    assert not arrives(world, client, gateway, datagram("x", destination, source=source))

    assert client.errors() == ([(1, 5)] if ":" in source else PROHIBITED)
    assert client.tunnel.counters.foreign_source == 1


@pytest.mark.parametrize("source", ["10.0.1.1", "fd00:1::1"])
@pytest.mark.parametrize(("flags", "expected"), [("A", "R"), ("S", "RA"), ("FA", "R")])
def test_a_segment_from_another_address_of_the_host_is_reset(source: str, flags: str, expected: str) -> None:
    world, client, _ = connected()
    client.tunnel.set_local_addresses((SocketAddress("10.0.1.1", 52625), SocketAddress("fd00:1::1", 52625)), world.now)

    answered = client.packets_in(segment(source, flags=flags))

    assert [TCP(bytes(one.data[one.transport_offset :])).flags for one in answered] == [expected]


@pytest.mark.parametrize("source", ["172.17.0.2", "fd00:17::2"])
def test_a_segment_that_the_host_forwards_is_answered_but_never_reset(source: str) -> None:
    _, client, _ = connected()

    client.packets_in(segment(source))

    assert client.errors() == ([(1, 5)] if ":" in source else PROHIBITED)


@pytest.mark.parametrize("source", ["10.0.1.1", "172.17.0.2", "fd00:17::2"])
def test_a_reset_from_a_foreign_source_is_never_answered(source: str) -> None:
    _, client, _ = connected()

    assert client.packets_in(segment(source, flags="R"), segment(source, flags="RA")) == []


def test_errors_fragments_and_multicast_from_a_foreign_source_are_never_answered() -> None:
    _, client, _ = connected()
    about = bytes(IP(src="10.20.0.5", dst="10.0.1.1") / UDP(sport=1, dport=2))
    later = IP(src="10.0.1.1", dst="10.20.0.5", frag=9, proto=17)

    answered = client.packets_in(
        packet_of(built(IP(src="10.0.1.1", dst="10.20.0.5"), ICMP(type=3), about)),
        packet_of(built(later, bytes(28))),
        datagram("x", "224.0.0.251", source="10.0.1.1"),
        datagram("x", "ff02::fb", source="fe80::1"),
        datagram("x", "ff02::fb", source="::"),
    )

    assert answered == []
    assert client.tunnel.counters.foreign_source == 5


def test_answers_to_foreign_sources_have_a_rate_limit() -> None:
    world, client, _ = connected()
    flood = [datagram("x", source="10.0.1.1") for _ in range(300)]

    at_once = len(client.packets_in(*flood))
    world.run(1.0)
    later = len(client.packets_in(*flood))

    assert (at_once, later) == (100, 100)


def test_before_the_portal_gave_an_address_nothing_is_foreign() -> None:
    world = World()
    client = world.add_client()

    assert client.packets_in(datagram("x", source="10.0.1.1"), segment("10.0.1.1")) == []


# ICMP errors


@pytest.mark.parametrize("router", ["192.168.9.1", "100.64.9.9", "10.20.0.1", "100.64.0.200"])
@pytest.mark.parametrize("error", [ICMP(type=3, code=4, nexthopmtu=1000), ICMP(type=3, code=1), ICMP(type=11)])
def test_an_error_from_any_router_reaches_the_application(router: str, error: Packet) -> None:
    world, client, gateway = connected()

    assert arrives(world, gateway, client, icmp_about(datagram("too big"), router, error))


@pytest.mark.parametrize("router", ["2001:db8::9", "fd00:20::1"])
@pytest.mark.parametrize("error", [ICMPv6PacketTooBig(mtu=1280), ICMPv6DestUnreach(), ICMPv6TimeExceeded()])
def test_an_ipv6_error_from_any_router_reaches_the_application(router: str, error: Packet) -> None:
    world, client, gateway = connected(NET, Access("six", "fd00:20::/64", "gateway"))
    client.packets_in(datagram("hello", "fd00:20::5"))
    world.run(1)

    assert arrives(world, gateway, client, icmp_about(datagram("x", "fd00:20::5"), router, error))


@pytest.mark.parametrize(
    "about",
    [
        datagram("through another gateway", "10.30.0.5"),
        datagram("outside the tunnel", "8.8.8.8"),
        datagram("from another address", source="10.0.1.1"),
        datagram("from a neighbour", source="100.64.0.2"),
        datagram("the answer", "100.64.0.1", source="10.20.0.5"),
        datagram("the other family", "fd00:20::5"),
    ],
)
@pytest.mark.parametrize("router", ["192.168.9.1", "10.20.0.5"])
def test_an_error_about_any_other_packet_is_dropped(about: SuperPacket, router: str) -> None:
    world, client, gateway = connected(NET, Access("second", "10.30.0.0/24", "second"))

    inject(world, gateway, client, icmp_about(about, router, ICMP(type=3, code=1)))

    assert client.received == []
    assert client.tunnel.counters.unexpected_source == 1


@pytest.mark.parametrize("router", ["192.168.9.1", "10.20.0.5", "224.0.0.1", "127.0.0.1", "0.0.0.0"])
def test_redirects_and_errors_from_no_hosts_address_are_dropped(router: str) -> None:
    world, client, gateway = connected()
    errors = [ICMP(type=5, gw="10.20.0.66"), ICMP(type=4)]
    if router not in {"192.168.9.1", "10.20.0.5"}:
        errors.append(ICMP(type=11))

    inject(world, gateway, client, *(icmp_about(datagram("x"), router, error) for error in errors))

    assert client.received == []


def test_an_error_about_a_resource_that_is_gone_is_dropped() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)
    client.hear(messages.ResourceDeleted(id="other"))

    inject(world, gateway, client, icmp_about(datagram("x", "10.30.0.5"), "192.168.9.1", ICMP(type=11)))

    assert client.received == []


def test_a_gateway_may_send_only_from_the_networks_that_it_serves() -> None:
    world, client, gateway = connected(NET, Access("second", "10.30.0.0/24", "second"))

    for source in ("10.30.0.5", "8.8.8.8", "fd00:20::1", "100.64.0.1", "100.64.0.201"):
        inject(world, gateway, client, answer("forged", source))

    assert client.received == []
    assert client.tunnel.counters.unexpected_source == 5


def test_a_packet_for_another_client_is_not_delivered() -> None:
    world, client, gateway = connected()

    inject(world, gateway, client, answer("for a neighbour", to="100.64.0.2"))

    assert client.received == []


def test_a_control_packet_never_reaches_the_host() -> None:
    world, client, gateway = connected()
    status = control_packet(control.encode(control.DomainStatus("net", "example.com", active=True))[40:])

    assert not arrives(world, gateway, client, status)
    inject(world, gateway, client, status)

    assert client.received == []
    assert client.tunnel.counters.unknown_control == 1
    assert passes(world, client, gateway)


@pytest.mark.parametrize("address", ["100.64.0.200", "fd00:2021:1111::c8"])
def test_a_connected_gateway_is_pinged_at_its_own_tunnel_address(address: str) -> None:
    world, client, gateway = connected()

    assert arrives(world, client, gateway, ping(address))

    reply = ping("100.64.0.1" if "." in address else "fd00:2021:1111::1", source=address)
    assert arrives(world, gateway, client, reply)


# Connections end


def test_a_gateways_goodbye_ends_the_connection_and_the_next_packet_starts_over() -> None:
    world, client, gateway = connected()

    gateway.stop()
    world.run(LATENCY)
    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]
    assert statuses(client) == {"net": Status.UNKNOWN}

    gateway.is_stopped = gateway.is_gone = False
    gateway.restart()
    world.run(1)
    client.packets_in(datagram("again"))
    world.run(1)
    assert gateway.texts() == ["again"]
    assert statuses(client) == {"net": Status.ONLINE}


def test_a_repeated_goodbye_is_harmless() -> None:
    world, client, gateway = connected()
    goodbye = control_packet(b"\2" + bytes(7))

    inject(world, gateway, client, goodbye, goodbye, goodbye)

    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]


def test_traffic_asks_for_a_vanished_gateway_again_after_its_connection_failed() -> None:
    world, client, gateway = connected()
    gateway.is_gone = True
    gateway.leave()

    for _ in range(60):
        client.packets_in(datagram("anybody there"))
        world.run(0.5)

    assert [event.peer_id for event in client.of(ConnectionFailed)][:1] == ["gateway"]
    gateway.is_gone = False
    gateway.restart()
    for number in range(10):
        client.packets_in(datagram(f"again {number}"))
        world.run(1)
    assert "again 9" in gateway.texts()


def test_a_restarted_gateway_serves_only_resources_that_are_asked_for_again() -> None:
    """It has forgotten the resources that it served, so each of them has to be asked for again."""
    world, client, gateway = connected(NET, OTHER_NET)
    gateway.restart()
    world.portal.forget_authorizations()
    world.run(2 * LATENCY)

    client.packets_in(datagram("other", "10.30.0.5"))
    world.run(1)
    assert gateway.texts() == ["other"]
    client.packets_in(datagram("net"))
    world.run(1)

    assert gateway.texts() == ["other", "net"]
    assert (client.ask_count("other"), client.ask_count("net")) == (1, 1)
    assert client.errors() == []


def test_a_resource_moves_to_another_gateway_when_the_portal_says_so() -> None:
    world, client, gateway = connected()
    gateway.is_gone = True
    gateway.leave()
    second = world.add_gateway("second", 201)
    second.join()
    world.portal.add(attrs.evolve(NET, gateway="second"))

    for number in range(60):
        client.packets_in(datagram(str(number)))
        world.run(0.5)

    assert second.texts()[-1] == "59"


def test_close_says_goodbye_to_every_gateway() -> None:
    world, client, gateway = connected()

    client.stop()
    world.run(LATENCY)

    assert gateway.of(ConnectionClosed) == [ConnectionClosed("client")]


# Roaming, and the portal's absence


def test_a_reset_changes_the_key_and_asks_again_for_flows_in_use() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    key = client.tunnel.public_key
    client.addresses = (SocketAddress("10.7.7.7", 52625),)

    client.reset()
    world.run(0.5)
    client.join()
    world.run(FLOW_TIME)

    assert client.tunnel.public_key != key
    assert (client.ask_count("net"), client.ask_count("other")) == (1, 0)
    assert client.of(ConnectionEstablished)[-1].peer_id == "gateway"
    assert passes(world, client, gateway)


def test_a_reset_does_not_ask_for_flows_used_long_ago() -> None:
    world, client, _ = connected()
    world.run(RECENT_TRAFFIC + 1)

    client.reset()
    client.join()
    world.run(1)

    assert client.ask_count() == 0


@pytest.mark.parametrize("paused", [600.0, 30000.0])
def test_a_reset_after_a_pause_asks_for_the_flows_in_use_before_it(paused: float) -> None:
    world, client, _ = connected(NET, OTHER_NET)
    world.run(RECENT_TRAFFIC - 5)
    world.now += paused

    client.reset(paused=paused)
    client.join()
    world.run(FLOW_TIME)

    assert (client.ask_count("net"), client.ask_count("other")) == (1, 0)


def test_a_packet_between_reset_and_rejoin_does_not_ask_twice() -> None:
    world, client, gateway = connected()
    client.reset()

    client.packets_in(datagram("impatient"))
    world.run(0.5)
    client.join()
    world.run(FLOW_TIME)

    assert client.ask_count("net") == 1
    assert gateway.texts() == ["impatient"]


def test_after_a_reset_no_gateway_is_listed_as_connected() -> None:
    world, client, _ = connected()

    client.reset()
    client.join()
    world.run(1)

    asked = [heard.message for heard in world.portal.heard if isinstance(heard.message, messages.CreateFlow)]
    assert [message.connected_gateway_ids for message in asked] == [[]]


def test_a_reset_keeps_the_configuration_and_the_resources() -> None:
    _, client, _ = connected()

    client.reset()

    assert client.of(TunConfigChanged) == []
    assert statuses(client) == {"net": Status.UNKNOWN}


def test_while_the_portal_is_away_flows_go_on_and_nothing_is_requested() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.leave()
    gateway.leave()

    client.packets_in(datagram("waits", "10.30.0.5"))
    world.run(60)

    assert passes(world, client, gateway)
    assert answers(world, client, gateway)
    assert client.ask_count() == 0


def test_a_flow_wanted_while_the_portal_was_away_is_asked_for_once_it_is_back() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.leave()
    client.packets_in(datagram("waits", "10.30.0.5"))
    world.run(5)

    client.join()
    world.run(1)

    assert client.ask_count("other") == 1
    assert gateway.texts() == ["waits"]


def test_a_request_lost_with_the_portals_connection_is_repeated() -> None:
    world, client, gateway = joined()
    client.packets_in(datagram("hello"))
    client.leave()
    world.run(1)

    client.join()
    world.run(1)

    assert gateway.texts() == ["hello"]


def test_candidates_found_while_the_portal_was_away_are_announced_after_the_rejoin() -> None:
    world, client, gateway = connected()
    client.leave()
    world.run(1)
    client.addresses = (*client.addresses, SocketAddress("10.0.1.77", 52625))
    client.tunnel.set_local_addresses(client.addresses, world.now)
    client.drain()
    world.run(1)
    assert announced_candidates(world, "client") == []

    client.join()
    world.run(1)

    assert any("10.0.1.77" in candidate for candidate in announced_candidates(world, "client"))
    assert passes(world, client, gateway)


def statuses(client: Client) -> dict[str, Status]:
    """The status of each resource as a front end shows it."""
    return {view.id: view.status for view in views(client)}


def views(client: Client) -> tuple[ResourceView, ...]:
    latest: ResourcesChanged = client.latest[ResourcesChanged]
    return latest.resources


def routes(client: Client) -> list[Network]:
    """The networks for the host to route into the tunnel."""
    latest: TunConfigChanged = client.latest[TunConfigChanged]
    return list(latest.config.routes)


def network(text: str) -> Network:
    return ipaddress.ip_network(text)

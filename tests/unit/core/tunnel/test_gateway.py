"""A gateway's data plane: which client may reach which resource, until when, and how others are refused."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
import pytest

from firezone_tunnel.core.messages import gateway as messages
from firezone_tunnel.core.messages.common import MAX_CANDIDATES, Authorization, Filter
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionClosed, ConnectionEstablished, ConnectionFailed
from firezone_tunnel.core.tunnel.gateway import FlowAuthorized, FlowEnded, FlowIgnored, InterfaceChanged, PacketFiltered
from tests.unit.core.packet.packets import ICMP, IP, TCP, UDP, built
from tests.unit.core.snownet.world import LATENCY
from tests.unit.core.tunnel.world import (
    Access,
    Client,
    Gateway,
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
)

NET = Access("net", "10.20.0.0/24", "gateway")
OTHER_NET = Access("other", "10.30.0.0/24", "gateway")
UDP_5000 = Filter(protocol="udp", port_range_start=5000, port_range_end=5000)
ICMP_ONLY = Filter(protocol="icmp")
PROHIBITED = [(3, 13)]
PROHIBITED_IPV6 = [(1, 1)]
GOODBYE = b"\2" + bytes(7)
EXPIRY_CHECK_INTERVAL = 60.0


# Authorization


def test_an_authorized_flow_is_acknowledged_with_its_reference() -> None:
    world, client, gateway = joined()
    authorize, _ = world.portal.flow(client, "net")

    gateway.hear(msgspec.structs.replace(authorize, ref="opaque"))
    world.run(LATENCY)

    assert gateway.of(FlowAuthorized) == [FlowAuthorized("client", "net", None)]
    assert world.portal.heard[0].message == messages.FlowAuthorized(ref="opaque")


def test_without_an_authorization_nothing_passes() -> None:
    world, client, gateway = connected(NET, OTHER_NET)

    inject(world, client, gateway, datagram("not mine", "10.30.0.5"))

    assert gateway.received == []
    assert gateway.tunnel.counters.filtered == 1
    assert gateway.of(PacketFiltered) == [PacketFiltered("client", bytes((10, 30, 0, 5)), 17, 5000)]
    assert client.tunnel.counters.unexpected_source == 1  # the ICMP error; the client has no such flow


def test_a_rejected_resource_is_cut_off_in_the_same_turn_in_both_directions() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)
    gateway.received.clear()
    client.packets_in(datagram("too late"))  # it is under way while access is taken back

    gateway.hear(messages.RejectAccess(client_id="client", resource_id="net"))
    gateway.packets_in(answer("too late, too"))
    world.run(2 * LATENCY)

    assert gateway.received == []
    assert client.texts() == []
    assert client.errors() == PROHIBITED
    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "rejected")]
    assert passes(world, client, gateway, "10.30.0.5")


def test_a_client_without_resources_gets_a_goodbye_and_is_forgotten() -> None:
    world, client, gateway = connected()

    gateway.hear(messages.RejectAccess(client_id="client", resource_id="net"))
    world.run(LATENCY)

    assert gateway.of(ConnectionClosed) == [ConnectionClosed("client")]
    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]
    assert not answers(world, client, gateway)
    assert gateway.tunnel.counters.unknown_client == 1


def test_a_revoked_policy_ends_the_flow_on_both_sides() -> None:
    world, client, gateway = connected()

    world.portal.revoke(client, "net")
    world.run(2 * LATENCY)
    client.packets_in(datagram("still there?"))
    world.run(1)

    assert gateway.received == []
    assert client.ask_count() == 0


def test_a_second_client_is_served_beside_the_first_and_neither_loses_the_others_access() -> None:
    world, client, gateway = connected()
    second = world.add_client("second", 2)
    second.join()
    world.run(2 * LATENCY)

    second.packets_in(datagram("from the second", source="100.64.0.2"))
    world.run(1)
    gateway.packets_in(answer("to the second", to="100.64.0.2"))
    gateway.hear(messages.RejectAccess(client_id="client", resource_id="net"))
    world.run(2 * LATENCY)

    assert gateway.texts() == ["from the second"]
    assert second.texts() == ["to the second"]
    assert client.texts() == []
    assert arrives(world, second, gateway, datagram("still", source="100.64.0.2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"public_key": bytes(32)},
        {"public_key": b"\1" + bytes(31)},
        {"ipv4": "not an address"},
        {"ipv4": "fd00:2021:1111::1"},
        {"ipv6": ""},
    ],
)
def test_an_invalid_client_is_reported_and_not_admitted(changes: dict[str, Any]) -> None:
    world, client, gateway = joined()
    authorize, _ = world.portal.flow(client, "net")

    gateway.hear(msgspec.structs.replace(authorize, client=msgspec.structs.replace(authorize.client, **changes)))
    world.run(1)

    assert [(event.cid, event.rid) for event in gateway.of(FlowIgnored)] == [("client", "net")]
    assert gateway.of(FlowAuthorized) == []
    assert world.portal.heard == []
    assert not gateway.node.has_connection("client")


def test_an_invalid_authorization_for_a_second_resource_changes_nothing() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    authorize, _ = world.portal.flow(client, "other")

    gateway.hear(
        msgspec.structs.replace(authorize, client=msgspec.structs.replace(authorize.client, public_key=bytes(32)))
    )
    inject(world, client, gateway, datagram("not mine", "10.30.0.5"))

    assert gateway.of(FlowAuthorized) == []
    assert gateway.received == []
    assert passes(world, client, gateway)


@pytest.mark.parametrize(
    "resource",
    [
        messages.InternetResource(id="net"),
        messages.DnsResource(id="net", name="", address="example.com", filters=[]),
        messages.CidrResource(id="net", name="", address="10.20.0.1/24", filters=[]),
        messages.CidrResource(id="net", name="", address="nonsense", filters=[]),
    ],
)
def test_a_resource_of_an_unsupported_kind_is_reported_and_not_served(resource: messages.Resource) -> None:
    world, client, gateway = joined()
    authorize, _ = world.portal.flow(client, "net")

    gateway.hear(msgspec.structs.replace(authorize, resource=resource))

    assert [(event.cid, event.rid) for event in gateway.of(FlowIgnored)] == [("client", "net")]
    assert not gateway.node.has_connection("client")


def test_authorizing_again_on_the_same_terms_keeps_the_connection() -> None:
    world, client, gateway = connected()
    authorize, _ = world.portal.flow(client, "net")

    gateway.hear(authorize)

    assert gateway.of(ConnectionEstablished | ConnectionClosed) == []
    assert passes(world, client, gateway)


def test_grants_outlive_the_connection() -> None:
    world, client, gateway = connected()
    client.is_gone = True
    world.run(60)
    assert gateway.of(ConnectionFailed) != []
    client.is_gone = False

    for number in range(20):
        client.packets_in(datagram(f"back {number}"))
        world.run(1)

    assert "back 19" in gateway.texts()
    assert gateway.of(FlowEnded) == []


def test_a_restarted_client_replaces_its_former_connection() -> None:
    world, client, gateway = connected()
    client.restart()
    world.run(2 * LATENCY)

    client.packets_in(datagram("again"))
    world.run(1)

    assert gateway.texts() == ["again"]
    assert answers(world, client, gateway)


def test_a_client_with_new_addresses_is_no_longer_reached_at_its_former_addresses() -> None:
    world, client, gateway = connected()
    client.ipv4, client.ipv6 = "100.64.0.9", "fd00:2021:1111::9"
    client.join()
    world.run(2 * LATENCY)
    authorize, _ = world.portal.flow(client, "net")

    gateway.hear(authorize)

    assert arrives(world, gateway, client, answer("to the new address", to="100.64.0.9"))
    assert not arrives(world, gateway, client, answer("to the old address"))
    assert gateway.tunnel.counters.unknown_client == 1


def test_a_clients_goodbye_ends_its_grants() -> None:
    world, client, gateway = connected()

    client.stop()
    world.run(LATENCY)

    assert gateway.of(ConnectionClosed) == [ConnectionClosed("client")]
    gateway.packets_in(answer("too late"))
    assert gateway.tunnel.counters.unknown_client == 1


def test_a_client_that_says_goodbye_several_times_at_once_is_harmless() -> None:
    world, client, gateway = connected()

    inject(world, client, gateway, *[control_packet(GOODBYE)] * 3)

    assert gateway.of(ConnectionClosed) == [ConnectionClosed("client")]


def test_close_says_goodbye_to_every_client() -> None:
    world, client, gateway = connected()

    gateway.stop()
    world.run(LATENCY)

    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]


# Init


def test_the_first_init_brings_the_gateways_addresses_and_a_repeated_init_changes_nothing() -> None:
    world = World()
    gateway = world.add_gateway()
    for _ in range(3):
        gateway.join()
        world.run(1)

    changes = gateway.of(InterfaceChanged)
    assert [(str(event.ipv4), str(event.ipv6)) for event in changes] == [(gateway.ipv4, gateway.ipv6)]


def test_an_init_that_lists_everything_disturbs_nothing() -> None:
    world, client, gateway = connected()

    gateway.join()
    world.run(LATENCY)

    assert gateway.reported == []
    assert passes(world, client, gateway)


def test_an_init_revokes_grants_that_it_does_not_list_and_keeps_the_rest() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)

    gateway.hear(init(gateway, Authorization(client_id="client", resource_id="other")))

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "unlisted")]
    assert passes(world, client, gateway, "10.30.0.5")
    inject(world, client, gateway, datagram("not any more"))
    assert client.errors() == PROHIBITED


def test_an_init_that_lists_nobody_revokes_everything() -> None:
    world, client, gateway = connected()

    gateway.hear(init(gateway))
    world.run(LATENCY)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "unlisted")]
    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]


def test_an_init_that_lists_unknown_clients_is_harmless() -> None:
    world, client, gateway = connected()

    gateway.hear(
        init(
            gateway,
            Authorization(client_id="client", resource_id="net"),
            Authorization(client_id="stranger", resource_id="net"),
        )
    )

    assert passes(world, client, gateway)


def test_an_init_brings_expiries() -> None:
    world, client, gateway = connected()

    gateway.hear(init(gateway, Authorization(client_id="client", resource_id="net", expires_at=int(world.utc) + 10)))
    world.run(9)
    assert passes(world, client, gateway)
    world.run(2)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "expired")]


# Expiry


def test_a_flow_ends_at_its_time_without_any_traffic() -> None:
    world, client, gateway = expiring(after=100)

    world.run(98)
    assert gateway.of(FlowEnded) == []
    world.run(3)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "expired")]
    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]


def test_only_the_resource_that_expires_is_cut_off() -> None:
    world, client, gateway = connected(NET, OTHER_NET)
    client.packets_in(datagram("hello", "10.30.0.5"))
    world.run(1)

    gateway.hear(expiry("other", world.utc + 10))
    world.run(11)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "other", "expired")]
    assert passes(world, client, gateway)
    inject(world, client, gateway, datagram("not any more", "10.30.0.5"))
    assert client.errors() == PROHIBITED


@pytest.mark.parametrize("new", [1000, None])
def test_a_later_expiry_replaces_the_earlier_one(new: int | None) -> None:
    world, client, gateway = expiring(after=20)

    gateway.hear(expiry("net", None if new is None else world.utc + new))
    world.run(500)

    assert gateway.of(FlowEnded) == []
    assert passes(world, client, gateway)


def test_authorizing_again_brings_the_latest_expiry() -> None:
    world, client, gateway = expiring(after=20)
    world.portal.resources["net"].expires_at = int(world.utc) + 1000

    gateway.hear(world.portal.flow(client, "net")[0])
    world.run(500)

    assert gateway.of(FlowEnded) == []


def test_an_expiry_in_the_past_ends_the_flow_at_once() -> None:
    world, _, gateway = connected()

    gateway.hear(expiry("net", world.utc - 10))
    world.run(0)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "expired")]


def test_a_wall_clock_that_is_set_forward_ends_expired_flows_within_a_minute() -> None:
    world, client, gateway = expiring(after=3600)

    world.wall_clock_step = 3600.0
    world.run(EXPIRY_CHECK_INTERVAL + 1)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "expired")]
    assert client.of(ConnectionClosed) == [ConnectionClosed("gateway")]


def test_a_wall_clock_that_is_set_back_prolongs_the_flow() -> None:
    world, client, gateway = expiring(after=100)
    world.run(50)

    world.wall_clock_step = -600.0
    world.run(100)
    assert gateway.of(FlowEnded) == []
    assert passes(world, client, gateway)
    world.run(560)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "expired")]


def test_without_expiries_an_idle_gateway_is_not_woken_to_check_them() -> None:
    world, _, gateway = connected()
    assert "expire" not in reason(gateway)

    gateway.hear(expiry("net", world.utc + 0.5))

    assert "expire" in reason(gateway)


# Filters


def test_filters_change_live_in_both_directions() -> None:
    world, client, gateway = connected()

    gateway.hear(messages.ResourceUpdated(resource=attrs.evolve(NET, filters=[UDP_5000]).for_gateway()))

    assert passes(world, client, gateway)
    assert answers(world, client, gateway)
    inject(world, client, gateway, datagram("not any more", port=5001))
    assert client.errors() == PROHIBITED
    assert not answers(world, client, gateway, port=5001)
    assert gateway.tunnel.counters.filtered_answers == 1


def test_an_update_changes_filters_but_not_the_address() -> None:
    world, client, gateway = connected()

    gateway.hear(messages.ResourceUpdated(resource=attrs.evolve(NET, address="10.99.0.0/24").for_gateway()))

    assert passes(world, client, gateway)


def test_a_packet_passes_if_one_of_the_resources_that_cover_its_address_permits_it() -> None:
    world, client, gateway = connected(
        attrs.evolve(NET, filters=[UDP_5000]), Access("wide", "10.0.0.0/8", "gateway", filters=[ICMP_ONLY])
    )
    client.packets_in(ping("10.1.1.1"))
    world.run(1)

    assert passes(world, client, gateway)
    assert arrives(world, client, gateway, ping("10.20.0.5"))
    inject(world, client, gateway, datagram("udp to the wide network", "10.1.1.1"))
    assert client.errors() == PROHIBITED


def test_fragments_pass_only_under_a_rule_set_that_permits_everything() -> None:
    world, client, gateway = connected()
    assert arrives(world, client, gateway, fragment())
    assert arrives(world, client, gateway, fragment(first=False))
    gateway.hear(messages.ResourceUpdated(resource=attrs.evolve(NET, filters=[UDP_5000]).for_gateway()))
    gateway.received.clear()

    inject(world, client, gateway, fragment(), fragment(first=False))

    assert gateway.received == []
    assert client.errors() == PROHIBITED  # about the first fragment; a later one is never answered


def test_answers_in_fragments_come_back_only_under_a_rule_set_that_permits_everything() -> None:
    world, client, gateway = connected()
    piece = packet_of(
        built(IP(src="10.20.0.5", dst="100.64.0.1", flags="MF"), UDP(sport=5000, dport=40000, len=100), bytes(64))
    )
    assert arrives(world, gateway, client, piece)

    gateway.hear(messages.ResourceUpdated(resource=attrs.evolve(NET, filters=[UDP_5000]).for_gateway()))

    assert not arrives(world, gateway, client, piece)


@pytest.mark.parametrize("protocol", [47, 50, 132])
def test_other_protocols_pass_only_under_a_rule_set_that_permits_everything(protocol: int) -> None:
    world, client, gateway = connected()
    packet = packet_of(built(IP(src="100.64.0.1", dst="10.20.0.5", proto=protocol), bytes(40)))
    assert arrives(world, client, gateway, packet)
    gateway.hear(messages.ResourceUpdated(resource=attrs.evolve(NET, filters=[UDP_5000, ICMP_ONLY]).for_gateway()))
    gateway.received.clear()

    inject(world, client, gateway, packet)

    assert gateway.received == []
    assert client.errors() == PROHIBITED


# Sources and destinations


@pytest.mark.parametrize("source", ["100.64.0.2", "10.20.0.1", "192.0.2.1", "100.64.0.200"])
def test_a_packet_from_a_foreign_address_is_answered_and_dropped(source: str) -> None:
    world, client, gateway = connected()
    # The answer goes to the address that the packet claims to be from: the client's host must not get it.
    inject(world, client, gateway, datagram("spoofed", source=source))

    assert gateway.received == []
    assert gateway.tunnel.counters.foreign_source == 1
    assert client.received == []


def test_the_refusal_of_a_spoofed_packet_travels_to_the_client_that_sent_it() -> None:
    world, client, gateway = connected()
    gateway.sent.clear()

    inject(world, client, gateway, datagram("spoofed", source="192.0.2.1"))

    assert client.tunnel.counters.unexpected_source == 1  # it arrived, but was not for the client's host


def test_an_ipv6_packet_that_is_not_allowed_is_refused_with_icmpv6() -> None:
    world, client, gateway = connected(NET, Access("six", "fd00:20::/64", "gateway"))

    inject(world, client, gateway, datagram("not mine", "fd00:20::5"))

    assert client.received == []  # the client does not accept this ICMP error: it has no flow to that network
    client.packets_in(datagram("ask for it", "fd00:20::5"))
    world.run(1)
    inject(world, client, gateway, datagram("spoofed", "fd00:20::5", source="fd00:2021:1111::77"))
    gateway.hear(messages.ResourceUpdated(resource=Access("six", "fd00:20::/64", "gateway", [UDP_5000]).for_gateway()))
    inject(world, client, gateway, datagram("filtered", "fd00:20::5", port=1))
    assert client.errors() == PROHIBITED_IPV6


def test_an_icmp_error_is_never_answered_with_another() -> None:
    world, client, gateway = connected(attrs.evolve(NET, filters=[UDP_5000]))
    error = packet_of(built(IP(src="100.64.0.1", dst="10.20.0.5"), ICMP(type=3, code=3), bytes(IP() / UDP())))

    inject(world, client, gateway, error)

    assert client.received == []
    assert gateway.tunnel.counters.filtered == 1


def test_one_client_does_not_reach_another_through_the_gateway() -> None:
    wide = Access("wide", "100.0.0.0/8", "gateway")
    world, client, gateway = connected(NET, wide)
    second = world.add_client("second", 2)
    second.join()
    world.run(2 * LATENCY)
    second.packets_in(datagram("hello", source="100.64.0.2"))
    client.packets_in(datagram("hello", "100.1.0.1"))
    world.run(1)
    gateway.received.clear()

    inject(world, client, gateway, datagram("to my neighbour", "100.64.0.2"))
    gateway.packets_in(datagram("as the host would forward it", "100.64.0.2", source="100.64.0.1"))
    world.run(2 * LATENCY)

    assert gateway.received == []
    assert second.received == []
    assert gateway.tunnel.counters.filtered_answers == 1


@pytest.mark.parametrize("address", ["100.64.0.200", "fd00:2021:1111::c8"])
def test_the_gateway_itself_can_be_reached_and_may_answer(address: str) -> None:
    world, client, gateway = connected(attrs.evolve(NET, filters=[UDP_5000]))
    own = "100.64.0.1" if "." in address else "fd00:2021:1111::1"

    assert arrives(world, client, gateway, ping(address))
    assert arrives(world, gateway, client, ping(own, source=address))


def test_answers_from_resources_that_the_client_may_not_use_are_dropped_silently() -> None:
    world, client, gateway = connected()

    for source in ("10.30.0.5", "8.8.8.8", "fd00:20::5"):
        assert not answers(world, client, gateway, source)

    assert gateway.tunnel.counters.filtered_answers == 3
    assert gateway.received == []


@pytest.mark.parametrize("router", ["10.20.0.1", "192.168.9.1", "100.64.0.200"])
def test_an_icmp_error_about_a_permitted_packet_comes_back_from_any_router(router: str) -> None:
    world, client, gateway = connected(attrs.evolve(NET, filters=[UDP_5000]))

    assert arrives(world, gateway, client, icmp_about(datagram("x"), router, ICMP(type=3, code=4)))
    assert arrives(world, gateway, client, icmp_about(ping("100.64.0.200"), "100.64.0.200", ICMP(type=3, code=2)))
    assert not arrives(world, gateway, client, ping("100.64.0.1", source="10.20.0.1"))


@pytest.mark.parametrize(
    "about",
    [
        datagram("to another port", port=5001),
        ping("10.20.0.5"),
        datagram("to another network", "10.30.0.5"),
        datagram("of another client", source="100.64.0.2"),
        datagram("of the resource", "100.64.0.1", source="10.20.0.5"),
        datagram("of another family", "fd00:20::5"),
    ],
)
@pytest.mark.parametrize("router", ["10.20.0.1", "192.168.9.1", "100.64.0.200"])
def test_an_icmp_error_about_any_other_packet_is_dropped(about: SuperPacket, router: str) -> None:
    world, _, gateway = connected(attrs.evolve(NET, filters=[UDP_5000]))

    gateway.packets_in(icmp_about(about, router, ICMP(type=3, code=1)))
    world.run(2 * LATENCY)

    assert gateway.tunnel.counters.filtered_answers == 1


def test_a_redirect_is_never_passed_on() -> None:
    _, _, gateway = connected()

    gateway.packets_in(icmp_about(datagram("x"), "10.20.0.5", ICMP(type=5, gw="10.20.0.66")))

    assert gateway.tunnel.counters.filtered_answers == 1


def test_a_client_may_report_on_what_a_resource_sends_it_without_a_permission_for_icmp() -> None:
    world, client, gateway = connected(attrs.evolve(NET, filters=[UDP_5000]))

    def report(about: SuperPacket, to: str = "10.20.0.5") -> SuperPacket:
        return icmp_about(about, "100.64.0.1", ICMP(type=3, code=3), to=to)

    assert arrives(world, client, gateway, report(answer("x")))
    refused = [
        report(answer("x", port=5001)),
        report(answer("x", "10.20.0.6")),
        report(answer("x", to="100.64.0.2")),
        report(datagram("x")),
    ]
    for packet in refused:
        assert not arrives(world, client, gateway, packet)
    inject(world, client, gateway, *refused)
    assert client.tunnel.counters.filtered == gateway.tunnel.counters.filtered == len(refused)
    assert client.received == []


def test_packets_for_unknown_clients_are_dropped_and_counted() -> None:
    world, _, gateway = connected()

    gateway.packets_in(answer("to nobody", to="100.64.0.99"), answer("outside", to="192.0.2.1"))
    world.run(LATENCY)

    assert gateway.tunnel.counters.unknown_client == 2


def test_tcp_runs_are_carried_whole() -> None:
    """The filters check a run once; all its segments arrive."""
    world, client, gateway = connected(attrs.evolve(NET, filters=[UDP_5000, Filter(protocol="tcp")]))
    segments = [
        packet_of(
            built(IP(src="100.64.0.1", dst="10.20.0.5", flags="DF"), TCP(dport=80, seq=seq, flags="A"), bytes(500))
        )
        for seq in range(0, 5000, 500)
    ]

    inject(world, client, gateway, *segments)

    assert sum(packet.segments for packet in gateway.received) == 10


# Roaming, and the portal's absence


def test_while_the_portal_is_away_flows_go_on() -> None:
    world, client, gateway = connected()
    gateway.leave()
    client.leave()

    world.run(300)

    assert passes(world, client, gateway)
    assert answers(world, client, gateway)


def test_expiries_hold_while_the_portal_is_away() -> None:
    world, _, gateway = expiring(after=60)

    gateway.leave()
    world.run(61)

    assert gateway.of(FlowEnded) == [FlowEnded("client", "net", "expired")]


def test_a_gateway_that_moves_keeps_its_key_and_its_connections() -> None:
    world, client, gateway = connected()
    key = gateway.tunnel.public_key

    gateway.addresses = (SocketAddress("10.0.2.77", 52625),)
    gateway.tunnel.set_local_addresses(gateway.addresses, world.now)
    gateway.tunnel.restart_relays(world.now)
    gateway.drain()
    world.run(3)

    assert gateway.tunnel.public_key == key
    assert passes(world, client, gateway)
    assert gateway.of(ConnectionClosed | ConnectionFailed) == []


def test_candidates_found_while_the_portal_was_away_are_announced_after_the_rejoin() -> None:
    world, client, gateway = connected()
    gateway.leave()
    gateway.addresses = (*gateway.addresses, SocketAddress("10.0.2.77", 52625))
    gateway.tunnel.set_local_addresses(gateway.addresses, world.now)
    gateway.drain()
    world.run(1)
    assert announced_candidates(world, "gateway") == []

    gateway.join()
    world.run(1)

    assert any("10.0.2.77" in candidate for candidate in announced_candidates(world, "gateway"))
    assert passes(world, client, gateway)


@pytest.mark.parametrize("kind", [messages.IceCandidates, messages.InvalidateIceCandidates])
def test_of_a_message_with_too_many_candidates_the_first_are_handled(
    monkeypatch: pytest.MonkeyPatch, kind: type[messages.IceCandidates | messages.InvalidateIceCandidates]
) -> None:
    world, _, gateway = connected()
    handled: list[str] = []
    for name in ("add_remote_candidate", "remove_remote_candidate"):
        monkeypatch.setattr(gateway.tunnel.node, name, lambda peer, candidate, now: handled.append(candidate))
    many = [f"candidate:{number}" for number in range(300_000)]

    gateway.tunnel.handle_message(kind(client_id="client", candidates=many), world.now, world.utc)

    assert handled == many[:MAX_CANDIDATES]


def init(gateway: Gateway, *authorizations: Authorization) -> messages.Init:
    return messages.Init(interface=gateway.interface, authorizations=list(authorizations))


def expiry(rid: str, at: float | None) -> messages.ExpiryUpdated:
    return messages.ExpiryUpdated(client_id="client", resource_id=rid, expires_at=None if at is None else int(at))


def expiring(*, after: int) -> tuple[World, Client, Gateway]:
    """A connected pair whose flow ends after so many seconds."""
    world, client, gateway = connected()
    gateway.hear(expiry("net", world.utc + after))
    return world, client, gateway


def reason(gateway: Gateway) -> str:
    """The reason of the gateway's next timeout."""
    timeout = gateway.tunnel.next_timeout()
    assert timeout is not None
    return timeout.reason

"""Resources whose networks overlap and whose filters differ: each packet takes a way that permits it, in any order.

docs/protocol/data-plane.md, 4.2 and 6.5.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.messages.common import Filter
from tests.unit.core.tunnel.world import (
    Access,
    Client,
    Gateway,
    World,
    answer,
    arrives,
    datagram,
    fragment,
    inject,
    joined,
    ping,
)

ICMP_ONLY = Filter(protocol="icmp")
FLOW_TIME = 1.0


class Place(NamedTuple):
    """Nested networks and an address in all of them."""

    address: str
    narrow: str
    middle: str
    wide: str
    prohibited: tuple[int, int]


IPV4 = Place("10.20.0.5", "10.20.0.5/32", "10.20.0.0/24", "10.0.0.0/8", (3, 13))
IPV6 = Place("fd00:20::5", "fd00:20::5/128", "fd00:20::/64", "fd00::/16", (1, 1))
EVERYWHERE = Place("10.20.0.5", "10.20.0.5/32", "10.20.0.0/24", "0.0.0.0/0", (3, 13))
EVERYWHERE_6 = Place("fd00:20::5", "fd00:20::5/128", "fd00:20::/64", "::/0", (1, 1))
places = pytest.mark.parametrize("place", [IPV4, IPV6, EVERYWHERE, EVERYWHERE_6])


def udp(*ports: int) -> list[Filter]:
    return [Filter(protocol="udp", port_range_start=port, port_range_end=port) for port in ports]


@places
@pytest.mark.parametrize("second", ["gateway", "second"])
@pytest.mark.parametrize("ports", [[22, 80], [80, 22]])
def test_each_port_takes_the_resource_that_permits_it_from_the_first_packet(
    place: Place, second: str, ports: list[int]
) -> None:
    narrow = Access("narrow", place.narrow, "gateway", udp(22))
    wide = Access("wide", place.wide, second, udp(80))
    world, client, gateways = _world(narrow, wide)

    for port in ports:
        client.packets_in(datagram(str(port), place.address, port=port))
        world.run(FLOW_TIME)

    assert "22" in gateways["gateway"].texts()
    assert "80" in gateways[second].texts()
    assert client.errors() == []
    assert _answers(world, client, gateways["gateway"], place, 22)
    assert _answers(world, client, gateways[second], place, 80)


@places
@pytest.mark.parametrize("order", ["wide middle narrow", "narrow middle wide", "middle wide narrow"])
def test_three_nested_resources_at_three_gateways_in_any_order(place: Place, order: str) -> None:
    accesses = {
        "narrow": Access("narrow", place.narrow, "gateway", udp(22)),
        "middle": Access("middle", place.middle, "second", udp(22, 53)),
        "wide": Access("wide", place.wide, "third", udp(22, 53, 80)),
    }
    world, client, gateways = _world()
    for rid in order.split():
        client.hear(to_client.ResourceChanged(resource=world.portal.add(accesses[rid]).for_client()))

    for port in (80, 53, 22):
        client.packets_in(datagram(str(port), place.address, port=port))
        world.run(FLOW_TIME)

    assert [gateways[name].texts() for name in ("gateway", "second", "third")] == [["22"], ["53"], ["80"]]
    for name, port in (("gateway", 22), ("second", 53), ("third", 80)):
        assert _answers(world, client, gateways[name], place, port)


@places
def test_what_no_resource_permits_is_refused_once(place: Place) -> None:
    _, client, _ = _world(
        Access("narrow", place.narrow, "gateway", udp(22)), Access("wide", place.wide, "second", udp(80))
    )

    client.packets_in(datagram("neither", place.address, port=443))

    assert client.errors() == [place.prohibited]
    assert (client.ask_count(), client.tunnel.counters.filtered) == (0, 1)


@places
def test_a_ping_takes_the_resource_that_permits_icmp(place: Place) -> None:
    world, client, gateways = _world(
        Access("narrow", place.narrow, "gateway", udp(22)), Access("wide", place.wide, "second", [ICMP_ONLY])
    )

    client.packets_in(ping(place.address))
    world.run(FLOW_TIME)

    assert (len(gateways["gateway"].received), len(gateways["second"].received)) == (0, 1)
    assert client.errors() == []


@pytest.mark.parametrize("is_first", [True, False])
def test_a_fragment_takes_the_resource_that_permits_everything(is_first: bool) -> None:
    world, client, gateways = _world(
        Access("narrow", IPV4.narrow, "gateway", udp(5000)), Access("wide", IPV4.wide, "second")
    )

    client.packets_in(fragment(first=is_first))
    world.run(FLOW_TIME)

    assert (len(gateways["gateway"].received), len(gateways["second"].received)) == (0, 1)


def test_a_fragment_is_refused_where_no_resource_permits_everything() -> None:
    _, client, _ = _world(
        Access("narrow", IPV4.narrow, "gateway", udp(5000)), Access("wide", IPV4.wide, "second", udp(5000))
    )

    client.packets_in(fragment(), fragment(first=False))

    assert client.errors() == [IPV4.prohibited]  # a later fragment is never answered
    assert client.tunnel.counters.filtered == 2


@places
def test_traffic_moves_when_filters_change_later(place: Place) -> None:
    narrow, wide = Access("narrow", place.narrow, "gateway", udp(22)), Access("wide", place.wide, "second", udp(80))
    world, client, gateways = _world(narrow, wide)
    steps = [(udp(22), "second"), (udp(22, 80), "gateway"), ([], "gateway"), ([ICMP_ONLY], "second")]

    for number, (filters, expected) in enumerate(steps):
        changed = world.portal.add(attrs.evolve(narrow, filters=filters))
        client.hear(to_client.ResourceChanged(resource=changed.for_client()))
        gateways["gateway"].hear(to_gateway.ResourceUpdated(resource=changed.for_gateway()))
        client.packets_in(datagram(str(number), place.address, port=80))
        world.run(FLOW_TIME)
        assert gateways[expected].texts()[-1] == str(number)

    assert client.errors() == []


@places
def test_when_a_resource_in_use_goes_the_next_that_permits_the_packet_takes_over(place: Place) -> None:
    world, client, gateways = _world(
        Access("narrow", place.narrow, "gateway", udp(22, 80)),
        Access("middle", place.middle, "second", udp(22)),
        Access("wide", place.wide, "third", udp(80)),
    )
    client.packets_in(datagram("before", place.address, port=80))
    world.run(FLOW_TIME)

    client.hear(to_client.ResourceDeleted(id="narrow"))
    client.packets_in(datagram("web", place.address, port=80), datagram("shell", place.address, port=22))
    world.run(FLOW_TIME)

    assert [gateways[name].texts() for name in ("gateway", "second", "third")] == [["before"], ["shell"], ["web"]]
    inject(world, gateways["gateway"], client, answer("too late", place.address, port=80))
    assert client.texts() == []


@places
@pytest.mark.parametrize("second", ["gateway", "second"])
def test_two_resources_of_the_same_network_share_its_ports(place: Place, second: str) -> None:
    world, client, gateways = _world(
        Access("one", place.middle, "gateway", udp(22)), Access("two", place.middle, second, udp(80))
    )

    for port in (22, 80, 22, 80):
        client.packets_in(datagram(str(port), place.address, port=port))
        world.run(FLOW_TIME)

    assert (client.ask_count("one"), client.ask_count("two"), client.errors()) == (1, 1, [])
    assert _answers(world, client, gateways["gateway"], place, 22)
    assert _answers(world, client, gateways[second], place, 80)


@pytest.mark.parametrize(("used", "other"), [("one", "two"), ("two", "one")])
def test_a_flow_for_another_port_does_not_move_a_connection_to_another_gateway(used: str, other: str) -> None:
    """Both permit port 80 of the same network. The resource in use keeps it when the other one gets a flow."""
    world, client, gateways = _world()
    world.portal.add(Access(used, IPV4.middle, "gateway", udp(80, 22)))
    world.portal.add(Access(other, IPV4.middle, "second", udp(80, 53)))
    client.hear(to_client.ResourceChanged(resource=world.portal.resources[used].for_client()))
    client.packets_in(datagram("first", port=80))
    world.run(FLOW_TIME)
    client.hear(to_client.ResourceChanged(resource=world.portal.resources[other].for_client()))

    client.packets_in(datagram("other port", port=53))
    world.run(FLOW_TIME)
    client.packets_in(datagram("again", port=80))
    world.run(FLOW_TIME)

    assert gateways["gateway"].texts() == ["first", "again"]
    assert gateways["second"].texts() == ["other port"]


@places
def test_at_one_gateway_a_client_has_the_ports_of_all_its_resources_until_one_is_revoked(place: Place) -> None:
    world, client, gateways = _world(
        Access("narrow", place.narrow, "gateway", udp(22)), Access("wide", place.wide, "gateway", udp(80))
    )
    gateway = gateways["gateway"]
    for port in (22, 80):
        client.packets_in(datagram("hello", place.address, port=port))
        world.run(FLOW_TIME)

    gateway.hear(to_gateway.RejectAccess(client_id="client", resource_id="narrow"))

    assert arrives(world, client, gateway, datagram("web", place.address, port=80))
    assert not arrives(world, client, gateway, datagram("shell", place.address, port=22))


_RESOURCES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(
        st.sampled_from([*IPV4[1:4], *IPV6[1:4], "0.0.0.0/0", "::/0"]),
        st.lists(st.sampled_from([22, 53, 80]), max_size=2, unique=True),
    ),
    max_size=6,
)


@given(_RESOURCES, st.sampled_from([22, 53, 80, 443]), st.sampled_from([IPV4, IPV6]))
def test_a_packet_asks_for_the_most_specific_resource_that_permits_it(
    resources: dict[str, tuple[str, list[int]]], port: int, place: Place
) -> None:
    accesses = [Access(rid, network, "gateway", udp(*ports)) for rid, (network, ports) in resources.items()]
    world, client, _ = _world(*accesses)
    world.portal.mute = True

    client.packets_in(datagram("hello", place.address, port=port))
    world.run(FLOW_TIME)

    address = ipaddress.ip_address(place.address)
    holding = [rid for rid, (network, _) in resources.items() if address in ipaddress.ip_network(network)]
    able = [rid for rid in holding if not resources[rid][1] or port in resources[rid][1]]
    able.sort(key=lambda rid: (ipaddress.ip_network(resources[rid][0]).prefixlen, rid), reverse=True)
    asked = [heard.message for heard in world.portal.heard if isinstance(heard.message, to_client.CreateFlow)]
    assert [message.resource_id for message in asked] == able[:1]
    assert client.errors() == ([place.prohibited] if holding and not able else [])
    assert client.tunnel.counters.without_resource == (not holding)


def _world(*accesses: Access) -> tuple[World, Client, dict[str, Gateway]]:
    """A client that has exactly these resources, and three gateways: "gateway", "second" and "third"."""
    world, client, gateway = joined(*accesses) if accesses else _without_resources()
    gateways = {"gateway": gateway}
    for number, name in enumerate(("second", "third"), 201):
        gateways[name] = world.add_gateway(name, number)
        gateways[name].join()
    world.run(FLOW_TIME)
    return world, client, gateways


def _without_resources() -> tuple[World, Client, Gateway]:
    world, client, gateway = joined()
    world.portal.resources.clear()
    client.hear(to_client.ResourceDeleted(id="net"))
    return world, client, gateway


def _answers(world: World, client: Client, gateway: Gateway, place: Place, port: int) -> bool:
    return arrives(world, gateway, client, answer("does it come back", place.address, port=port))

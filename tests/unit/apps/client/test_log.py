"""The client's log: names beside ids, and what is limited."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from firezone_tunnel.apps.client.service import ClientService
from firezone_tunnel.core.messages import client as messages
from firezone_tunnel.core.messages.common import Filter, IceCredentials, Interface, Site
from firezone_tunnel.core.packet.superpacket import TCP
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import ConnectionEstablished, PairNominated
from firezone_tunnel.core.tunnel.base import ToPortal
from firezone_tunnel.core.tunnel.client import PacketFiltered
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig

CREDENTIALS = IceCredentials(username="u", password="p")
LOCAL, REMOTE = SocketAddress("192.0.2.1", 1), SocketAddress("192.0.2.2", 2)


@pytest_twisted.async_yield_fixture
async def client(tmp_path: Path) -> AsyncIterator[ClientService]:
    url = LoginUrl.client("ws://192.0.2.9", "t", device_id="d", name="n")
    client = ClientService(reactor, EndpointConfig(url, tmp_path))
    web = messages.CidrResource(
        id="web",
        name="Web server",
        address="10.20.0.100/32",
        gateway_groups=[Site(id="hq", name="HQ")],
        filters=[Filter(protocol="tcp", port_range_start=80, port_range_end=80)],
    )
    interface = Interface(ipv4=ipaddress.IPv4Address("100.64.0.1"), ipv6=ipaddress.IPv6Address("fd00:2021:1111::1"))
    client.message_received(messages.Init(interface=interface, resources=[web]))
    yield client
    await client.stopService()


def test_an_offline_gateway_is_a_warning_with_resource_and_site(
    client: ClientService, logged: list[dict[str, Any]]
) -> None:
    for _ in range(1000):
        client.message_received(messages.FlowCreationFailed(resource_id="web", reason="offline"))

    (message,) = logged
    assert (message["message_type"], message["level"]) == ("tunnel:gateway_offline", "warning")
    assert (message["rid"], message["resource"], message["site"]) == ("web", "Web server", "HQ")


def test_a_refusal_is_a_warning_with_its_reason(client: ClientService, logged: list[dict[str, Any]]) -> None:
    refusal = messages.FlowCreationFailed(resource_id="web", reason="forbidden", violated_properties=["remote_ip"])

    client.message_received(refusal)

    (message,) = logged
    assert (message["message_type"], message["level"]) == ("tunnel:flow_refused", "warning")
    assert (message["resource"], message["reason"], message["violated"]) == ("Web server", "forbidden", ["remote_ip"])


def test_a_filtered_packet_is_a_warning_with_what_is_allowed(
    client: ClientService, logged: list[dict[str, Any]]
) -> None:
    for _ in range(1000):
        client.handle_event(PacketFiltered("web", TCP, 22))

    (message,) = logged
    assert (message["message_type"], message["level"]) == ("tunnel:packet_filtered", "warning")
    assert (message["rid"], message["resource"]) == ("web", "Web server")
    assert (message["packet"], message["allows"]) == ("tcp/22", "tcp/80")


def test_an_id_without_a_name_is_logged_alone(client: ClientService, logged: list[dict[str, Any]]) -> None:
    client.handle_event(PacketFiltered("unknown", 47, 0))

    (message,) = logged
    assert (message["rid"], message["packet"]) == ("unknown", "protocol 47")
    assert "resource" not in message


def test_debug_shows_flows_candidates_pairs_and_filter_decisions(
    client: ClientService, logged: list[dict[str, Any]]
) -> None:
    log.set_threshold(log.DEBUG)
    local, remote = ["candidate:1 local"], ["candidate:2 remote"]

    client._handle_event(ToPortal(messages.CreateFlow(resource_id="web", connected_gateway_ids=[])))
    client.message_received(_flow_created())
    client._handle_event(ToPortal(messages.BroadcastIceCandidates(gateway_ids=["gw"], candidates=local)))
    client._handle_message("ice_candidates", {"gateway_id": "gw", "candidates": remote})
    client._handle_event(ToPortal(messages.BroadcastInvalidatedIceCandidates(gateway_ids=["gw"], candidates=local)))
    client._handle_message("invalidate_ice_candidates", {"gateway_id": "gw", "candidates": remote})
    client._handle_event(PairNominated("gw", "host", LOCAL, "srflx", REMOTE))
    client._handle_event(ConnectionEstablished("gw", "direct", LOCAL, REMOTE))
    for _ in range(2):
        client.handle_event(PacketFiltered("web", TCP, 22))

    types = [message["message_type"] for message in logged]
    assert types == [
        "tunnel:flow_requested",
        "tunnel:flow_created",
        "tunnel:candidates_added",
        "tunnel:candidates_added",
        "tunnel:candidates_removed",
        "tunnel:candidates_removed",
        "tunnel:pair_nominated",
        "tunnel:connection_established",
        "tunnel:packet_filtered",
        "tunnel:packet_filtered",
    ]
    assert [message.get("side") for message in logged[2:6]] == ["local", "remote", "local", "remote"]
    assert all(message["resource"] == "Web server" for message in logged[:2])
    assert all((message["gid"], message["site"]) == ("gw", "HQ") for message in logged[1:8])
    assert (logged[6]["local"], logged[6]["remote"]) == ("host 192.0.2.1:1", "srflx 192.0.2.2:2")


@pytest.mark.parametrize("level", [log.INFO, log.DEBUG])
def test_neither_credentials_nor_keys_are_logged(
    client: ClientService, logged: list[dict[str, Any]], level: int
) -> None:
    log.set_threshold(level)

    client.message_received(_flow_created())

    assert "secret" not in str(logged)


def _flow_created() -> messages.FlowCreated:
    return messages.FlowCreated(
        resource_id="web",
        gateway_id="gw",
        gateway_public_key=bytes(32),
        gateway_ipv4="100.64.0.2",
        gateway_ipv6="fd00:2021:1111::2",
        gateway_group_id="hq",
        preshared_key=b"secret".ljust(32),
        client_ice_credentials=CREDENTIALS,
        gateway_ice_credentials=IceCredentials(username="u", password="secret"),
    )

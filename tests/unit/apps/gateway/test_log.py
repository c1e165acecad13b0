"""The gateway's log: names beside ids, and what is limited."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from firezone_tunnel.apps.gateway.service import GatewayService
from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.packet.superpacket import TCP
from firezone_tunnel.core.tunnel.gateway import PacketFiltered
from firezone_tunnel.shell.logs import events as log

RESOURCES = {
    "wide": ("Lab", "10.20.0.0/16", [{"protocol": "icmp"}]),
    "narrow": ("Web server", "10.20.0.100/32", [{"protocol": "tcp", "port_range_start": 80, "port_range_end": 90}]),
}


@pytest_twisted.async_yield_fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GatewayService]:
    gateway = GatewayService(
        reactor, url="ws://192.0.2.9", token="t", device_id="d", name="n", state_directory=tmp_path
    )
    yield gateway
    await gateway.stopService()


@pytest.mark.parametrize(
    ("client", "fields"), [({"name": "laptop"}, {"client": "laptop"}), ({"name": None}, {}), ({}, {})]
)
def test_a_flow_has_the_names_that_the_portal_sends(
    gateway: GatewayService, logged: list[dict[str, Any]], client: dict[str, Any], fields: dict[str, str]
) -> None:
    _authorize(gateway, "narrow", **client)
    gateway._handle_message("reject_access", {"client_id": "c", "resource_id": "narrow"})
    gateway._tunnel.settle()

    authorized, ended = (message for message in logged if message["message_type"].startswith("gateway:flow"))
    for message in (authorized, ended):
        named = {name: message[name] for name in ("cid", "rid", "resource", "client") if name in message}
        assert named == {"cid": "c", "rid": "narrow", "resource": "Web server", **fields}
    assert ended["reason"] == "rejected"


def test_a_flow_that_is_ignored_is_named_and_limited(gateway: GatewayService, logged: list[dict[str, Any]]) -> None:
    dns = {"id": "wiki", "type": "dns", "name": "Wiki", "address": "wiki.example", "filters": []}
    for _ in range(10):
        gateway._handle_message("authorize_flow", _payload(dns, name="laptop"))
        gateway._tunnel.settle()

    (message,) = logged
    assert (message["message_type"], message["level"]) == ("gateway:flow_ignored", "warning")
    assert (message["resource"], message["client"]) == ("Wiki", "laptop")


@pytest.mark.parametrize(
    ("destination", "fields"),
    [
        ("10.20.0.100", {"rid": "narrow", "resource": "Web server", "allows": "tcp/80-90"}),
        ("10.20.0.1", {"rid": "wide", "resource": "Lab", "allows": "icmp"}),
        ("10.30.0.1", {"allows": "nothing"}),
        ("fd00::1", {"allows": "nothing"}),
    ],
)
def test_a_filtered_packet_is_a_warning_with_the_resource_and_what_it_allows(
    gateway: GatewayService, logged: list[dict[str, Any]], destination: str, fields: dict[str, str]
) -> None:
    for rid in RESOURCES:
        _authorize(gateway, rid, name="laptop")
    logged.clear()

    for _ in range(1000):
        gateway.handle_event(PacketFiltered("c", ipaddress.ip_address(destination).packed, TCP, 22))

    (message,) = logged
    assert (message["message_type"], message["level"]) == ("gateway:packet_filtered", "warning")
    assert (message["cid"], message["client"], message["packet"]) == ("c", "laptop", "tcp/22")
    assert {name: message[name] for name in ("rid", "resource", "allows") if name in message} == fields


def test_debug_shows_each_filter_decision_and_change(gateway: GatewayService, logged: list[dict[str, Any]]) -> None:
    log.set_threshold(log.DEBUG)
    _authorize(gateway, "narrow")
    logged.clear()

    name, address, _ = RESOURCES["narrow"]
    changed = {"id": "narrow", "type": "cidr", "name": name, "address": address, "filters": [{"protocol": "udp"}]}
    gateway._handle_message("resource_updated", changed)
    for _ in range(3):
        gateway.handle_event(PacketFiltered("c", ipaddress.ip_address("10.20.0.100").packed, TCP, 22))

    assert [(message["message_type"], message["level"], message["allows"]) for message in logged] == [
        ("gateway:filters_changed", "debug", "udp"),
        ("gateway:packet_filtered", "warning", "udp"),
        ("gateway:packet_filtered", "debug", "udp"),
        ("gateway:packet_filtered", "debug", "udp"),
    ]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Filter(protocol="icmp"), "icmp"),
        (Filter(protocol="udp"), "udp"),
        (Filter(protocol="tcp", port_range_start=80, port_range_end=80), "tcp/80"),
        (Filter(protocol="tcp", port_range_start=1, port_range_end=65535), "tcp/1-65535"),
    ],
)
def test_a_filter_reads_as_in_the_portals_file(given: Filter, text: str) -> None:
    assert str(given) == text


def _authorize(gateway: GatewayService, rid: str, **client: Any) -> None:
    name, address, filters = RESOURCES[rid]
    resource = {"id": rid, "type": "cidr", "name": name, "address": address, "filters": filters}
    gateway._handle_message("authorize_flow", _payload(resource, **client))
    gateway._tunnel.settle()


def _payload(resource: dict[str, Any], **client: Any) -> dict[str, Any]:
    key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    peer = {"id": "c", "public_key": key, "preshared_key": key, "ipv4": "100.64.0.7", "ipv6": "fd00:2021:1111::7"}
    return {
        "ref": "ref",
        "resource": resource,
        "client": {**peer, **client},
        "client_ice_credentials": {"username": "aaaa", "password": "p" * 22},
        "gateway_ice_credentials": {"username": "bbbb", "password": "p" * 22},
        "expires_at": None,
    }

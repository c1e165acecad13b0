"""A client's resources in its log."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from firezone_tunnel.apps.client import resource_log
from firezone_tunnel.apps.client.resource_log import MAX_LISTED, ResourceLog
from firezone_tunnel.core.messages.client import (
    CidrResource,
    Init,
    InternetResource,
    Resource,
    ResourceChanged,
    ResourceDeleted,
)
from firezone_tunnel.core.messages.common import Filter, Interface, Site

HQ = Site(id="hq", name="HQ")
WEB = CidrResource(
    id="web",
    name="Web server",
    address="10.20.0.100/32",
    gateway_groups=[HQ],
    filters=[Filter(protocol="tcp", port_range_start=80, port_range_end=80), Filter(protocol="icmp")],
)
LAB = CidrResource(id="lab", name="Lab", address="172.20.0.0/16", gateway_groups=[HQ, Site(id="b", name="Branch")])
INTERNET = InternetResource(id="all", gateway_groups=[HQ])


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> Iterator[ResourceLog]:
    monkeypatch.setattr(resource_log, "GATHERING_TIME", 0.001)
    resources = ResourceLog(reactor)
    yield resources
    resources.close()


def test_the_list_is_logged_when_the_tunnel_is_ready(resources: ResourceLog, logged: list[dict[str, Any]]) -> None:
    resources.handle_message(_init(WEB, LAB, INTERNET))
    assert logged == []

    resources.ready()

    (message,) = logged
    assert (message["message_type"], message["level"], message["count"]) == ("client:resources_listed", "info", 3)
    assert message["resources"] == [
        {"rid": "web", "resource": "Web server", "site": "HQ", "allows": "tcp/80, icmp", "address": "10.20.0.100/32"},
        {"rid": "lab", "resource": "Lab", "site": "HQ, Branch", "allows": "everything", "address": "172.20.0.0/16"},
        {"rid": "all", "resource": "Internet Resource", "site": "HQ", "allows": "everything"},
    ]


@pytest_twisted.ensureDeferred
async def test_each_later_change_is_logged(resources: ResourceLog, logged: list[dict[str, Any]]) -> None:
    resources.handle_message(_init(WEB))
    resources.ready()
    moved = CidrResource(id="web", name="Web server", address="10.20.0.200/32", gateway_groups=[HQ])

    resources.handle_message(ResourceChanged(resource=LAB))
    await _gathered()
    resources.handle_message(ResourceChanged(resource=moved))
    await _gathered()
    resources.handle_message(ResourceDeleted(id="lab"))
    await _gathered()
    resources.handle_message(_init(INTERNET))  # the portal was away meanwhile
    await _gathered()

    changes = [message for message in logged if message["message_type"] == "client:resources_changed"]
    assert [_ids(message) for message in changes] == [
        {"added": ["lab"]},
        {"changed": ["web"]},
        {"removed": ["lab"]},
        {"added": ["all"], "removed": ["web"]},
    ]
    assert changes[1]["changed"][0]["address"] == "10.20.0.200/32"
    assert changes[3]["removed"][0]["resource"] == "Web server"


@pytest_twisted.ensureDeferred
async def test_what_does_not_change_is_not_logged(resources: ResourceLog, logged: list[dict[str, Any]]) -> None:
    resources.handle_message(_init(WEB))
    resources.ready()

    resources.handle_message(_init(WEB))
    resources.handle_message(ResourceDeleted(id="unknown"))
    resources.handle_message(ResourceChanged(resource=LAB))
    resources.handle_message(ResourceDeleted(id="lab"))
    await _gathered()

    assert [message["message_type"] for message in logged] == ["client:resources_listed"]


@pytest_twisted.ensureDeferred
async def test_many_changes_become_one_short_message(resources: ResourceLog, logged: list[dict[str, Any]]) -> None:
    resources.handle_message(_init())
    resources.ready()

    for number in range(2000):
        resources.handle_message(ResourceChanged(resource=_numbered(number)))
    await _gathered()

    (message,) = logged[1:]
    assert (message["count"], len(message["added"])) == (2000, MAX_LISTED)


def test_nothing_is_logged_after_the_end(resources: ResourceLog, logged: list[dict[str, Any]]) -> None:
    resources.ready()
    resources.close()

    resources.handle_message(_init(WEB))

    assert len(logged) == 1


def _init(*resources: Resource) -> Init:
    interface = Interface(ipv4=ipaddress.IPv4Address("100.64.0.1"), ipv6=ipaddress.IPv6Address("fd00:2021:1111::1"))
    return Init(interface=interface, resources=list(resources))


def _numbered(number: int) -> CidrResource:
    address = f"10.{number >> 8}.{number & 255}.0/24"
    return CidrResource(id=f"r{number}", name=f"Net {number}", address=address, gateway_groups=[HQ])


def _ids(message: dict[str, Any]) -> dict[str, list[str]]:
    kinds = ("added", "changed", "removed")
    return {kind: [entry["rid"] for entry in message[kind]] for kind in kinds if kind in message}


async def _gathered() -> None:
    await deferLater(reactor, 0.02, lambda: None)

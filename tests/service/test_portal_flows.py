"""Flows and candidates, over real WebSockets."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from firezone_tunnel.core.messages import client as client_messages
from firezone_tunnel.core.messages import gateway as gateway_messages
from firezone_tunnel.core.messages.common import MAX_CANDIDATES
from firezone_tunnel.core.portal.derived_credentials import FOREVER
from tests.service.portal_peers import LAB_ID, SITE_ID, WIKI_ID, Peer, Portal, key, start_portal, stop_portal, until

_NAMES = {
    False: ("create_flow", "authorize_flow", "flow_authorized", "flow_created", "flow_creation_failed"),
    True: (
        "request_authorization",
        "create_authorization",
        "authorization_created",
        "authorization_created",
        "authorization_creation_failed",
    ),
}
_CANDIDATES = ["candidate:1 1 udp 2113929471 192.0.2.5 51820 typ host"]


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(tmp_path)
    yield portal
    await stop_portal(portal)


@pytest.mark.parametrize("client_v2", [False, True])
@pytest.mark.parametrize("gateway_v2", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_flow_is_granted_under_the_names_of_each_sides_generation(
    portal: Portal, client_v2: bool, gateway_v2: bool
) -> None:
    gateway = await portal.join("gateway", v2=gateway_v2)
    client = await portal.join("client", v2=client_v2)

    client.send(_NAMES[client_v2][0], {"resource_id": LAB_ID, "connected_gateway_ids": []})
    asked = await gateway.receive(_NAMES[gateway_v2][1])
    gateway.send(_NAMES[gateway_v2][2], {"ref": asked["ref"]})
    created = await client.receive(_NAMES[client_v2][3])

    assert await gateway.receive("phx_reply") == {"status": "ok", "response": {}}
    assert asked["resource"] == {
        "id": LAB_ID, "type": "cidr", "name": "Lab", "address": "172.20.0.0/16", "filters": [],
    }  # fmt: skip
    assert asked["client"]["public_key"] == key(1)
    assert asked["client"]["ipv4"] == client.init["interface"]["ipv4"]
    assert asked["client"]["preshared_key"] == created["preshared_key"]
    assert asked["expires_at"] == FOREVER
    assert asked["use_iceless"] is created["use_iceless"] is False
    assert created["gateway_public_key"] == key(2)
    assert created["gateway_ipv6"] == gateway.init["interface"]["ipv6"]
    assert created["site_id" if client_v2 else "gateway_group_id"] == SITE_ID
    for side in ("client_ice_credentials", "gateway_ice_credentials"):
        assert asked[side] == created[side]
    assert isinstance(gateway_messages.parse(_NAMES[gateway_v2][1], asked), gateway_messages.AuthorizeFlow)
    assert isinstance(client_messages.parse(_NAMES[client_v2][3], created), client_messages.FlowCreated)


@pytest_twisted.ensureDeferred
async def test_both_sides_get_an_ingest_token_with_their_role(portal: Portal) -> None:
    gateway, client = await _pair(portal)

    asked, created = await _flow(gateway, client)

    tokens = {"responder": asked["flow_logs_ingest_token"], "initiator": created["flow_logs_ingest_token"]}
    for role, token in tokens.items():
        header, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in token.split("."))
        assert json.loads(header)["alg"] == "HS256"
        assert len(signature) == 32
        assert json.loads(claims)["role"] == role
        assert json.loads(claims)["uploads_enabled"] is False
        assert json.loads(claims)["resource_name"] == "Lab"


@pytest.mark.parametrize("v2", [False, True])
@pytest_twisted.ensureDeferred
async def test_names_of_the_other_generation_are_unknown(portal: Portal, v2: bool) -> None:
    client = await portal.join("client", v2=v2)

    client.send(_NAMES[not v2][0], {"resource_id": LAB_ID, "connected_gateway_ids": []})

    assert await client.receive("phx_reply") == {"status": "error", "response": {"reason": "unknown_message"}}


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        ("create_flow", {"resource_id": LAB_ID}),
        ("create_flow", None),
        ("create_flow", {"resource_id": 7, "connected_gateway_ids": []}),
        ("no_such_event", {}),
        ("broadcast_ice_candidates", {"gateway_ids": "all", "candidates": []}),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_malformed_or_unknown_message_is_answered_and_the_channel_lives_on(
    portal: Portal, event: str, payload: Any
) -> None:
    client = await portal.join("client")

    client.send(event, payload)

    assert await client.receive("phx_reply") == {"status": "error", "response": {"reason": "unknown_message"}}
    assert await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_an_unknown_resource_is_not_found(portal: Portal) -> None:
    client = await portal.join("client")

    assert await _failure(client, "00000000-0000-4000-8000-000000000000") == "not_found"


@pytest_twisted.ensureDeferred
async def test_without_a_gateway_of_the_site_it_is_offline(portal: Portal) -> None:
    client = await portal.join("client")

    assert await _failure(client, LAB_ID) == "offline"


@pytest_twisted.ensureDeferred
async def test_a_gateway_that_does_not_answer_in_15_seconds_is_offline_and_its_late_answer_is_ignored(
    portal: Portal,
) -> None:
    gateway, client = await _pair(portal)
    client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
    asked = await gateway.receive("authorize_flow")

    portal.advance(14.0)
    assert await client.settle() == []
    portal.advance(1.5)

    assert (await client.receive("flow_creation_failed"))["reason"] == "offline"
    gateway.send("flow_authorized", {"ref": asked["ref"]})
    assert (await gateway.receive("phx_reply"))["status"] == "ok"
    assert await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_the_log_names_devices_and_resources_beside_their_ids(
    portal: Portal, logged: list[dict[str, Any]]
) -> None:
    gateway = await portal.join("gateway", name="rack 1")
    client = await portal.join("client", name="laptop")
    await _flow(gateway, client)
    assert await portal.reseed(("172.20.0.0/16", "172.40.0.0/16"))

    by_type = {message["message_type"]: message for message in logged}
    for kind in ("granted", "authorized", "revoked"):
        message = by_type[f"portal:flow_{kind}"]
        assert (message["rid"], message["resource"]) == (LAB_ID, "Lab")
        assert (message["client"], message["gateway"]) == ("laptop", "rack 1")
        assert {"cid", "gid"} <= message.keys()
    connected = [message for message in logged if message["message_type"] == "portal:device_connected"]
    assert [message.get("gateway") or message.get("client") for message in connected] == ["rack 1", "laptop"]
    assert connected[0]["site"] == "HQ"


@pytest.mark.parametrize(("agent", "is_sent"), [(None, False), ("firezone_tunnel/0.1.0", True)])
@pytest_twisted.ensureDeferred
async def test_only_our_own_gateways_are_sent_the_clients_name(
    portal: Portal, agent: str | None, is_sent: bool
) -> None:
    agent = agent and f"Linux/6.1 connlib/1.5.12 (x86_64; {agent})"
    gateway = await portal.join("gateway", agent=agent)
    client = await portal.join("client", name="laptop")

    asked, _ = await _flow(gateway, client)

    assert asked["client"].get("name") == ("laptop" if is_sent else None)


@pytest_twisted.ensureDeferred
async def test_a_second_request_takes_the_place_of_the_first(portal: Portal) -> None:
    gateway, client = await _pair(portal)
    for _ in range(2):
        client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
    first, second = [await gateway.receive("authorize_flow") for _ in range(2)]

    gateway.send("flow_authorized", {"ref": first["ref"]})
    await gateway.receive("phx_reply")
    assert await client.settle() == []
    gateway.send("flow_authorized", {"ref": second["ref"]})

    await client.receive("flow_created")
    assert await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_forged_or_foreign_ref_is_invalid(portal: Portal) -> None:
    gateway, client = await _pair(portal)
    client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
    reference = (await gateway.receive("authorize_flow"))["ref"]
    other = await portal.join("gateway", external_id="gateway-2", public_key=key(3))
    tampered = ("B" if reference[0] == "A" else "A") + reference[1:]

    for peer, ref in (
        (gateway, tampered),
        (gateway, "dev-ref-0001"),
        (gateway, ""),
        (gateway, "é"),
        (other, reference),
    ):
        peer.send("flow_authorized", {"ref": ref})
        assert await peer.receive("phx_reply") == {"status": "error", "response": {"reason": "invalid_ref"}}
    assert await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_policy_whose_conditions_do_not_hold_hides_its_resource(portal: Portal) -> None:
    await _restrict_lab(portal, '["192.0.2.0/24"]')

    client = await portal.join("client")

    assert [resource["id"] for resource in client.init["resources"]] == [WIKI_ID]
    assert await _failure(client, LAB_ID) == "not_found"


@pytest_twisted.ensureDeferred
async def test_a_window_that_has_just_closed_is_forbidden_and_named(portal: Portal) -> None:
    weekday = "MTWRFSU"[datetime.fromtimestamp(portal.clock.utc_now(), UTC).weekday()]
    await _condition_on_lab(
        portal,
        '{ property = "current_utc_datetime", operator = "is_in_day_of_week_time_ranges", '
        f'values = ["{weekday}/true/UTC"] }}',
    )
    gateway, client = await _pair(portal)
    asked, _ = await _flow(gateway, client)

    portal.clock.offset += 24 * 3600
    client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})

    midnight = datetime.fromtimestamp(asked["expires_at"], UTC)
    assert (midnight.hour, midnight.minute, midnight.second) == (0, 0, 0)
    failure = await client.receive("flow_creation_failed")
    assert (failure["reason"], failure["violated_properties"]) == ("forbidden", ["current_utc_datetime"])
    portal.advance(60)
    assert await client.receive("resource_deleted") == LAB_ID


@pytest_twisted.ensureDeferred
async def test_v2_peers_more_than_a_minor_version_apart_are_not_connected(portal: Portal) -> None:
    await portal.join("gateway", v2=True)
    client = await portal.join("client", v2=True, agent="Linux/6.8 headless-client/1.9.0")

    client.send("request_authorization", {"resource_id": LAB_ID})

    assert (await client.receive("authorization_creation_failed"))["reason"] == "version_mismatch"


@pytest_twisted.ensureDeferred
async def test_a_gateway_that_the_client_is_connected_to_is_preferred(portal: Portal) -> None:
    gateways = [
        await portal.join("gateway", external_id=f"gateway-{number}", public_key=key(number)) for number in range(2, 8)
    ]
    client = await portal.join("client")
    client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
    chosen = await _who_is_asked(gateways)
    asked = await chosen.receive("authorize_flow")
    chosen.send("flow_authorized", {"ref": asked["ref"]})
    gateway_id = (await client.receive("flow_created"))["gateway_id"]

    for _ in range(5):
        client.send("create_flow", {"resource_id": WIKI_ID, "connected_gateway_ids": [gateway_id]})
        await chosen.receive("authorize_flow")


@pytest_twisted.ensureDeferred
async def test_of_a_message_with_too_many_candidates_the_first_are_passed_on(
    portal: Portal, logged: list[dict[str, Any]]
) -> None:
    gateway, client = await _pair(portal, v2=True)
    asked, created = await _flow(gateway, client, v2=True)
    cid, gid = asked["client"]["id"], created["gateway_id"]
    many = [f"candidate:{number}" for number in range(50_000)]

    for event in ("ice_candidates", "invalidate_ice_candidates"):
        sent = "broadcast_invalidated_ice_candidates" if "invalidate" in event else "broadcast_ice_candidates"
        client.send(sent, {"gateway_ids": [gid, *many], "candidates": many})
        gateway.send(sent, {"client_ids": [cid, *many], "candidates": many})
        assert (await gateway.receive(event))["candidates"] == many[:MAX_CANDIDATES]
        assert (await client.receive(event))["candidates"] == many[:MAX_CANDIDATES]

    cut = [message for message in logged if message["message_type"] == "portal:message_cut"]
    assert [(one["recipients"], one["candidates"]) for one in cut if one["level"] == "warning"] == [
        (50_001, 50_000)
    ] * 2


@pytest_twisted.ensureDeferred
async def test_candidates_go_to_the_addressed_peer_unchanged_and_in_order(portal: Portal) -> None:
    gateway, client = await _pair(portal, v2=True)
    asked, created = await _flow(gateway, client, v2=True)
    bystander = await portal.join("gateway", external_id="gateway-2", public_key=key(3))
    cid, gid = asked["client"]["id"], created["gateway_id"]

    client.send("broadcast_ice_candidates", {"gateway_ids": [gid, gid], "candidates": _CANDIDATES})
    client.send("new_gateway_ice_candidates", {"gateway_id": gid, "candidates": ["second"]})
    client.send("invalidate_gateway_ice_candidates", {"gateway_id": gid, "candidates": _CANDIDATES})
    client.send("broadcast_invalidated_ice_candidates", {"gateway_ids": [gid], "candidates": ["second"]})
    client.send("broadcast_ice_candidates", {"gateway_ids": [gid], "candidates": []})
    gateway.send("broadcast_ice_candidates", {"client_ids": [cid], "candidates": _CANDIDATES})
    gateway.send("broadcast_invalidated_ice_candidates", {"client_ids": [cid], "candidates": _CANDIDATES})

    assert [await gateway.receive("ice_candidates") for _ in range(2)] == [
        {"client_id": cid, "candidates": _CANDIDATES},
        {"client_id": cid, "candidates": ["second"]},
    ]
    assert [(await gateway.receive("invalidate_ice_candidates"))["candidates"] for _ in range(2)] == [
        _CANDIDATES,
        ["second"],
    ]
    assert await client.receive("ice_candidates") == {"gateway_id": gid, "candidates": _CANDIDATES}
    assert await client.receive("invalidate_ice_candidates") == {"gateway_id": gid, "candidates": _CANDIDATES}
    assert await gateway.settle() == await client.settle() == await bystander.settle() == []


@pytest_twisted.ensureDeferred
async def test_capabilities_are_accepted_in_silence(portal: Portal) -> None:
    gateway, client = await _pair(portal, v2=True)

    for peer in (gateway, client):
        peer.send("set_snownet_capabilities", {"iceless": True, "new": 1})
        assert await peer.settle() == []
    asked, created = await _flow(gateway, client, v2=True)

    assert asked["use_iceless"] is created["use_iceless"] is False


@pytest_twisted.ensureDeferred
async def test_a_gateway_that_reconnects_gets_its_grants_even_from_a_restarted_portal(
    portal: Portal, tmp_path: Path
) -> None:
    gateway, client = await _pair(portal)
    asked, _ = await _flow(gateway, client)
    granted = [{"client_id": asked["client"]["id"], "resource_id": LAB_ID, "expires_at": FOREVER}]

    again = await portal.join("gateway")
    assert again.init["authorizations"] == granted
    await stop_portal(portal)
    successor = await start_portal(tmp_path)
    third = await successor.join("gateway")

    assert third.init["authorizations"] == granted
    assert third.init["interface"] == gateway.init["interface"]
    await stop_portal(successor)


@pytest_twisted.ensureDeferred
async def test_a_flow_ends_with_the_clients_token_and_is_forgotten_then(portal: Portal) -> None:
    ends = int(portal.clock.utc_now()) + 3600
    await portal.reseed(('actor = "Dev User"', f'actor = "Dev User"\nexpires_at = {_toml_time(ends)}'))
    gateway, client = await _pair(portal)

    asked, _ = await _flow(gateway, client)
    assert asked["expires_at"] == ends
    portal.advance(3601)

    assert await client.receive("disconnect") == {"reason": "token_expired"}
    assert await client.closed() == 1000
    again = await portal.join("gateway")
    assert again.init["authorizations"] == []


async def _pair(portal: Portal, *, v2: bool = False) -> tuple[Peer, Peer]:
    return await portal.join("gateway", v2=v2), await portal.join("client", v2=v2)


async def _flow(gateway: Peer, client: Peer, *, v2: bool = False) -> tuple[Any, Any]:
    request, ask, answer, success, _ = _NAMES[v2]
    client.send(request, {"resource_id": LAB_ID, "connected_gateway_ids": []})
    asked = await gateway.receive(ask)
    gateway.send(answer, {"ref": asked["ref"]})
    assert (await gateway.receive("phx_reply"))["status"] == "ok"
    return asked, await client.receive(success)


async def _failure(client: Peer, resource_id: str) -> str:
    client.send("create_flow", {"resource_id": resource_id, "connected_gateway_ids": []})
    failure = await client.receive("flow_creation_failed")
    assert failure["resource_id"] == resource_id
    reason: str = failure["reason"]
    return reason


async def _who_is_asked(gateways: list[Peer]) -> Peer:
    await until(lambda: any(gateway.frames for gateway in gateways))
    (asked,) = [gateway for gateway in gateways if gateway.frames]
    return asked


async def _restrict_lab(portal: Portal, networks: str) -> None:
    await _condition_on_lab(portal, f'{{ property = "remote_ip", operator = "is_in_cidr", values = {networks} }}')


async def _condition_on_lab(portal: Portal, condition: str) -> None:
    assert await portal.reseed(('resource = "Lab"', f'resource = "Lab"\nconditions = [{condition}]'))


def _toml_time(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

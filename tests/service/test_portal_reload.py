"""Notifications after a change of the seed file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from tests.service.portal_peers import CLIENT_TOKEN, LAB_ID, WIKI_ID, Peer, Portal, Refusal, start_portal, stop_portal

_LAB_POLICY = '[[policies]]\ngroup = "Everyone"\nresource = "Lab"\n'


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(tmp_path)
    yield portal
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_an_unchanged_file_sends_nothing(portal: Portal) -> None:
    gateway, client, _ = await _with_flow(portal)

    assert await portal.reseed()

    assert await gateway.settle() == await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_new_name_is_sent_and_ends_nothing(portal: Portal) -> None:
    gateway, client, _ = await _with_flow(portal)

    await portal.reseed(('"Lab"', '"Laboratory"'))

    assert (await client.receive("resource_created_or_updated"))["name"] == "Laboratory"
    assert (await gateway.receive("resource_updated"))["name"] == "Laboratory"
    assert await gateway.settle() == await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_new_filters_are_sent_to_both_sides(portal: Portal) -> None:
    gateway, client, _ = await _with_flow(portal)

    await portal.reseed(('address_description = "lab network"', 'filters = ["udp/53"]'))

    filters = [{"protocol": "udp", "port_range_start": 53, "port_range_end": 53}]
    assert (await client.receive("resource_created_or_updated"))["filters"] == filters
    assert await gateway.receive("resource_updated") == {
        "id": LAB_ID, "type": "cidr", "name": "Lab", "address": "172.20.0.0/16", "filters": filters,
    }  # fmt: skip
    assert await gateway.settle() == await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_new_address_revokes_the_grants(portal: Portal) -> None:
    gateway, client, cid = await _with_flow(portal)

    await portal.reseed(("172.20.0.0/16", "172.21.0.0/16"))

    assert (await client.receive("resource_created_or_updated"))["address"] == "172.21.0.0/16"
    assert await gateway.receive("reject_access") == {"client_id": cid, "resource_id": LAB_ID}
    assert await gateway.settle() == await client.settle() == []
    assert (await portal.join("gateway")).init["authorizations"] == []


@pytest_twisted.ensureDeferred
async def test_a_deleted_policy_takes_the_resource_away(portal: Portal) -> None:
    gateway, client, cid = await _with_flow(portal)

    await portal.reseed((_LAB_POLICY, ""))

    assert await client.receive("resource_deleted") == LAB_ID
    assert await gateway.receive("reject_access") == {"client_id": cid, "resource_id": LAB_ID}
    assert await gateway.settle() == await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_another_policy_that_grants_it_keeps_the_flow(portal: Portal) -> None:
    gateway, client, _ = await _with_flow(portal)
    other = '[[policies]]\ngroup = "Nobody"\nresource = "Lab"\n'

    await portal.reseed((_LAB_POLICY, other), ('groups = ["Everyone"]', 'groups = ["Everyone", "Nobody"]'))

    assert await gateway.settle() == await client.settle() == []
    assert len((await portal.join("gateway")).init["authorizations"]) == 1


@pytest_twisted.ensureDeferred
async def test_a_member_who_leaves_the_group_loses_everything_and_gets_it_back_on_return(portal: Portal) -> None:
    gateway, client, cid = await _with_flow(portal)
    member = 'name = "Dev User"\ngroups = ["Everyone"]'
    outsider = 'name = "Dev User"\ngroups = ["Nobody"]'

    await portal.reseed((member, outsider))
    assert [await client.receive("resource_deleted") for _ in range(2)] == [LAB_ID, WIKI_ID]
    assert (await gateway.receive("reject_access"))["client_id"] == cid
    await portal.reseed((outsider, member))

    assert [(await client.receive("resource_created_or_updated"))["id"] for _ in range(2)] == [LAB_ID, WIKI_ID]


@pytest_twisted.ensureDeferred
async def test_a_resource_that_moves_to_another_site_is_deleted_and_created(portal: Portal) -> None:
    gateway, client, cid = await _with_flow(portal)
    moved = ('address_description = "lab network"\nsite = "HQ"', 'address_description = "lab network"\nsite = "Branch"')

    await portal.reseed(
        moved, ('[[groups]]\nname = "Nobody"', '[[groups]]\nname = "Nobody"\n[[sites]]\nname = "Branch"')
    )

    assert await client.settle() == ["resource_deleted", "resource_created_or_updated"]
    assert await gateway.receive("reject_access") == {"client_id": cid, "resource_id": LAB_ID}


@pytest_twisted.ensureDeferred
async def test_dns_settings_are_sent_to_clients(portal: Portal) -> None:
    gateway, client, _ = await _with_flow(portal)

    await portal.reseed(("[[sites]]", '[dns]\nupstream = ["10.0.0.53"]\nsearch_domain = "corp.example"\n[[sites]]'))

    interface = (await client.receive("config_changed"))["interface"]
    assert interface["ipv4"] == client.init["interface"]["ipv4"]
    assert interface["upstream_dns"] == [{"protocol": "ip_port", "address": "10.0.0.53:53"}]
    assert interface["upstream_do53"] == [{"ip": "10.0.0.53"}]
    assert interface["search_domain"] == "corp.example"
    assert await gateway.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_new_slug_is_sent_to_gateways_with_their_grants(portal: Portal) -> None:
    gateway, client, cid = await _with_flow(portal)

    await portal.reseed(('slug = "acme"\n', f'slug = "acme2"\nid = "{_account_id(portal)}"\n'))

    init = await gateway.receive("init")
    assert (init["account_slug"], init["authorizations"][0]["client_id"]) == ("acme2", cid)
    assert await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_deleted_token_says_goodbye_for_good_and_revokes(portal: Portal) -> None:
    gateway, client, cid = await _with_flow(portal)

    await portal.reseed((f'[[tokens]]\nkind = "client"\nactor = "Dev User"\ntoken = "{CLIENT_TOKEN}"\n', ""))

    assert await client.receive("disconnect") == {"reason": "token_expired"}
    assert await client.receive("phx_close") == {}
    assert await client.closed() == 1000
    assert await gateway.receive("reject_access") == {"client_id": cid, "resource_id": LAB_ID}
    with pytest.raises(Refusal):
        await portal.join("client")


@pytest.mark.parametrize("role", ["gateway", "relay"])
@pytest_twisted.ensureDeferred
async def test_deleted_tokens_of_gateways_and_relays_say_goodbye_for_good(portal: Portal, role: str) -> None:
    peer = await portal.join(role)

    await portal.reseed((f'token = ".{role}-token-of-the-tests"', 'token = "another"'))

    assert await peer.receive("disconnect") == {"reason": "token_expired"}
    assert await peer.closed() == 1000


@pytest_twisted.ensureDeferred
async def test_an_earlier_end_is_sent_to_a_v1_gateway_and_revokes_at_a_v2_gateway(portal: Portal) -> None:
    ends = {"2038-01-18T00:00:00Z": 2147385600}
    for v2, event in ((False, "access_authorization_expiry_updated"), (True, "reject_access")):
        gateway, client, cid = await _with_flow(portal, v2=v2)
        before = portal.seed.read_text()

        await portal.reseed(('actor = "Dev User"', f'actor = "Dev User"\nexpires_at = {next(iter(ends))}'))

        message = await gateway.receive(event)
        assert message["client_id"] == cid
        assert v2 or message["expires_at"] == 2147385600
        assert client.closed_with is None
        portal.seed.write_text(before)
        await portal.service.reload()


@pytest_twisted.ensureDeferred
async def test_grants_changed_while_the_portal_was_down_are_revoked_at_its_start(
    portal: Portal, tmp_path: Path
) -> None:
    await _with_flow(portal)
    await stop_portal(portal)

    successor = await start_portal(tmp_path, portal.seed.read_text().replace("172.20.0.0/16", "172.22.0.0/16"))

    assert (await successor.join("gateway")).init["authorizations"] == []
    await stop_portal(successor)


@pytest_twisted.ensureDeferred
async def test_an_invalid_seed_is_logged_with_its_line_and_changes_nothing(
    portal: Portal, logged: list[dict[str, Any]]
) -> None:
    gateway, client, _ = await _with_flow(portal)

    assert not await portal.reseed(('name = "Wiki"', 'name = "Wiki'))
    assert not await portal.reseed(('name = "Wiki\n', 'name = "Wiki"\ncolour = "red"\n'))

    reasons = [message["reason"] for message in logged if message["message_type"] == "portal:seed_rejected"]
    assert "not valid TOML in line 52" in reasons[0]
    assert "[[resources]] 'Wiki' in line 53: the key `colour` is unknown" in reasons[1]
    assert await gateway.settle() == await client.settle() == []
    client.send("create_flow", {"resource_id": WIKI_ID, "connected_gateway_ids": []})
    await gateway.receive("authorize_flow")


@pytest_twisted.ensureDeferred
async def test_what_has_no_effect_is_logged_at_each_load(portal: Portal, logged: list[dict[str, Any]]) -> None:
    assert await portal.reseed((_LAB_POLICY, ""))

    reasons = [message["reason"] for message in logged if message["message_type"] == "portal:seed_incomplete"]
    assert reasons == [
        "[[groups]] 'Nobody' in line 12: no actor is a member",
        "[[resources]] 'Lab' in line 42: no policy gives it to a group, so no client can use it",
    ]


@pytest_twisted.ensureDeferred
async def test_many_warnings_are_logged_in_part(portal: Portal, logged: list[dict[str, Any]]) -> None:
    groups = "".join(f'[[groups]]\nname = "{number}"\n' for number in range(30))

    assert await portal.reseed(("[[sites]]", f"{groups}[[sites]]"))

    reasons = [message["reason"] for message in logged if message["message_type"] == "portal:seed_incomplete"]
    assert len(reasons) == 21
    assert reasons[-1] == "11 more: firezone-tunnel portal check prints them"  # one is of a group in the usual file


async def _with_flow(portal: Portal, *, v2: bool = False) -> tuple[Peer, Peer, str]:
    """A gateway, a client with a flow for the lab through it, and the client's id."""
    gateway = await portal.join("gateway", v2=v2)
    client = await portal.join("client")
    client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
    asked = await gateway.receive("create_authorization" if v2 else "authorize_flow")
    gateway.send("authorization_created" if v2 else "flow_authorized", {"ref": asked["ref"]})
    await gateway.receive("phx_reply")
    await client.receive("flow_created")
    return gateway, client, asked["client"]["id"]


def _account_id(portal: Portal) -> str:
    assert portal.service.hub is not None
    return portal.service.hub._state.account.id

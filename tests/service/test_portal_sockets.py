"""Accepted and refused WebSockets, and the guarantees of Phoenix on them."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_twisted

from firezone_tunnel.apps.portal.service import PortalService
from firezone_tunnel.core.sansio import SocketAddress
from tests.service.portal_peers import (
    CLIENT_TOKEN,
    GATEWAY_TOKEN,
    OTHER_CLIENT_TOKEN,
    RELAY_TOKEN,
    SEED,
    V1_AGENT,
    V2_AGENTS,
    Portal,
    Refusal,
    http,
    key,
    start_portal,
    stop_portal,
)

_AGENT = V1_AGENT.format(version="1.5.3")
_OURS = "Linux/6.8 connlib/1.5.12 (x86_64; firezone_tunnel/0.1.0)"
_PROBE = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
_KEY = quote(key(1), safe="")
_CLIENT = f"external_id=one&public_key={_KEY}"


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(tmp_path)
    yield portal
    await stop_portal(portal)


@pytest.mark.parametrize(
    ("path", "agent", "status", "code"),
    [
        (f"/client/websocket?{_CLIENT}", _AGENT, 401, "missing_token"),
        (f"/client/websocket?token=wrong&{_CLIENT}", _AGENT, 401, "invalid_token"),
        (f"/client/websocket?token={GATEWAY_TOKEN}&{_CLIENT}", _AGENT, 401, "invalid_token"),
        (f"/gateway/websocket?token={CLIENT_TOKEN}&{_CLIENT}", _AGENT, 401, "invalid_token"),
        (f"/client/websocket?token={CLIENT_TOKEN}&public_key={_KEY}", _AGENT, 422, "invalid_connect_params"),
        (f"/client/websocket?token={CLIENT_TOKEN}&external_id=one", _AGENT, 422, "invalid_connect_params"),
        (f"/client/websocket?token={CLIENT_TOKEN}&external_id=one&public_key=AAAA", _AGENT, 422,
         "invalid_connect_params"),
        (f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}", "Linux/6.8", 422, "invalid_connect_params"),
        (f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}&name={'x' * 256}", _AGENT, 422, "invalid_connect_params"),
        (f"/client/v2/websocket?token={CLIENT_TOKEN}&external_id=one", _AGENT, 400, "invalid_connect_params"),
        (f"/gateway/v2/websocket?token={GATEWAY_TOKEN}&{_CLIENT}", "Linux/6.8", 400, "invalid_connect_params"),
        (f"/relay/websocket?token={RELAY_TOKEN}", "relay/0.1.0", 422, "invalid_connect_params"),
        (f"/relay/websocket?token={RELAY_TOKEN}&ipv4=nowhere", "relay/0.1.0", 422, "invalid_connect_params"),
        (f"/relay/websocket?token={RELAY_TOKEN}&ipv6=192.0.2.1", "relay/0.1.0", 422, "invalid_connect_params"),
        (f"/relay/websocket?token={RELAY_TOKEN}&ipv4=192.0.2.1&port=0", "relay/0.1.0", 422, "invalid_connect_params"),
        (f"/relay/websocket?token={RELAY_TOKEN}&ipv4=192.0.2.1&port={'1' * 5000}", "relay/0.1.0", 422,
         "invalid_connect_params"),
        (f"/client/websocket?vsn=3.0.0&token={CLIENT_TOKEN}&{_CLIENT}", _AGENT, 403, "unsupported_vsn"),
        (f"/relay/v2/websocket?token={RELAY_TOKEN}&ipv4=192.0.2.1", "relay/0.1.0", 404, "not_found"),
    ],
)  # fmt: skip
@pytest_twisted.ensureDeferred
async def test_a_refusal_is_a_problem_document(portal: Portal, path: str, agent: str, status: int, code: str) -> None:
    with pytest.raises(Refusal) as refused:
        await portal.connect(path, agent)

    refusal = refused.value
    assert refusal.status == status
    assert refusal.headers["content-type"] == "application/problem+json"
    assert int(refusal.headers["content-length"]) == len(refusal.body)
    assert set(refusal.problem) == {"type", "title", "status", "detail", "code"}
    assert (refusal.problem["type"], refusal.problem["status"], refusal.problem["code"]) == (
        "about:blank", status, code,
    )  # fmt: skip


@pytest_twisted.ensureDeferred
async def test_a_full_disk_asks_to_come_back_soon(portal: Portal, logged: list[dict[str, Any]]) -> None:
    await _stop_growing(portal)

    with pytest.raises(Refusal) as refused:
        for number in range(500):
            await portal.connect(
                f"/client/websocket?token={CLIENT_TOKEN}&external_id={number}&public_key={_KEY}", _AGENT
            )

    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "1")
    failures = [message for message in logged if message["message_type"] == "portal:store_failed"]
    assert "disk is full" in failures[0]["reason"]


@pytest_twisted.ensureDeferred
async def test_plain_http_gets_an_answer(portal: Portal) -> None:
    health = await http(portal.address, "GET /healthz HTTP/1.1\nHost: localhost\n\n")
    page = await http(portal.address, "GET /client/websocket?redirect=http://x HTTP/1.1\nHost: localhost\n\n")
    odd = await http(portal.address, "GET /?redirect=x&after=z HTTP/1.1\nHost: localhost\n\n")
    post = await http(portal.address, "POST /client/websocket HTTP/1.1\nHost: localhost\nContent-Length: 0\n\n")

    assert (health.status, health.body) == (200, b"ok\n")
    assert (page.status, odd.status) == (426, 426)
    assert post.status == 400
    for answer in (health, page, odd, post):
        assert int(answer.headers["content-length"]) == len(answer.body)


@pytest_twisted.ensureDeferred
async def test_a_header_without_end_is_refused(portal: Portal) -> None:
    answer = await http(portal.address, f"GET /healthz HTTP/1.1\nHost: localhost\nX: {'x' * 20_000}")

    assert answer.status == 431


@pytest_twisted.ensureDeferred
async def test_the_token_of_the_header_takes_precedence_over_the_query(portal: Portal) -> None:
    header = {"X-Authorization": f"Bearer  {CLIENT_TOKEN[:5]} {CLIENT_TOKEN[5:]}"}

    await portal.connect(f"/client/websocket?token=wrong&{_CLIENT}", _AGENT, headers=header)
    with pytest.raises(Refusal) as refused:
        wrong = {"X-Authorization": "Bearer wrong"}
        await portal.connect(f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}", _AGENT, headers=wrong)

    assert refused.value.problem["code"] == "invalid_token"


@pytest_twisted.ensureDeferred
async def test_firezone_id_is_another_name_of_external_id(portal: Portal) -> None:
    path = f"/client/websocket?token={CLIENT_TOKEN}&firezone_id=client-1&public_key={_KEY}"
    first = await portal.join("client")

    second = await portal.connect(path, _AGENT)
    second.topic = "client"
    second.send("phx_join", None)

    assert (await second.receive("init"))["interface"] == first.init["interface"]


@pytest_twisted.ensureDeferred
async def test_a_token_that_has_expired_is_refused(tmp_path: Path) -> None:
    seed = SEED.replace('actor = "Dev User"', 'actor = "Dev User"\nexpires_at = 2020-01-01T00:00:00Z')
    portal = await start_portal(tmp_path, seed)

    with pytest.raises(Refusal) as refused:
        await portal.join("client")

    assert refused.value.problem["code"] == "invalid_token"
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_tokens_are_never_logged(portal: Portal, logged: list[dict[str, Any]]) -> None:
    await portal.join("client")
    await portal.join("gateway", v2=True)
    with pytest.raises(Refusal):
        await portal.connect(f"/client/websocket?token={GATEWAY_TOKEN}&{_CLIENT}", _AGENT)

    assert logged
    assert CLIENT_TOKEN not in str(logged)
    assert GATEWAY_TOKEN not in str(logged)


@pytest_twisted.ensureDeferred
async def test_the_database_holds_no_token(portal: Portal) -> None:
    await portal.join("client")
    await portal.join("gateway")

    content = b"".join(path.read_bytes() for path in portal.directory.glob("portal.sqlite3*"))

    assert content
    assert CLIENT_TOKEN.encode() not in content
    assert GATEWAY_TOKEN.encode() not in content


@pytest_twisted.ensureDeferred
async def test_a_heartbeat_is_answered_before_any_join(portal: Portal) -> None:
    peer = await portal.connect(f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}", _AGENT)

    reference = peer.send("heartbeat", {}, topic="phoenix")

    assert await peer.receive_frame("phx_reply") == {
        "topic": "phoenix", "event": "phx_reply", "payload": {"status": "ok", "response": {}}, "ref": reference,
    }  # fmt: skip


@pytest.mark.parametrize("topic", ["client", "gateway", "client:1", "phoenix"])
@pytest_twisted.ensureDeferred
async def test_a_topic_that_is_not_joined_is_unmatched(portal: Portal, topic: str) -> None:
    peer = await portal.connect(f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}", _AGENT)

    peer.send("no_relays", {}, topic=topic)

    assert await peer.receive("phx_reply") == {"status": "error", "response": {"reason": "unmatched topic"}}


@pytest_twisted.ensureDeferred
async def test_a_join_of_a_foreign_topic_is_unmatched(portal: Portal) -> None:
    peer = await portal.connect(f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}", _AGENT)

    peer.send("phx_join", None, topic="gateway")

    assert await peer.receive("phx_reply") == {"status": "error", "response": {"reason": "unmatched topic"}}


@pytest_twisted.ensureDeferred
async def test_a_second_join_closes_the_first_channel_and_starts_anew(portal: Portal) -> None:
    client = await portal.join("client")

    client.send("phx_join", None)
    await client.receive("init")

    assert [frame["event"] for frame in client.frames] == ["phx_close", "phx_reply"]


@pytest_twisted.ensureDeferred
async def test_an_invalid_version_is_refused_at_the_join(portal: Portal) -> None:
    peer = await portal.connect(f"/client/websocket?token={CLIENT_TOKEN}&{_CLIENT}", "Linux/6.8 connlib/banana")
    peer.topic = "client"

    peer.send("phx_join", None)

    assert await peer.receive("phx_reply") == {"status": "error", "response": {"reason": "invalid_version"}}


@pytest_twisted.ensureDeferred
async def test_a_relay_without_stamp_secret_crashes_its_join(portal: Portal) -> None:
    peer = await portal.connect(f"/relay/websocket?token={RELAY_TOKEN}&ipv4=192.0.2.1", "relay/0.1.0")
    peer.topic = "relay"

    peer.send("phx_join", None)

    assert await peer.receive("phx_reply") == {"status": "error", "response": {"reason": "join crashed"}}
    assert await peer.closed() == 1012


@pytest.mark.parametrize("text", ["", "[]", "{", '{"topic":"client"}', '{"topic":1,"event":2,"payload":3,"ref":4}'])
@pytest_twisted.ensureDeferred
async def test_an_invalid_frame_closes_the_socket_so_that_the_peer_comes_back(portal: Portal, text: str) -> None:
    client = await portal.join("client")

    client.send_text(text)

    assert await client.closed() == 1012


@pytest_twisted.ensureDeferred
async def test_a_silent_socket_is_closed_after_75_seconds(portal: Portal) -> None:
    client = await portal.join("client")

    portal.advance(70)
    assert client.closed_with is None
    portal.advance(10)

    assert await client.closed() == 1000


@pytest.mark.parametrize("role", ["client", "gateway"])
@pytest_twisted.ensureDeferred
async def test_a_process_that_comes_back_with_its_key_replaces_its_older_connection(
    portal: Portal, role: str, logged: list[dict[str, Any]]
) -> None:
    first = await portal.join(role)
    for _ in range(6):
        second = await portal.join(role)

    assert await first.closed() == 1000
    assert first.frames == []
    assert await second.settle() == []
    assert second.init["interface"] == first.init["interface"]
    assert _of("portal:identity_shared", logged) == []


@pytest.mark.parametrize("v2", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_client_is_displaced_by_a_newer_one_with_its_identity_and_told_why(portal: Portal, v2: bool) -> None:
    first = await portal.join("client", v2=v2)
    second = await portal.join("client", v2=v2, public_key=key(7))

    assert await first.receive("disconnect") == {"reason": "identity_shared"}
    assert await first.closed() == 1000
    assert second.init["interface"] == first.init["interface"]


@pytest_twisted.ensureDeferred
async def test_clients_that_displace_each_other_too_often_are_refused_while_one_is_connected(
    portal: Portal, logged: list[dict[str, Any]]
) -> None:
    for number in range(4):
        present = await portal.join("client", agent=_OURS, public_key=key(number))

    for number in range(4, 8):
        with pytest.raises(Refusal) as refused:
            await portal.join("client", agent=_OURS, public_key=key(number))
        assert (refused.value.status, refused.value.problem["code"]) == (409, "device_identity_conflict")
        portal.clock.offset += 10

    assert await present.settle() == ["identity_shared"] * 3
    (warning,) = _of("portal:identity_shared", logged)
    assert (warning["level"], warning["role"], warning["name"]) == ("warning", "client", "client")
    portal.clock.offset += 60
    await portal.join("client", agent=_OURS, public_key=key(9))


@pytest.mark.parametrize(
    ("agent", "v2", "status"), [(True, False, 409), (False, True, 409), (False, False, 503)], ids=["ours", "v2", "v1"]
)
@pytest_twisted.ensureDeferred
async def test_a_second_gateway_with_one_identity_is_refused_and_the_first_goes_on(
    portal: Portal, agent: bool, v2: bool, status: int
) -> None:
    options: dict[str, Any] = {"v2": v2, "agent": _OURS if agent else None}
    first = await portal.join("gateway", **options)

    with pytest.raises(Refusal) as refused:
        await portal.join("gateway", public_key=key(7), name="clone", **options)

    assert refused.value.status == status
    assert refused.value.problem["code"] == "gateway_already_connected"
    assert refused.value.problem["detail"].startswith("Another host is connected with this identity, as gateway:")
    assert await first.settle() == []
    assert first.closed_with is None


@pytest.mark.parametrize(("agent", "told"), [(_OURS, ["identity_shared"]), (None, [])], ids=["ours", "upstream's"])
@pytest_twisted.ensureDeferred
async def test_twins_that_go_on_are_warned_about_once_a_minute_and_a_first_of_ours_is_told(
    portal: Portal, logged: list[dict[str, Any]], agent: str | None, told: list[str]
) -> None:
    first = await portal.join("gateway", agent=agent)
    for _ in range(3):
        with pytest.raises(Refusal):
            await portal.join("gateway", public_key=key(7))
    assert _of("portal:identity_shared", logged) == []  # the first may be gone, without our knowledge so far

    portal.clock.offset += 10
    with pytest.raises(Refusal):
        await portal.join("gateway", public_key=key(7))

    (warning,) = _of("portal:identity_shared", logged)
    assert (warning["role"], warning["addresses"]) == ("gateway", ["127.0.0.1", "127.0.0.1"])
    assert await first.settle() == told


@pytest_twisted.ensureDeferred
async def test_a_first_gateway_whose_host_is_gone_is_found_out(portal: Portal) -> None:
    first = await portal.join("gateway")
    assert portal.service.hub is not None
    (connection,) = portal.service.hub._peers
    web_socket: Any = connection._web_socket
    transport = web_socket.transport

    with pytest.raises(Refusal):
        await portal.join("gateway", public_key=key(7))

    tcp = transport.getHandle()
    assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert [tcp.getsockopt(socket.IPPROTO_TCP, option) for option in _PROBE] == [1, 1, 4, 5000]
    first.abort()
    await first.closed()
    await portal.join("gateway", public_key=key(7))


@pytest_twisted.ensureDeferred
async def test_relays_at_one_address_that_displace_each_other_are_told_why_and_cause_one_warning(
    portal: Portal, logged: list[dict[str, Any]]
) -> None:
    relays = [await portal.join("relay", stamp_secret=f"{number:064}") for number in range(7)]

    assert await relays[0].receive("disconnect") == {"reason": "identity_shared"}
    (warning,) = _of("portal:identity_shared", logged)
    assert (warning["level"], warning["role"]) == ("warning", "relay")


@pytest_twisted.ensureDeferred
async def test_devices_of_other_owners_or_ids_have_other_addresses(portal: Portal) -> None:
    client = await portal.join("client")
    other_id = await portal.join("client", external_id="client-2")
    other_owner = await portal.join("client", token=OTHER_CLIENT_TOKEN)
    gateway = await portal.join("gateway")

    addresses = {peer.init["interface"]["ipv4"] for peer in (client, other_id, other_owner, gateway)}
    assert len(addresses) == 4
    assert client.closed_with is None


@pytest_twisted.ensureDeferred
async def test_a_v2_client_reads_sites_and_a_v1_client_gateway_groups(portal: Portal) -> None:
    v2 = await portal.join("client", v2=True)
    v1 = await portal.join("client", external_id="client-2")

    assert [set(resource) & {"sites", "gateway_groups"} for resource in v2.init["resources"]] == [{"sites"}] * 2
    assert [set(resource) & {"sites", "gateway_groups"} for resource in v1.init["resources"]] == [
        {"gateway_groups"}
    ] * 2
    assert V2_AGENTS["client"].split()[1] == "headless-client/1.5.12"


@pytest_twisted.ensureDeferred
async def test_a_very_large_init_arrives_whole(tmp_path: Path) -> None:
    more = "".join(
        f'[[resources]]\nname = "R{number}"\ntype = "cidr"\naddress = "10.{number // 256}.{number % 256}.0/24"\n'
        f'site = "HQ"\naddress_description = "{"x" * 200}"\n'
        f'[[policies]]\ngroup = "Everyone"\nresource = "R{number}"\n'
        for number in range(2000)
    )
    portal = await start_portal(tmp_path, SEED + more)

    client = await portal.join("client")

    assert len(json.dumps(client.init)) > 500_000
    assert len(client.init["resources"]) == 2002
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_a_peer_that_reads_late_gets_everything_in_order(portal: Portal) -> None:
    client = await portal.join("client")
    client.stop_reading()

    _push_megabytes(portal, 12)
    client.start_reading()

    assert [(await client.receive("x"))["number"] for _ in range(12)] == list(range(12))


@pytest_twisted.ensureDeferred
async def test_a_peer_that_never_reads_is_cut_off(portal: Portal) -> None:
    client = await portal.join("client")
    client.stop_reading()

    _push_megabytes(portal, 40)
    client.start_reading()

    assert await client.closed() == 1006
    assert (await portal.join("client")).init["interface"] == client.init["interface"]


@pytest_twisted.ensureDeferred
async def test_a_stop_closes_every_socket_so_that_its_peer_comes_back(tmp_path: Path) -> None:
    portal = await start_portal(tmp_path)
    client = await portal.join("client")

    await portal.service.stopService()

    assert await client.closed() == 1012


@pytest_twisted.ensureDeferred
async def test_a_port_in_use_is_reported_in_one_sentence(portal: Portal, tmp_path: Path) -> None:
    error = await _start_error(portal, tmp_path / "second.sqlite3", listen=portal.address)

    assert re.fullmatch(r"can't listen on 127\.0\.0\.1:\d+: Address already in use; choose another --listen", error)


def _of(message_type: str, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in logged if message["message_type"] == message_type]


def _push_megabytes(portal: Portal, count: int) -> None:
    assert portal.service.hub is not None
    (session,) = portal.service.hub._state.presence.all()
    for number in range(count):
        session.socket.push("x", {"number": number, "much": "x" * 1_000_000})


async def _start_error(portal: Portal, database: Path, **options: Any) -> str:
    from twisted.internet import reactor

    options = {"listen": SocketAddress("127.0.0.1", 0)} | options
    service = PortalService(reactor, seed_path=str(portal.seed), database=str(database), **options)
    service.startService()
    with pytest.raises(Exception) as raised:
        await service.ready
    await service.stopService()
    return str(raised.value)


async def _stop_growing(portal: Portal) -> None:
    """Forbid the database to grow, which SQLite reports as a full disk."""
    store = portal.service._store
    await store._transact(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1"))

"""A relay and its portal: peers get valid credentials for the relay, and it leaves the portal before it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from firezone_tunnel.apps.relay.service import RelayService
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Method
from firezone_tunnel.errors import AuthenticationError
from tests.service.portal_peers import RELAY_TOKEN, Portal, start_portal, stop_portal
from tests.service.relay_process import TurnClient, code_of, free_port


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(tmp_path)
    yield portal
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_a_peer_of_the_portal_allocates_with_the_credentials_that_it_received(portal: Portal) -> None:
    port = free_port()
    relay = _relay(portal, RELAY_TOKEN, port)
    relay.startService()
    await relay.ready
    assert relay.is_ready

    (entry,) = (await portal.join("client")).init["relays"]

    assert entry["addr"] == f"127.0.0.1:{port}"
    client = TurnClient(port, username=entry["username"], password=entry["password"])
    answer = await deferToThread(client.allocate)
    assert code_of(answer) == 0
    relay.stop_draining()
    await relay.stopService()
    assert not relay.is_ready


@pytest_twisted.ensureDeferred
async def test_a_relay_that_ends_leaves_the_portal_first_and_serves_on_until_its_clients_have_gone(
    portal: Portal,
) -> None:
    port = free_port()
    relay = _relay(portal, RELAY_TOKEN, port)
    relay.startService()
    await relay.ready
    peer = await portal.join("gateway")
    (entry,) = peer.init["relays"]
    client = TurnClient(port, username=entry["username"], password=entry["password"])
    await deferToThread(client.allocate)

    stopped = relay.stopService()
    news = await peer.receive("relays_presence")
    assert news["disconnected_ids"] == [entry["id"]]
    assert not stopped.called
    assert code_of(await deferToThread(client.request, Method.REFRESH)) == 0
    await deferToThread(client.request, Method.REFRESH, (stun.LIFETIME, 0))
    await stopped


@pytest_twisted.ensureDeferred
async def test_a_relay_that_the_portal_refuses_fails(portal: Portal) -> None:
    relay = _relay(portal, "wrong", free_port())
    relay.startService()

    error = await relay.failed

    assert isinstance(error, AuthenticationError)
    assert not relay.is_ready
    await relay.stopService()


def _relay(portal: Portal, token: str, port: int) -> RelayService:
    return RelayService(
        reactor,
        public_ipv4="127.0.0.1",
        url=f"ws://{portal.address}",
        token=token,
        listen_port=port,
        lowest_port=54_000,
        highest_port=54_099,
    )

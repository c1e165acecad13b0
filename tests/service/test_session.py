"""A session against our own portal, both on the loopback interface of a host of their own."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from firezone_tunnel import (
    AuthenticationError,
    Connected,
    Disconnected,
    Event,
    EventStream,
    ResourcesUpdated,
    Session,
    SessionClosed,
    TunInterfaceUpdated,
    __version__,
)
from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.errors import ConfigurationError, InUseError, PlatformError, one_line
from firezone_tunnel.shell.host.monitor import NetworkMonitor
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.runtime.tunnel import TunnelService
from tests.service.portal_peers import CLIENT_TOKEN, Portal, start_portal, stop_portal, until
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

_INTERFACE = "tun-firezone"


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    """The host on which the whole test runs."""
    host = lab.host("client")
    with inside(host):
        yield host


@pytest_twisted.ensureDeferred
async def test_it_comes_up_reports_its_resources_and_leaves_nothing_behind(host: Host, tmp_path: Path) -> None:
    before = _host_state(host)
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)

        latest = await _read(events, TunInterfaceUpdated, ResourcesUpdated)

        interface = latest[TunInterfaceUpdated]
        assert interface.ipv4 in ipaddress.ip_network("100.64.0.0/11")
        assert ipaddress.ip_network("172.20.0.0/16") in interface.routes
        assert str(interface.ipv4) in host.ip("address", "show", "dev", _INTERFACE)
        assert [resource.name for resource in latest[ResourcesUpdated].resources] == ["Lab", "Wiki"]

        await session.close()
    assert await events.next() is None
    assert _host_state(host) == before


@pytest_twisted.ensureDeferred
async def test_the_log_begins_with_what_it_is_and_names_no_secret(
    host: Host, tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    log.set_threshold(log.DEBUG)
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        await _read(events, TunInterfaceUpdated)
        await session.close()

    first = next(message for message in logged if message.get("role") == "client")
    assert (first["message_type"], first["version"], first["interface"]) == ("service:started", __version__, _INTERFACE)
    assert first["portal"] == f"ws://{portal.address}/client/websocket"
    assert len(first["identity"]) == 64
    assert CLIENT_TOKEN not in str(logged)


@pytest_twisted.ensureDeferred
async def test_a_context_manager_closes_it(host: Host, tmp_path: Path) -> None:
    async with _portal(tmp_path) as portal:
        async with _connect(portal, tmp_path) as (session, events):
            await _read(events, TunInterfaceUpdated)

        with pytest.raises(SessionClosed, match="connect a new one"):
            session.reset("too late")
        assert _INTERFACE not in host.ip("link")


@pytest_twisted.ensureDeferred
async def test_closing_twice_is_fine_and_both_wait_for_the_end(host: Host, tmp_path: Path) -> None:
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        await _read(events, TunInterfaceUpdated)

        first, second = session.close(), session.close()
        await second
        assert _INTERFACE not in host.ip("link")
        await first
        await session.close()


@pytest_twisted.ensureDeferred
async def test_it_can_be_closed_before_anything_has_happened(host: Host, tmp_path: Path) -> None:
    before = _host_state(host)
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        await session.close()

        assert [event async for event in events] == []
        assert _host_state(host) == before


@pytest_twisted.ensureDeferred
async def test_a_wrong_token_ends_it_and_asks_for_a_new_token(host: Host, tmp_path: Path) -> None:
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path, token="n.another-token")

        (disconnected,) = [event async for event in events]

        assert isinstance(disconnected, Disconnected)
        assert disconnected.requires_sign_in
        assert isinstance(disconnected.error, AuthenticationError)
        assert "token" in str(disconnected.error)
        assert "another-token" not in one_line(disconnected.error)
        with pytest.raises(SessionClosed):
            session.reset("too late")
        await session.close()


@pytest_twisted.ensureDeferred
async def test_a_second_session_on_a_host_is_refused_and_the_first_goes_on(host: Host, tmp_path: Path) -> None:
    async with _portal(tmp_path) as portal:
        first, events = _connect(portal, tmp_path)
        await _read(events, TunInterfaceUpdated)

        (refused,) = [event async for event in _connect(portal, tmp_path).events]

        assert isinstance(refused, Disconnected)
        assert isinstance(refused.error, InUseError)
        assert not refused.requires_sign_in
        assert _INTERFACE in host.ip("link")
        await first.close()


@pytest_twisted.ensureDeferred
async def test_a_new_session_can_follow_a_closed_session(host: Host, tmp_path: Path) -> None:
    async with _portal(tmp_path) as portal:
        addresses = []
        for _ in range(2):
            async with _connect(portal, tmp_path) as (_, events):
                latest = await _read(events, TunInterfaceUpdated)
                addresses.append(latest[TunInterfaceUpdated].ipv4)

        assert addresses[0] == addresses[1]  # the portal knows the device again


@pytest_twisted.ensureDeferred
async def test_a_consumer_that_sleeps_costs_nothing_and_then_reads_the_newest(host: Host, tmp_path: Path) -> None:
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        await _read(events, TunInterfaceUpdated)

        for number in range(20):
            await portal.reseed((_address(number), _address(number + 1)))
            await until(partial(_is_waiting_for, events, _address(number + 1)))

        waiting = list(events._buffer._events)
        assert len([event for event in waiting if isinstance(event, ResourcesUpdated)]) == 1
        assert len(waiting) <= 2
        assert events.dropped == 0
        latest = await _read(events, ResourcesUpdated)
        assert latest[ResourcesUpdated].resources[0].address == "172.40.0.0/16"
        await session.close()


@pytest_twisted.ensureDeferred
async def test_a_failure_at_the_end_is_logged_and_the_host_is_restored(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    before = _host_state(host)
    monkeypatch.setattr(NetworkMonitor, "close", _fail)
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        await _read(events, TunInterfaceUpdated)

        await session.close()

    assert _host_state(host) == before
    (message,) = [message for message in logged if message["message_type"] == "tunnel:crashed"]
    assert "a failure" in message["traceback"]


def _fail(monitor: NetworkMonitor) -> None:
    raise KeyError("a failure")


@pytest_twisted.ensureDeferred
async def test_a_reset_that_gets_no_sockets_ends_the_session(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _host_state(host)
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        await _read(events, TunInterfaceUpdated)

        monkeypatch.setattr(TunnelService, "bind", _refuse)
        session.reset("a test")

        disconnected = [event async for event in events][-1]
        assert isinstance(disconnected, Disconnected)
        assert str(disconnected.error) == "no family works"
        assert _host_state(host) == before


def _refuse(runtime: TunnelService) -> None:
    raise PlatformError("no family works")


@pytest_twisted.ensureDeferred
async def test_its_repr_shows_the_portal_and_its_state_but_no_token(host: Host, tmp_path: Path) -> None:
    session, _ = Session.connect(
        url="ws://127.0.0.1:1/path", token="n.token", device_id="x", state_directory=str(tmp_path), reactor=reactor
    )
    assert repr(session) == "<Session: ws://127.0.0.1:1, tun-firezone, running>"

    await session.close()

    assert repr(session) == "<Session: ws://127.0.0.1:1, tun-firezone, stopped>"


@pytest.mark.parametrize("is_early", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_reset_connects_anew_with_another_key(host: Host, tmp_path: Path, is_early: bool) -> None:
    async with _portal(tmp_path) as portal:
        session, events = _connect(portal, tmp_path)
        if not is_early:
            await _read(events, TunInterfaceUpdated)
        before = _key(session)

        session.reset("a test")

        assert _key(session) != before
        await until(lambda: _key(session) in _keys_known_to(portal))
        if is_early:
            await _read(events, TunInterfaceUpdated)
        await session.close()
        assert [event for event in [event async for event in events] if isinstance(event, Disconnected)] == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"url": "portal.example"}, "must begin with"),
        ({"token": "with\x00nul"}, "invalid characters"),
        ({"ca_file": Path("/nonexistent.pem")}, "/nonexistent.pem"),
        ({"ca_file": "/nonexistent.pem"}, "/nonexistent.pem"),
    ],
)
def test_invalid_arguments_are_raised_at_once(arguments: dict[str, Any], complaint: str) -> None:
    valid = {"url": "wss://portal.example/", "token": CLIENT_TOKEN, "device_id": "x"}
    with pytest.raises(ConfigurationError, match=complaint):
        Session.connect(**{**valid, **arguments})


@asynccontextmanager
async def _portal(directory: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(directory)
    try:
        yield portal
    finally:
        await stop_portal(portal)


def _connect(portal: Portal, directory: Path, token: str = CLIENT_TOKEN) -> Connected:
    return Session.connect(
        url=f"ws://{portal.address}", token=token, name="a test", state_directory=directory / "state", reactor=reactor
    )


async def _read(events: EventStream, *kinds: type) -> dict[type, Any]:
    """Read until there was an event of each kind. Returns the last event of each."""
    latest: dict[type, Event] = {}
    while not all(kind in latest for kind in kinds):
        event = await _within(events.next)
        assert event is not None, f"the stream ended after {latest}"
        assert not isinstance(event, Disconnected), event
        latest[type(event)] = event
    return latest


async def _within(start: Callable[[], Any], seconds: float = 10.0) -> Any:
    waiting: Awaitable[Any] = start().addTimeout(seconds, reactor)
    return await waiting


def _address(number: int) -> str:
    return f"172.{20 + number}.0.0/16"


def _is_waiting_for(events: EventStream, address: str) -> bool:
    """Whether resources wait to be read, the first of which has this address."""
    updates = [event for event in events._buffer._events if isinstance(event, ResourcesUpdated)]
    return bool(updates) and updates[-1].resources[0].address == address


def _key(session: Session) -> bytes:
    return session._service._client.public_key


def _keys_known_to(portal: Portal) -> list[bytes]:
    """The public keys of the clients that have joined."""
    assert portal.service.hub is not None
    joined = portal.service.hub._state.presence.joined(PeerRole.CLIENT)
    return [base64.b64decode(session.device.public_key) for session in joined]


def _host_state(host: Host) -> str:
    commands = "ip -brief link; ip -brief address; ip route show table all; ip rule; ip -6 rule; nft list ruleset"
    return host.run("sh", "-c", commands).stdout

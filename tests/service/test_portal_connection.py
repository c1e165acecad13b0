"""The portal connection against a portal on loopback that misbehaves as real portals and networks do."""

from __future__ import annotations

import io
import json
import struct
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_twisted
import txaio
from twisted.internet import reactor as any_reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.task import deferLater
from twisted.logger import globalLogPublisher, textFileLogObserver

from firezone_tunnel.core.phoenix.channel import ChannelState, Fatal, Joined, Lost, PushReceived
from firezone_tunnel.errors import AuthenticationError, ConfigurationError, PortalError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link import protocol as protocol_module
from firezone_tunnel.shell.portal_link import service as service_module
from firezone_tunnel.shell.portal_link.protocol import parse_retry_after
from firezone_tunnel.shell.portal_link.resolver import MAX_LOOKUPS, HostResolver
from firezone_tunnel.shell.portal_link.service import trust_from_file
from tests.service.unruly_portal import (
    TOKEN,
    HastyPeer,
    Peer,
    RudePeer,
    SilentPeer,
    UnrulyPortal,
    World,
    tls_server,
    write_certificates,
)

_reactor: Any = any_reactor
_PROBLEM = "application/problem+json"


@pytest_twisted.async_yield_fixture
async def world() -> AsyncIterator[World]:
    world = World(UnrulyPortal())
    yield world
    await world.stop()


@pytest_twisted.ensureDeferred
async def test_it_joins_and_carries_messages_both_ways(world: World) -> None:
    world.start()
    peer = await _joined(world)

    peer.push("init", {"a": 1})
    assert world.service.send("create_flow", {"resource_id": "r"})

    assert await world.inbox.next_of(PushReceived) == PushReceived("init", {"a": 1})
    assert await peer.next_event("create_flow") == {
        "topic": "client",
        "event": "create_flow",
        "payload": {"resource_id": "r"},
        "ref": 1,
    }


@pytest_twisted.ensureDeferred
async def test_the_upgrade_request_only_identifies_us(world: World) -> None:
    world.start(bytes(range(32)))
    request = await world.portal.requests.next()

    query = parse_qs(urlsplit(request.path).query) if "?" in request.path else request.params
    assert request.path == "/client/websocket"
    assert list(query) == ["token", "external_id", "name", "public_key"]
    assert query["public_key"] == ["AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="]
    assert request.headers["x-authorization"] == f"Bearer {TOKEN}"
    assert " connlib/1.5.12 (" in request.headers["user-agent"]
    assert request.protocols == []
    assert request.extensions == []
    assert "origin" not in request.headers


@pytest.mark.parametrize("split", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_refused_token_is_final_and_its_code_names_the_remedy(world: World, split: bool) -> None:
    head, body = _refusal(401, {"code": "invalid_token", "detail": "no\nsuch token"}, kind=f"{_PROBLEM}; charset=utf-8")
    world.portal.answer(*([head, body] if split else [head + body]))
    world.start()

    error = (await world.inbox.next_of(Fatal)).error

    assert isinstance(error, AuthenticationError)
    assert error.requires_sign_in
    assert "no such token" in str(error)
    assert world.service.state is ChannelState.FAILED


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"code": "something_else"}, _PROBLEM),
        ({"code": 7}, _PROBLEM),
        ({}, _PROBLEM),
        ([1], _PROBLEM),
        ({"code": "invalid_token"}, "application/json"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_any_other_401_is_final_but_keeps_the_token(world: World, body: Any, kind: str) -> None:
    world.portal.answer(*_refusal(401, body, kind=kind))
    world.start()

    error = (await world.inbox.next_of(Fatal)).error

    assert isinstance(error, AuthenticationError)
    assert not error.requires_sign_in


@pytest_twisted.ensureDeferred
async def test_a_busy_portal_says_when_to_come_back(world: World) -> None:
    world.portal.answer(*_refusal(503, {"code": "rate_limit"}, "Retry-After: 7\r\n"))
    world.start()

    lost = await world.inbox.next_of(Lost)
    assert (lost.delay, lost.reason) == (7.0, "the portal answered HTTP 503 (rate_limit)")
    world.clock.advance(7.0)
    await _joined(world)


@pytest_twisted.ensureDeferred
async def test_without_retry_after_the_backoff_counts(world: World) -> None:
    world.portal.answer(*_refusal(429, {}))
    world.portal.answer(*_refusal(502, {}))
    world.start()

    assert (await world.inbox.next_of(Lost)).delay == 0.25
    world.clock.advance(0.25)
    assert (await world.inbox.next_of(Lost)).delay == 0.375


@pytest.mark.parametrize(
    "parts",
    [
        [b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\nshort", None],
        [b"HTTP/1.0 403 Forbidden\r\n\r\n", b"until the end", None],
        [b"HTTP/1.1 403\r\nContent-Length: 0\r\n\r\n"],
        [b"HTTP/1.1 403 Forbidden\r\nContent-Length: 99999999\r\n\r\n", bytes(20_000)],
        [b"HTTP/1.1 403 Forbidden\r\nContent-Length: -1\r\n\r\n", bytes(20_000)],
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_refusal_is_reported_however_its_body_ends(world: World, parts: list[bytes | None]) -> None:
    world.portal.answer(*parts)
    world.start()

    assert (await world.inbox.next_of(Lost)).reason == "the portal answered HTTP 403"
    await world.portal.losses.next()


@pytest_twisted.ensureDeferred
async def test_a_refusals_body_that_never_comes_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_module, "REFUSAL_TIMEOUT", 0.05)
    world.portal.answer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 10\r\n\r\n")
    world.start()

    assert (await world.inbox.next_of(Lost)).reason == "the portal answered HTTP 403"
    await world.portal.losses.next()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            [b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: a\r\n\r\n"],
            "HTTP Sec-WebSocket-Accept",
        ),
        ([b"HTTP/1.1 101 Switching\r\n\r\n"], "HTTP Upgrade header missing"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "what answers is not HTTP: SSH-2.0-OpenSSH_9.6"),
        ([b"\xff\xfe\r\n\r\n"], "what answers is not HTTP: ÿþ"),
        ([b"X" * 20_000], "what answers is not HTTP: XXXX"),
        ([b"HT", b"TP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"], "the portal answered HTTP 200"),
        ([b"HTTP/1.1 " + b"X" * 20_000], "the header of the portal's answer is too long"),
        ([None], "the portal dropped the connection: the answer to the WebSocket upgrade is missing"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_answer_that_is_not_a_websocket_is_reported_and_retried(
    world: World, parts: list[bytes | None], reason: str
) -> None:
    world.portal.answer(*parts)
    world.start()

    lost = await world.inbox.next_of(Lost)
    assert not lost.was_joined
    assert lost.reason.startswith(reason)
    await world.portal.losses.next()
    world.clock.advance(60.0)
    await _joined(world)


@pytest_twisted.ensureDeferred
async def test_a_handshake_that_hangs_is_reported_within_5_seconds_and_given_up_after_15(
    world: World, logged: list[dict[str, Any]]
) -> None:
    world.portal.answer()
    world.start()
    await world.portal.requests.next()

    world.clock.advance(5.0)
    (stalled,) = [message for message in logged if message["message_type"] == "portal:connection_stalled"]
    assert (stalled["level"], stalled["missing"]) == ("warning", "the answer to the WebSocket upgrade")
    assert stalled["portal"].startswith("ws://127.0.0.1:")
    world.clock.advance(10.0)

    reason = "no connection within 15 s: the answer to the WebSocket upgrade is missing"
    assert (await world.inbox.next_of(Lost)).reason == reason
    await world.portal.losses.next()


@pytest.mark.parametrize("is_dropped", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_portal_that_does_not_speak_tls_is_reported(
    world: World, is_dropped: bool, logged: list[dict[str, Any]]
) -> None:
    world.portal.answer(*([None] if is_dropped else []))
    secure = World(world.portal, scheme="wss")
    secure.start()
    await world.portal.requests.next()

    if is_dropped:
        dropped = "the portal dropped the connection: the TLS handshake is missing"
        assert (await secure.inbox.next_of(Lost)).reason == dropped
    else:
        secure.clock.advance(5.0)
        (stalled,) = [message for message in logged if message["message_type"] == "portal:connection_stalled"]
        assert stalled["missing"] == "the TLS handshake"
        assert TOKEN not in str(logged)
    await secure.service.stopService()


@pytest_twisted.ensureDeferred
async def test_a_name_server_that_does_not_answer_is_reported(world: World, logged: list[dict[str, Any]]) -> None:
    silent = World(world.portal, host="portal.example")
    silent.resolve = lambda _: Deferred()
    silent.start()

    silent.clock.advance(15.0)

    assert (await silent.inbox.next_of(Lost)).reason.endswith("the address of portal.example is missing")
    (stalled,) = [message for message in logged if message["message_type"] == "portal:connection_stalled"]
    assert stalled["missing"] == "the address of portal.example"
    await silent.service.stopService()


@pytest_twisted.ensureDeferred
async def test_a_join_that_is_not_answered_is_given_up_after_5_seconds(world: World) -> None:
    world.portal.script.append(SilentPeer)
    world.start()
    peer = await world.portal.peers.next()
    await peer.next_event("phx_join")

    world.clock.advance(5.0)

    assert (await world.inbox.next_of(Lost)).reason == "no answer to the join within 5 s"
    assert await peer.closes.next() == "gone"


@pytest_twisted.ensureDeferred
async def test_a_refused_join_is_final(world: World) -> None:
    world.portal.script.append(SilentPeer)
    world.start()
    peer = await world.portal.peers.next()
    peer.reply((await peer.next_event("phx_join"))["ref"], "error", {"reason": "invalid_version"})

    error = (await world.inbox.next_of(Fatal)).error

    assert type(error) is PortalError
    assert "invalid_version" in str(error)
    assert await peer.closes.next() == "gone"


@pytest_twisted.ensureDeferred
async def test_a_connection_broken_right_after_the_upgrade_is_retried_with_backoff(world: World) -> None:
    world.portal.script += [HastyPeer, HastyPeer]
    world.start()

    losses = []
    for _ in range(2):
        losses.append(await world.inbox.next_of(Lost))
        world.clock.advance(losses[-1].delay)
    await _joined(world)

    assert [lost.delay for lost in losses] == [0.25, 0.375]
    assert [lost.was_joined for lost in losses] == [False, False]
    assert len(world.portal.requests.items) == 3


@pytest_twisted.ensureDeferred
async def test_a_crashed_channel_is_joined_anew_on_the_same_socket(world: World) -> None:
    world.start()
    peer = await _joined(world)
    world.clock.advance(6.0)

    peer.push("phx_error", {})

    await world.inbox.next_of(Joined)
    assert len(world.portal.peers.items) == 0


@pytest_twisted.ensureDeferred
async def test_garbage_is_skipped(world: World) -> None:
    world.start()
    peer = await _joined(world)

    peer.say(b'{"topic":7}')
    peer.say(b"[1,2]")
    peer.sendMessage(b"\x00\x01", isBinary=True)
    peer.push("init", {})

    assert await world.inbox.next_of(PushReceived) == PushReceived("init", {})
    assert world.service.counters.malformed == 2


@pytest_twisted.ensureDeferred
async def test_a_frame_that_ends_too_early_means_reconnecting(world: World) -> None:
    world.start()
    peer = await _joined(world)
    peer.say(b'{"topic":"client"')

    assert (await world.inbox.next_of(Lost)).was_joined
    world.clock.advance(1.0)
    await _joined(world)


@pytest_twisted.ensureDeferred
async def test_a_close_frame_is_answered_and_reported(world: World) -> None:
    world.start()
    peer = await _joined(world)
    peer.sendCloseFrame(code=1012, reasonUtf8=b"restart", isReply=False)

    assert await peer.closes.next() == 1000
    assert (await world.inbox.next_of(Lost)).reason == "the portal closed the WebSocket: 1012 restart"


@pytest.mark.parametrize("payload", [b"", b"abc", b"\xff\xfe"])
@pytest_twisted.ensureDeferred
async def test_a_ping_is_only_answered(world: World, payload: bytes) -> None:
    world.start()
    peer = await _joined(world)
    peer.sendPing(payload)

    assert await peer.pongs.next() == payload
    assert world.service.state is ChannelState.JOINED


@pytest_twisted.ensureDeferred
async def test_a_large_message_comes_through(world: World) -> None:
    world.start()
    peer = await _joined(world)
    peer.push("init", "x" * 2_000_000)

    assert len((await world.inbox.next_of(PushReceived)).payload) == 2_000_000


@pytest_twisted.ensureDeferred
async def test_a_message_beyond_the_limit_ends_the_connection(world: World) -> None:
    world.start()
    peer = await _joined(world)
    peer.transport.write(struct.pack("!BBQ", 0x81, 127, (16 << 20) + 1))  # the header of such a text frame

    assert (await world.inbox.next_of(Lost)).was_joined


@pytest_twisted.ensureDeferred
async def test_heartbeats_are_sent_and_counted(world: World) -> None:
    world.start()
    peer = await _joined(world)

    world.clock.advance(20.0)

    for _ in range(2):
        assert (await peer.next_event("heartbeat"))["topic"] == "phoenix"
    assert world.service.counters.heartbeats == 2
    assert world.service.counters.heartbeat_late_max == 0.0


@pytest_twisted.ensureDeferred
async def test_a_portal_that_answers_no_heartbeat_is_left(world: World) -> None:
    world.start()
    peer = await _joined(world)

    world.clock.advance(40.0)

    assert (await world.inbox.next_of(Lost)).reason == "too many unanswered heartbeats"
    assert await peer.closes.next() == "gone"


@pytest_twisted.ensureDeferred
async def test_an_unreachable_portal_is_tried_again_and_its_name_resolved_each_time() -> None:
    world = World(UnrulyPortal(), host="portal.example")
    await world.portal.stop()
    world.start()

    lost = await world.inbox.next_of(Lost)
    assert f"127.0.0.1:{world.portal.port}" in lost.reason
    world.addresses = []
    world.clock.advance(
        lost.delay
    )  # not longer: an attempt that finds no address ends at once, and the next is due soon
    assert "portal.example" in (await world.inbox.next_of(Lost)).reason

    assert world.resolved == ["portal.example", "portal.example"]
    await world.service.stopService()


@pytest_twisted.ensureDeferred
async def test_an_address_that_is_dead_does_not_hide_the_next(world: World) -> None:
    other = World(world.portal, host="portal.example")
    other.addresses = ["255.255.255.255", "127.0.0.1", "127.0.0.1"]
    other.start()

    await other.inbox.next_of(Joined)
    await other.service.stopService()


@pytest_twisted.ensureDeferred
async def test_the_systems_resolver_knows_localhost() -> None:
    hosts = await HostResolver(_reactor).resolve("localhost")

    assert {"127.0.0.1", "::1"} & set(hosts)
    with pytest.raises(DNSLookupError, match="no address is known for no-such-host"):
        await HostResolver(_reactor).resolve("no-such-host.invalid")


@pytest_twisted.ensureDeferred
async def test_lookups_that_hang_are_limited_and_in_threads_that_nothing_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: released.wait(10) and [])
    resolver = HostResolver(_reactor)

    waiting = [resolver.resolve("portal.example") for _ in range(MAX_LOOKUPS)]
    with pytest.raises(DNSLookupError, match="name servers of this host don't answer"):
        await resolver.resolve("portal.example")

    threads = [thread for thread in threading.enumerate() if thread.name == "resolve portal.example"]
    assert [thread.daemon for thread in threads] == [True] * MAX_LOOKUPS
    released.set()
    assert [await one for one in waiting] == [[]] * MAX_LOOKUPS
    await resolver.resolve("portal.example")


@pytest_twisted.ensureDeferred
async def test_losing_and_regaining_the_portal_is_logged(world: World, logged: list[dict[str, Any]]) -> None:
    world.start()
    peer = await _joined(world)
    peer.transport.abortConnection()
    lost = await world.inbox.next_of(Lost)
    world.clock.advance(lost.delay)
    await _joined(world)

    messages = [message for message in logged if message["level"] == "info"]
    assert [message["message_type"] for message in messages] == [
        "portal:joined",
        "portal:connection_lost",
        "portal:retry_scheduled",
        "portal:joined",
    ]
    assert messages[1]["reason"] == lost.reason
    assert (messages[2]["reason"], messages[2]["attempt"], messages[2]["delay"]) == (lost.reason, 1, 0.25)


@pytest_twisted.ensureDeferred
async def test_tls_to_a_portal_with_a_private_ca(tmp_path: Path) -> None:
    certificate = write_certificates(tmp_path, "portal.example")
    for host in ("portal.example", "127.0.0.1"):
        world = World(
            UnrulyPortal(tls_server(certificate)),
            scheme="wss",
            host=host,
            trust=trust_from_file(tmp_path / "ca.pem"),
        )
        world.start()
        peer = await _joined(world)
        peer.push("init", "x" * 200_000)

        assert len((await world.inbox.next_of(PushReceived)).payload) == 200_000
        await world.stop()


@pytest.mark.parametrize(
    ("host", "trusts_ca", "reason"),
    [
        ("other.example", True, "TLS: the portal's certificate is for another host"),
        ("portal.example", False, "TLS: certificate verify failed"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_certificate_that_is_not_trusted_is_retried_and_named(
    tmp_path: Path, logged: list[dict[str, Any]], host: str, trusts_ca: bool, reason: str
) -> None:
    certificate = write_certificates(tmp_path, "portal.example")
    trust = trust_from_file(tmp_path / "ca.pem") if trusts_ca else None
    world = World(UnrulyPortal(tls_server(certificate)), scheme="wss", host=host, trust=trust)
    world.start()

    lost = await world.inbox.next_of(Lost)

    assert lost.reason == reason
    assert [m["reason"] for m in logged if m["message_type"] == "portal:retry_scheduled"] == [reason]
    assert len(world.portal.requests.items) == 0  # no token was sent
    await world.stop()


def test_a_ca_file_without_certificates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")

    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(ConfigurationError, match=name):
            trust_from_file(tmp_path / name)


@pytest_twisted.ensureDeferred
async def test_a_new_key_aborts_the_old_socket_and_connects_at_once(world: World) -> None:
    world.start(bytes(32))
    old = await _joined(world)
    await world.portal.requests.next()

    world.service.connect(b"\x01" * 32)
    assert not world.service.send("create_flow", {})

    request = await world.portal.requests.next()
    assert request.params["public_key"] == ["AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="]
    assert await old.closes.next() == "gone"  # without a close frame before
    await _joined(world)
    assert not any(isinstance(item, Lost) for item in world.inbox.items)


@pytest_twisted.ensureDeferred
async def test_a_new_key_ends_an_attempt_under_way(world: World) -> None:
    world.portal.answer()
    world.start()
    await world.portal.requests.next()

    world.service.connect(b"\x01" * 32)

    await world.portal.losses.next()
    await _joined(world)


@pytest_twisted.ensureDeferred
async def test_stopping_closes_the_websocket_in_good_order(world: World) -> None:
    world.start()
    peer = await _joined(world)

    await world.service.stopService()

    assert await peer.closes.next() == 1000
    assert not world.service.send("create_flow", {})
    assert world.service.counters.refused_not_connected == 1


@pytest_twisted.ensureDeferred
async def test_stopping_does_not_wait_for_a_portal_that_answers_no_close(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "CLOSE_TIMEOUT", 0.05)
    world.portal.script.append(RudePeer)
    world.start()
    peer = await _joined(world)

    await world.service.stopService()

    assert await peer.closes.next() == 1000
    assert await peer.closes.next() == "gone"


@pytest_twisted.ensureDeferred
async def test_stopping_while_the_name_is_being_resolved_connects_nowhere(world: World) -> None:
    other = World(world.portal, host="portal.example")
    resolving: Deferred[list[str]] = Deferred()
    other.service._resolve = lambda _: resolving
    other.start()

    await other.service.stopService()

    assert resolving.called  # cancelled
    assert other.inbox.items == world.portal.requests.items


@pytest_twisted.ensureDeferred
async def test_a_stopped_service_can_be_started_again(world: World) -> None:
    world.start()
    await _joined(world)
    await world.service.stopService()
    world.start()

    await _joined(world)


@pytest_twisted.ensureDeferred
async def test_while_the_queue_is_full_nothing_is_read_and_nothing_is_lost(world: World) -> None:
    world.start()
    peer = await _joined(world)
    world.inbox.capacity = 2
    for number in range(3000):
        peer.push("x", {"number": number, "filler": "y" * 2000})
    await world.inbox.next()
    while (read := world.service.counters.received) != await _later(lambda: world.service.counters.received):
        pass

    assert read < 3000
    world.inbox.capacity = None
    world.inbox.items.clear()
    rest = [(await world.inbox.next_of(PushReceived)).payload["number"] for _ in range(3000 - 3)]
    assert rest == list(range(3, 3000))


@pytest_twisted.ensureDeferred
async def test_events_that_a_full_queue_refused_are_dropped_with_the_connection(world: World) -> None:
    world.start()
    peer = await _joined(world)
    world.inbox.capacity = 1
    for number in range(5):
        peer.push("x", number)
    assert await world.inbox.next_of(PushReceived) == PushReceived("x", 0)
    world.inbox.capacity = 0
    world.clock.advance(40.0)
    world.inbox.capacity = None

    events = []
    while not isinstance(event := await world.inbox.next(), Lost):
        events.append(event)
    assert PushReceived("x", 4) not in events


@pytest_twisted.ensureDeferred
async def test_a_portal_that_does_not_read_fills_the_queue_and_then_is_refused_more(world: World) -> None:
    world.start()
    peer = await _joined(world)
    peer.transport.pauseProducing()
    accepted = 0
    while world.service.send("x", {"number": accepted, "filler": "y" * 50_000}):
        accepted += 1
        assert accepted < 5000
        await _later(lambda: None, 0.0)
    assert world.service.counters.refused_full == 1

    peer.transport.resumeProducing()

    for number in range(accepted):
        assert (await peer.next_event("x"))["payload"]["number"] == number


@pytest_twisted.ensureDeferred
async def test_the_token_appears_in_no_log_at_any_level(world: World, logged: list[dict[str, Any]]) -> None:
    log.set_threshold(log.DEBUG)
    written = io.StringIO()
    observer = textFileLogObserver(written)
    globalLogPublisher.addObserver(observer)
    level = txaio.get_global_log_level()
    txaio.set_global_log_level("trace")
    try:
        world.portal.answer(*_refusal(503, {"detail": "later"}))
        world.portal.answer(b"nonsense\r\n\r\n")
        world.start()
        for _ in range(2):
            world.clock.advance((await world.inbox.next_of(Lost)).delay)
        # The test's own portal is on Autobahn too, and logs what it is asked.
        written.truncate(0)
        world.portal.script.append(_quiet)
        await _joined(world)
        await world.service.stopService()
    finally:
        txaio.set_global_log_level(level)
        globalLogPublisher.removeObserver(observer)

    assert [message for message in logged if message["message_type"] == "portal:dialed"]
    assert TOKEN not in json.dumps(logged, default=repr)
    assert TOKEN not in written.getvalue()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("30", 30.0),
        (" 0 ", 0.0),
        ("Fri, 15 Jan 2027 08:01:00 GMT", 60.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
        ("Fri, 99 Jan 2027 07:00:00 GMT", None),
        ("Fri, 15 Jan 2027 99:00:00 GMT", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("9" * 400, None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, expected: float | None) -> None:
    assert parse_retry_after(value, 1_800_000_000.0) == expected


async def _joined(world: World) -> Peer:
    """The portal's end of a connection that has just been joined."""
    await world.inbox.next_of(Joined)
    peer: Peer = await world.portal.peers.next()
    await peer.next_event("phx_join")
    return peer


async def _later(read: Any, seconds: float = 0.05) -> Any:
    """The value of `read` after the reactor has been busy with other work for a while."""
    await deferLater(_reactor, seconds)
    return read()


def _quiet(portal: UnrulyPortal) -> Peer:
    peer = Peer(portal)
    peer.log = txaio.make_logger()
    peer.log.set_log_level("critical")
    return peer


def _refusal(status: int, body: Any, headers: str = "", *, kind: str = _PROBLEM) -> tuple[bytes, bytes]:
    """Head and body of an answer that is not an upgrade."""
    content = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Reason\r\nContent-Type: {kind}\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
    return head.encode(), content

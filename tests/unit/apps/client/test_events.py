"""The stream of a session's events."""

from __future__ import annotations

import ipaddress

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred

from firezone_tunnel import aio
from firezone_tunnel.apps.client.events import (
    CAPACITY,
    AllGatewaysOffline,
    Disconnected,
    Event,
    EventBuffer,
    EventStream,
    ResourcesUpdated,
    TunInterfaceUpdated,
)
from firezone_tunnel.errors import AuthenticationError, PlatformError


@pytest_twisted.ensureDeferred
async def test_events_come_in_order_and_then_the_end_again_and_again() -> None:
    buffer, stream = _stream()
    for event in _offline(3):
        buffer.put(event)
    buffer.end()

    assert [event async for event in stream] == _offline(3)
    assert await stream.next() is None
    assert [event async for event in stream] == []


def test_a_waiting_reader_gets_the_next_event_at_once() -> None:
    buffer, stream = _stream()
    got: list[Event | None] = []
    stream.next().addCallback(got.append)
    assert got == []

    first, second = _offline(2)
    buffer.put(first)
    buffer.put(second)

    assert got == [first]
    stream.next().addCallback(got.append)
    assert got == [first, second]


def test_a_waiting_reader_learns_of_the_end() -> None:
    buffer, stream = _stream()
    got: list[Event | None] = []
    stream.next().addCallback(got.append)

    buffer.end()
    buffer.put(_offline(1)[0])

    assert got == [None]
    stream.next().addCallback(got.append)
    assert got == [None, None]


def test_a_second_reader_is_refused() -> None:
    _, stream = _stream()
    stream.next()

    with pytest.raises(RuntimeError, match="one reader"):
        stream.next()


def test_waiting_can_be_given_up_and_taken_up_again() -> None:
    buffer, stream = _stream()
    waiting = stream.next()
    failures: list[object] = []
    waiting.addErrback(lambda failure: failures.append(failure.check(CancelledError)))

    waiting.cancel()
    buffer.put(_offline(1)[0])

    assert failures == [CancelledError]
    assert _result(stream.next()) == _offline(1)[0]


def test_only_the_newest_configuration_and_resources_wait() -> None:
    buffer, stream = _stream()
    (offline,) = _offline(1)
    for number in range(5000):
        buffer.put(_interface(number))
        buffer.put(ResourcesUpdated(()))
    buffer.put(offline)
    buffer.put(_interface(7))
    buffer.end()

    assert _drain(stream) == [ResourcesUpdated(()), offline, _interface(7)]
    assert stream.dropped == 0


def test_the_oldest_events_beyond_the_capacity_are_dropped_and_counted() -> None:
    buffer, stream = _stream()
    for event in _offline(CAPACITY + 5):
        buffer.put(event)
    disconnected = Disconnected(PlatformError("the end"))
    buffer.put(disconnected)
    buffer.end()

    events = _drain(stream)

    assert CAPACITY == 1000
    assert stream.dropped == 6
    assert events == [*_offline(CAPACITY + 5)[6:], disconnected]


def test_an_event_that_was_put_back_is_the_next_again() -> None:
    buffer, stream = _stream()
    first, second = _offline(2)
    buffer.put(first)
    buffer.put(second)

    taken = _result(stream.next())
    assert taken is not None
    buffer.put_back(taken)
    buffer.end()

    assert _drain(stream) == [first, second]


def test_the_end_is_reported_even_if_events_are_unread() -> None:
    buffer, stream = _stream()
    buffer.put(_offline(1)[0])
    calls: list[str] = []
    buffer.when_ended().addCallback(lambda _: calls.append("waited"))
    assert calls == []

    buffer.end()
    buffer.end()
    buffer.when_ended().addCallback(lambda _: calls.append("too late"))

    assert calls == ["waited", "too late"]
    assert _drain(stream) == _offline(1)


def test_only_a_refused_token_requires_to_sign_in() -> None:
    assert Disconnected(AuthenticationError("expired", requires_sign_in=True)).requires_sign_in
    assert not Disconnected(AuthenticationError("later", requires_sign_in=False)).requires_sign_in
    assert not Disconnected(PlatformError("no TUN")).requires_sign_in


def test_a_reader_sees_only_public_names() -> None:
    names = [name for name in dir(EventStream) if not name.startswith("_")]

    assert names == ["dropped", "next"]
    assert names == [name for name in dir(aio.EventStream) if not name.startswith("_")]


def test_its_repr_shows_its_state() -> None:
    buffer, stream = _stream()
    buffer.put(_offline(1)[0])
    assert repr(stream) == repr(aio.EventStream(buffer)) == "<EventStream: open, 1 unread, 0 dropped>"

    buffer.end()

    assert repr(stream) == "<EventStream: ended, 1 unread, 0 dropped>"


def _stream() -> tuple[EventBuffer, EventStream]:
    buffer = EventBuffer()
    return buffer, EventStream(buffer)


def _offline(count: int) -> list[Event]:
    return [AllGatewaysOffline(str(number)) for number in range(count)]


def _interface(number: int) -> TunInterfaceUpdated:
    address = ipaddress.IPv4Address(number)
    return TunInterfaceUpdated(ipv4=address, ipv6=None, dns=(), search_domain=None, routes=())


def _drain(stream: EventStream) -> list[Event]:
    """Read all events up to the end, without a reactor."""
    events: list[Event] = []
    while (event := _result(stream.next())) is not None:
        events.append(event)
    return events


def _result(deferred: Deferred[Event | None]) -> Event | None:
    results: list[Event | None] = []
    deferred.addCallback(results.append)
    (result,) = results
    return result

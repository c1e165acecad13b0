"""The stream of a session's events."""

from __future__ import annotations

import ipaddress

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred

from firezone_tunnel.apps.client.events import (
    CAPACITY,
    AllGatewaysOffline,
    Disconnected,
    Event,
    EventStream,
    ResourcesUpdated,
    TunInterfaceUpdated,
)
from firezone_tunnel.errors import AuthenticationError, PlatformError


@pytest_twisted.ensureDeferred
async def test_events_come_in_order_and_then_the_end_again_and_again() -> None:
    stream = EventStream()
    for event in _offline(3):
        stream.put(event)
    stream.end()

    assert [event async for event in stream] == _offline(3)
    assert await stream.next() is None
    assert [event async for event in stream] == []


def test_who_waits_gets_the_next_event_at_once() -> None:
    stream = EventStream()
    got: list[Event | None] = []
    stream.next().addCallback(got.append)
    assert got == []

    first, second = _offline(2)
    stream.put(first)
    stream.put(second)

    assert got == [first]
    stream.next().addCallback(got.append)
    assert got == [first, second]


def test_who_waits_is_told_of_the_end() -> None:
    stream = EventStream()
    got: list[Event | None] = []
    stream.next().addCallback(got.append)

    stream.end()
    stream.put(_offline(1)[0])

    assert got == [None]
    stream.next().addCallback(got.append)
    assert got == [None, None]


def test_a_second_consumer_is_refused() -> None:
    stream = EventStream()
    stream.next()

    with pytest.raises(RuntimeError, match="one consumer"):
        stream.next()


def test_waiting_can_be_given_up_and_taken_up_again() -> None:
    stream = EventStream()
    waiting = stream.next()
    failures: list[object] = []
    waiting.addErrback(lambda failure: failures.append(failure.check(CancelledError)))

    waiting.cancel()
    stream.put(_offline(1)[0])

    assert failures == [CancelledError]
    assert _result(stream.next()) == _offline(1)[0]


def test_of_configurations_and_of_resources_only_the_newest_waits() -> None:
    stream = EventStream()
    (offline,) = _offline(1)
    for number in range(5000):
        stream.put(_interface(number))
        stream.put(ResourcesUpdated(()))
    stream.put(offline)
    stream.put(_interface(7))
    stream.end()

    assert _drain(stream) == [ResourcesUpdated(()), offline, _interface(7)]
    assert stream.dropped == 0


def test_beyond_its_capacity_the_oldest_are_dropped_and_counted() -> None:
    stream = EventStream()
    for event in _offline(CAPACITY + 5):
        stream.put(event)
    stream.put(Disconnected(PlatformError("the end")))
    stream.end()

    events = _drain(stream)

    assert CAPACITY == 1000
    assert stream.dropped == 6
    assert events == [*_offline(CAPACITY + 5)[6:], Disconnected(events[-1].error)]


def test_what_was_put_back_is_the_next_again() -> None:
    stream = EventStream()
    first, second = _offline(2)
    stream.put(first)
    stream.put(second)

    taken = _result(stream.next())
    assert taken is not None
    stream.put_back(taken)
    stream.end()

    assert _drain(stream) == [first, second]


def test_the_end_is_told_whether_all_was_read_or_not() -> None:
    stream = EventStream()
    stream.put(_offline(1)[0])
    told: list[str] = []
    stream.when_ended().addCallback(lambda _: told.append("waited"))
    assert told == []

    stream.end()
    stream.end()
    stream.when_ended().addCallback(lambda _: told.append("too late"))

    assert told == ["waited", "too late"]
    assert _drain(stream) == _offline(1)


def test_only_a_refused_token_requires_to_sign_in() -> None:
    assert Disconnected(AuthenticationError("expired", requires_sign_in=True)).requires_sign_in
    assert not Disconnected(AuthenticationError("later", requires_sign_in=False)).requires_sign_in
    assert not Disconnected(PlatformError("no TUN")).requires_sign_in


def _offline(count: int) -> list[Event]:
    return [AllGatewaysOffline(str(number)) for number in range(count)]


def _interface(number: int) -> TunInterfaceUpdated:
    address = ipaddress.IPv4Address(number)
    return TunInterfaceUpdated(ipv4=address, ipv6=None, dns=(), search_domain=None, routes=())


def _drain(stream: EventStream) -> list[Event]:
    """Everything up to the end, without a reactor."""
    events: list[Event] = []
    while (event := _result(stream.next())) is not None:
        events.append(event)
    return events


def _result(deferred: Deferred[Event | None]) -> Event | None:
    results: list[Event | None] = []
    deferred.addCallback(results.append)
    (result,) = results
    return result

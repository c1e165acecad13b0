"""The endpoint that marks its socket, and the race between several addresses."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Generator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as any_reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError, ConnectingCancelledError, ConnectionRefusedError, TCPTimedOutError
from twisted.internet.protocol import Factory, Protocol

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.udp.stream import MarkedEndpoint, RacingEndpoint

_MARK = 0xFD002021
_MARKING = 1 << 12 | 1 << 13  # CAP_NET_ADMIN or, since Linux 5.17, CAP_NET_RAW
_reactor: Any = any_reactor


class _Echo(Protocol):
    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


class _Caller(Protocol):
    def __init__(self) -> None:
        self.heard: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.heard.callback(data)


class _Silent(Factory):
    """A factory that never builds a protocol."""

    protocol = None

    def buildProtocol(self, addr: Any) -> None:
        raise AssertionError("nothing should have connected")


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest) -> Generator[tuple[str, int]]:
    """An echo server's host and port."""
    port = _reactor.listenTCP(0, Factory.forProtocol(_Echo), interface=request.param)
    yield request.param, port.getHost().port
    pytest_twisted.blockon(port.stopListening())


@pytest.fixture
def full_backlog() -> Generator[int]:
    """A port of 127.0.0.1 that answers no SYN: its backlog is full and never accepted."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for waiter in waiting:
            waiter.setblocking(False)
            waiter.connect_ex(("127.0.0.1", port))
        yield port
        for waiter in waiting:
            waiter.close()


@pytest_twisted.ensureDeferred
async def test_it_connects_and_carries_bytes_both_ways(server: tuple[str, int]) -> None:
    caller: Any = await MarkedEndpoint(_reactor, *server, None).connect(Factory.forProtocol(_Caller))

    caller.transport.write(b"hello")

    assert await caller.heard == b"hello"
    assert caller.transport.getPeer().host == server[0]
    caller.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_the_socket_carries_the_mark_and_does_not_wait_to_fill_segments(server: tuple[str, int]) -> None:
    _need_net_admin()
    caller: Any = await MarkedEndpoint(_reactor, *server, _MARK).connect(Factory.forProtocol(_Caller))

    stream = caller.transport.getHandle()
    mark = stream.getsockopt(socket.SOL_SOCKET, 36, 4)
    assert struct.unpack("=I", mark) == (_MARK,)
    assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not os.get_inheritable(stream.fileno())
    caller.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_without_the_capability_marking_fails_in_one_sentence() -> None:
    with _without_net_admin(), pytest.raises(PlatformError, match="CAP_NET_ADMIN"):
        await MarkedEndpoint(_reactor, "127.0.0.1", 9, _MARK).connect(_Silent())


@pytest_twisted.ensureDeferred
async def test_a_refused_connection_names_its_address() -> None:
    port = _closed_port()

    with pytest.raises(ConnectionRefusedError, match=rf"127\.0\.0\.1:{port}"):
        await MarkedEndpoint(_reactor, "127.0.0.1", port, None).connect(_Silent())


@pytest_twisted.ensureDeferred
async def test_an_address_without_a_route_fails_at_once() -> None:
    with pytest.raises(ConnectError):
        await MarkedEndpoint(_reactor, "255.255.255.255", 9, None).connect(_Silent())


@pytest_twisted.ensureDeferred
async def test_silence_ends_after_the_timeout(full_backlog: int) -> None:
    with pytest.raises(TCPTimedOutError):
        await MarkedEndpoint(_reactor, "127.0.0.1", full_backlog, None, timeout=0.05).connect(_Silent())

    assert _descriptors_of(MarkedEndpoint) == []


@pytest_twisted.ensureDeferred
async def test_a_cancelled_connection_leaves_nothing_behind(full_backlog: int) -> None:
    connecting = MarkedEndpoint(_reactor, "127.0.0.1", full_backlog, None).connect(_Silent())
    connecting.cancel()

    with pytest.raises(ConnectingCancelledError):
        await connecting
    assert _descriptors_of(MarkedEndpoint) == []


def test_a_name_is_not_an_address() -> None:
    with pytest.raises(ValueError, match="localhost"):
        MarkedEndpoint(_reactor, "localhost", 1, None)


@pytest_twisted.ensureDeferred
async def test_an_address_that_does_not_answer_does_not_block_the_next(
    server: tuple[str, int], full_backlog: int
) -> None:
    endpoints = [
        MarkedEndpoint(_reactor, "127.0.0.1", full_backlog, None),
        MarkedEndpoint(_reactor, "127.0.0.1", _closed_port(), None),
        MarkedEndpoint(_reactor, *server, None),
    ]

    caller: Any = await RacingEndpoint(_reactor, endpoints, stagger=0.02).connect(Factory.forProtocol(_Caller))

    assert caller.transport.getPeer().port == server[1]
    assert _descriptors_of(MarkedEndpoint) == []
    caller.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_the_first_address_wins_without_the_second_being_tried(server: tuple[str, int]) -> None:
    second = _Recorder()

    caller: Any = await RacingEndpoint(
        _reactor, [MarkedEndpoint(_reactor, *server, None), second], stagger=5.0
    ).connect(Factory.forProtocol(_Caller))

    assert second.attempts == 0
    caller.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_every_reason_is_reported_when_all_addresses_fail() -> None:
    ports = [_closed_port(), _closed_port()]

    with pytest.raises(ConnectError) as caught:
        await RacingEndpoint(_reactor, [MarkedEndpoint(_reactor, "127.0.0.1", port, None) for port in ports]).connect(
            _Silent()
        )

    assert all(f"127.0.0.1:{port}" in str(caught.value) for port in ports)


@pytest_twisted.ensureDeferred
async def test_a_missing_capability_takes_precedence_over_other_failures() -> None:
    endpoints = [
        MarkedEndpoint(_reactor, "127.0.0.1", _closed_port(), None),
        MarkedEndpoint(_reactor, "127.0.0.1", 9, _MARK),
    ]
    with _without_net_admin(), pytest.raises(PlatformError):
        await RacingEndpoint(_reactor, endpoints, stagger=0.0).connect(_Silent())


@pytest_twisted.ensureDeferred
async def test_a_cancelled_race_stops_all_runners() -> None:
    runners = [_Recorder(), _Recorder()]
    race = RacingEndpoint(_reactor, runners, stagger=60.0).connect(_Silent())
    race.cancel()

    with pytest.raises(CancelledError):
        await race
    assert [(runner.attempts, runner.cancelled) for runner in runners] == [(1, 1), (0, 0)]


class _Recorder:
    """An endpoint that never connects."""

    def __init__(self) -> None:
        self.attempts = self.cancelled = 0

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        self.attempts += 1
        return Deferred(self._cancelled)

    def _cancelled(self, deferred: Deferred[Any]) -> None:
        self.cancelled += 1


class _without_net_admin:
    """Drops the capabilities for marking from this thread temporarily."""

    def __enter__(self) -> None:
        self._before = _effective_capabilities()
        _set_effective(self._before & ~_MARKING)

    def __exit__(self, *details: object) -> None:
        _set_effective(self._before)


def _need_net_admin() -> None:
    if not _effective_capabilities() & _MARKING:
        pytest.skip("marking sockets takes CAP_NET_ADMIN")


def _effective_capabilities() -> int:
    header, data = _capability_structs()
    assert ctypes.CDLL(None).capget(header, data) == 0
    return int(data[0])


def _set_effective(mask: int) -> None:
    libc = ctypes.CDLL(None)
    header, data = _capability_structs()
    assert libc.capget(header, data) == 0
    data[0] = mask & 0xFFFFFFFF
    assert libc.capset(header, data) == 0


def _capability_structs() -> tuple[Any, Any]:
    """capget(2): version 3 and this thread; effective, permitted, inheritable, twice."""
    return (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descriptors_of(kind: type) -> list[Any]:
    """The pending connections that the reactor still holds."""
    return [writer for writer in _reactor.getWriters() if writer.logPrefix() == kind.__name__]

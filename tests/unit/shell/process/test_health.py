"""Health over HTTP, on loopback."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.testing import MemoryReactorClock

from firezone_tunnel import __version__
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import InUseError, PlatformError
from firezone_tunnel.shell.process.health import HealthServer


@pytest_twisted.ensureDeferred
async def test_it_is_alive_from_the_start_and_ready_when_the_process_is() -> None:
    obstacles = ["no portal"]
    server = HealthServer(reactor, SocketAddress("127.0.0.1", 0), lambda: obstacles)
    server.startService()
    port = server._port.getHost().port

    assert await _get(port, "/healthz") == (200, {"status": "ok", "version": __version__})
    assert await _get(port, "/readyz") == (503, {"status": "not ready", "version": __version__, "reasons": obstacles})
    obstacles = []
    assert (await _get(port, "/readyz"))[0] == 200
    await server.stopService()


@pytest_twisted.ensureDeferred
async def test_a_port_in_use_is_reported_in_one_sentence_with_a_way_out() -> None:
    first = HealthServer(reactor, SocketAddress("127.0.0.1", 0), list)
    first.startService()
    address = SocketAddress("127.0.0.1", first._port.getHost().port)
    second = HealthServer(reactor, address, list)

    with pytest.raises(InUseError, match=r"Can't serve health checks on .* in use.*choose another") as raised:
        second.startService()

    assert "\n" not in str(raised.value)
    await second.stopService()
    await first.stopService()


@pytest_twisted.ensureDeferred
async def test_an_address_that_is_not_ours_is_an_error_of_the_platform() -> None:
    server = HealthServer(reactor, SocketAddress("192.0.2.77", 8080), list)

    with pytest.raises(PlatformError, match="choose another --health-check-addr"):
        server.startService()
    await server.stopService()


@pytest_twisted.ensureDeferred
async def test_without_an_address_nothing_is_served() -> None:
    server = HealthServer(MemoryReactorClock(), None, list)

    server.startService()

    assert server._reactor.tcpServers == []
    await server.stopService()


class _Collector(Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.finished: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Any = None) -> None:
        self.finished.callback(self.received)


async def _get(port: int, path: str) -> tuple[int, Any]:
    """The status, and the body if it is JSON."""
    collector: Any = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), _Collector())
    collector.transport.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await collector.finished).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if b"json" in head else None

"""A bug that one sender triggers is not an outage for the others."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import reactor

from firezone_tunnel.apps.relay.config import EngineConfig, Secrets
from firezone_tunnel.apps.relay.engine import Engine
from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.relay.allocator import RelayConfig
from firezone_tunnel.core.relay.server import RelayServer
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import FirezoneError


def test_a_bug_that_one_batch_triggers_is_logged_and_the_relay_goes_on(
    monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    handled: list[DatagramBatch] = []
    failures: list[FirezoneError] = []

    def handle(server: RelayServer, batch: DatagramBatch, now: float, utc_now: float) -> None:
        handled.append(batch)
        if len(handled) == 1:
            raise KeyError("a bug")

    monkeypatch.setattr(RelayServer, "handle_client_datagrams", handle)
    config = EngineConfig(RelayConfig(public_ipv4="127.0.0.1"))
    engine = Engine(reactor, config, Secrets.new(), [], failures.append)
    batch = DatagramBatch.received(
        receive_buffer(), 20, 20, SocketAddress("127.0.0.2", 1), SocketAddress("127.0.0.1", 2)
    )

    engine.client_received(batch)
    engine.client_received(batch)

    assert (len(handled), failures) == (2, [])
    (message,) = logged
    assert message["message_type"] == "relay:event_failed"
    assert "a bug" in message["traceback"]

"""The log messages of a relay about itself, and their frequency."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from firezone_tunnel.apps.relay.engine import REPEAT_ADVICE_AFTER, STATISTICS_INTERVAL, Report
from firezone_tunnel.core.sansio import SocketAddress
from tests.unit.core.relay.world import PEER4, Client, World, code_of


def test_only_changes_are_logged_every_ten_seconds(logged: list[dict[str, Any]]) -> None:
    clock, client = Clock(), Client(World())
    report = Report(clock, client.world.server)
    report.start()
    clock.advance(STATISTICS_INTERVAL)
    assert logged == []

    client.allocate()
    client.bind(0x4000, PEER4)
    client.send_on(0x4000, bytes(500))
    clock.pump([STATISTICS_INTERVAL] * 3)

    found = [(message["allocations"], message["channels"], message["bytes_per_second"]) for message in logged]
    assert found == [(1, 1, 50)]
    report.stop()
    assert clock.getDelayedCalls() == []


def test_advice_about_private_peers_is_given_once_an_hour(logged: list[dict[str, Any]]) -> None:
    clock, client = Clock(), Client(World())
    client.allocate_dual()
    report = Report(clock, client.world.server)
    report.start()

    for host in ("10.0.0.1", "10.0.0.2", "fd00::1"):
        assert code_of(client.bind(0x4000, SocketAddress(host, 5000))) == 403
    clock.advance(STATISTICS_INTERVAL)
    assert _refused(logged) == [("10.0.0.0/8", 2), ("fc00::/7", 1)]

    client.bind(0x4000, SocketAddress("10.0.0.1", 5000))
    clock.advance(STATISTICS_INTERVAL)
    assert len(_refused(logged)) == 2
    clock.pump([STATISTICS_INTERVAL] * int(REPEAT_ADVICE_AFTER / STATISTICS_INTERVAL))
    assert _refused(logged)[2:] == [("10.0.0.0/8", 1)]
    report.stop()


def _refused(logged: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [
        (message["network"], message["times"])
        for message in logged
        if message["message_type"] == "relay:private_peers_refused"
    ]

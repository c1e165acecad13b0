"""The log messages of a relay about itself, and their frequency."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.apps.relay.engine import REPEAT_ADVICE_AFTER, STATISTICS_INTERVAL, Report
from firezone_tunnel.core.sansio import SocketAddress
from tests.unit.core.relay.world import PEER4, Client, World, code_of
from tests.unit.shell.reactor.turns import Turns


def test_only_changes_are_logged_every_ten_seconds(logged: list[dict[str, Any]]) -> None:
    client = Client(World())
    report = Reporting(client.world)
    report.wait()
    assert logged == []

    client.allocate()
    client.bind(0x4000, PEER4)
    client.send_on(0x4000, bytes(500))
    report.wait(intervals=3)

    found = [(message["allocations"], message["channels"], message["bytes_per_second"]) for message in logged]
    assert found == [(1, 1, 50)]
    report.stop()
    assert report.turns.readers == []


def test_advice_about_private_peers_is_given_once_an_hour(logged: list[dict[str, Any]]) -> None:
    client = Client(World())
    client.allocate_dual()
    report = Reporting(client.world)

    for host in ("10.0.0.1", "10.0.0.2", "fd00::1"):
        assert code_of(client.bind(0x4000, SocketAddress(host, 5000))) == 403
    report.wait()
    assert _refused(logged) == [("10.0.0.0/8", 2), ("fc00::/7", 1)]

    client.bind(0x4000, SocketAddress("10.0.0.1", 5000))
    report.wait()
    assert len(_refused(logged)) == 2
    report.wait(intervals=int(REPEAT_ADVICE_AFTER / STATISTICS_INTERVAL))
    assert _refused(logged)[2:] == [("10.0.0.0/8", 1)]
    report.stop()


class Reporting:
    """A report with a clock of its own, which starts at 0: whatever is due on it is past for the kernel's timers."""

    def __init__(self, world: World) -> None:
        self.now = 0.0
        self.turns = Turns()
        self._report = Report(self.turns, world.server, lambda: self.now)
        self._report.start()

    def wait(self, *, intervals: int = 1) -> None:
        for _ in range(intervals):
            assert [timer.deadline for timer in self.turns.readers] == [self.now + STATISTICS_INTERVAL]
            self.now += STATISTICS_INTERVAL
            self.turns.run()

    def stop(self) -> None:
        self._report.stop()


def _refused(logged: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [
        (message["network"], message["times"])
        for message in logged
        if message["message_type"] == "relay:private_peers_refused"
    ]

"""The log messages of a relay about itself, and their frequency."""

from __future__ import annotations

from typing import Any

import pytest

from firezone_tunnel.apps.relay.engine import REPEAT_ADVICE_AFTER, REPEAT_REFUSALS_AFTER, STATISTICS_INTERVAL, Report
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import NONCE, Method
from firezone_tunnel.shell.logs import events as log
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


def test_wrong_passwords_are_logged_once_a_minute_with_their_number(logged: list[dict[str, Any]]) -> None:
    world = World()
    report = Reporting(world)

    for _ in range(15):
        _log_in_with_a_wrong_password(world)
        report.wait()

    assert [message["count"] for message in _of("relay:logins_rejected", logged)] == [1, 6, 6]
    report.stop()
    last = _of("relay:logins_rejected", logged)[-1]
    assert (last["count"], last["reasons"]) == (2, {"wrong password": 2})


@pytest.mark.parametrize(("level", "naming"), [(log.DEBUG, ["relay:login_rejected"]), (log.INFO, [])])
def test_who_was_rejected_is_logged_at_debug_level_only(
    level: int, naming: list[str], logged: list[dict[str, Any]]
) -> None:
    world = World()
    report = Reporting(world)
    log.set_threshold(level)
    try:
        _log_in_with_a_wrong_password(world)
        report.wait()
    finally:
        log.set_threshold(log.INFO)

    report.stop()
    assert [message["message_type"] for message in logged if "alice" in str(message)] == naming


def test_forbidden_peers_are_logged_once_a_minute_with_their_number(logged: list[dict[str, Any]]) -> None:
    client = Client(World())
    client.allocate()
    report = Reporting(client.world)

    for _ in range(5):
        client.permit(SocketAddress("127.0.0.1", 22))
        client.bind(0x4000, SocketAddress("127.0.0.1", 22))
    report.wait(intervals=round(2 * REPEAT_REFUSALS_AFTER / STATISTICS_INTERVAL))

    report.stop()
    assert [message["count"] for message in _of("relay:peers_refused", logged)] == [10]


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


def _log_in_with_a_wrong_password(world: World) -> None:
    client = Client(world, username="2000000000:alice", password="wrong")
    client.nonce = "no nonce"
    for _ in range(2):
        client.nonce = client.ask(client.encode(Method.ALLOCATE)).get(NONCE)


def _of(message_type: str, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in logged if message["message_type"] == message_type]

"""Every deadline of the package runs on CLOCK_BOOTTIME: nothing uses the reactor's timers, which follow the wall clock.

The syntax trees show it: calls of the reactor's timers, and Twisted's helpers that make them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_TIMERS = {"addTimeout", "callLater", "call_later", "call_at", "deferLater", "LoopingCall", "TimerService", "react"}
_OUR_OWN = "firezone_tunnel.shell.reactor.clock"


def test_nothing_runs_on_the_wall_clock() -> None:
    paths = sorted((_ROOT / "firezone_tunnel").rglob("*.py"))
    assert len(paths) > 100

    assert [finding for path in paths for finding in wall_clock_timers(path.read_text(), path.name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "reactor.callLater(1, print)",
        "self._reactor.callLater(0, self._go)",
        "from twisted.internet.task import deferLater\ndeferLater(reactor, 1)",
        "from twisted.internet import task\ntask.LoopingCall(print).start(1)",
        "waiting.addTimeout(5, reactor)",
        "asyncio.get_running_loop().call_later(1, print)",
        "later = reactor.callLater",
        "now = self._reactor.seconds()",
    ],
)
def test_a_timer_on_the_wall_clock_is_found(source: str) -> None:
    assert list(wall_clock_timers(source, "example")) != []


@pytest.mark.parametrize(
    "source",
    [
        f"from {_OUR_OWN} import call_later\ncall_later(reactor, 1, print)",
        "BoottimeTimer(reactor, print).set(boottime() + 1)",
        "self._reactor.seconds = boottime",
    ],
)
def test_our_own_timers_are_allowed(source: str) -> None:
    assert list(wall_clock_timers(source, "example")) == []


def wall_clock_timers(source: str, name: str) -> Iterator[str]:
    """Each use of a timer that is not our own, as `file:line: name`."""
    tree = ast.parse(source)
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == _OUR_OWN
        for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=used) if used in _TIMERS:
                yield f"{name}:{node.lineno}: {used}"
            case ast.Attribute(attr="seconds", ctx=ast.Load()) if ast.unparse(node.value).endswith("reactor"):
                yield f"{name}:{node.lineno}: the reactor's clock"
            case ast.Name(id=used) if used in _TIMERS - ours:
                yield f"{name}:{node.lineno}: {used}"

"""An application's parts: how they start and stop together, and how their failures end the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock

from firezone_tunnel.errors import ConfigurationError, InUseError
from firezone_tunnel.shell.process.application import ApplicationService
from firezone_tunnel.shell.process.settings import LOG_SETTINGS, Options


def test_parts_start_in_order() -> None:
    first, second = parts = [Part(), Part()]

    Example(*parts).startService()

    assert (first.running, second.running) == (1, 1)


def test_the_process_ends_if_a_part_cannot_start_and_the_next_part_is_not_started(
    capfd: pytest.CaptureFixture[str],
) -> None:
    first, second = parts = [Part(fails=InUseError("the port is in use")), Part()]
    application = Example(*parts)

    application.startService()

    assert application.reactor.hasStopped
    assert capfd.readouterr().err == "example: the port is in use\n"
    assert (first.running, second.running, application.watches) == (1, 0, False)


def test_a_later_failure_ends_the_process(capfd: pytest.CaptureFixture[str], logged: list[dict[str, Any]]) -> None:
    application = Example(Part())
    application.startService()
    assert not application.reactor.hasStopped

    application.later.errback(ValueError("a bug"))

    assert application.reactor.hasStopped
    assert capfd.readouterr().err == "example: a bug\n"
    (message,) = [message for message in logged if message["message_type"] == "process:failed"]
    assert "in watch" in message["traceback"]


def test_it_has_stopped_when_all_parts_have_stopped() -> None:
    first, second = parts = [Part(), Part()]
    application = Example(*parts)
    application.startService()
    done: list[Any] = []

    application.stopService().addCallback(done.append)

    assert (first.running, second.running) == (0, 0)
    for part in parts:
        assert done == []
        part.stopped.callback(None)
    assert len(done) == 1


@pytest.mark.parametrize(("nodaemon", "debug"), [(1, 0), (0, 1)])
def test_it_runs_in_the_foreground(nodaemon: int, debug: int) -> None:
    Example(twistd={"nodaemon": nodaemon, "debug": debug})


def test_twistd_must_not_move_it_to_the_background() -> None:
    with pytest.raises(ConfigurationError, match="start it with twistd -n --pidfile= example"):
        Example(twistd={"nodaemon": 0, "debug": 0})


class Part(Service):
    def __init__(self, fails: Exception | None = None) -> None:
        self.stopped: Deferred[None] = Deferred()
        self._fails = fails

    def startService(self) -> None:
        super().startService()
        if self._fails is not None:
            raise self._fails

    def stopService(self) -> Deferred[None]:
        super().stopService()
        return self.stopped


class Example(ApplicationService):
    def __init__(self, *parts: Service, twistd: Mapping[str, int] | None = None) -> None:
        self.reactor: Any = MemoryReactorClock()
        self.reactor.running = True
        self.watches = False
        self.later: Deferred[None] = Deferred()
        options = _options()
        options.parent = twistd
        super().__init__(self.reactor, "example", options, *parts)

    async def watch(self) -> None:
        self.watches = True
        await self.later


class LogOptions(Options):
    settings = LOG_SETTINGS


def _options() -> Options:
    options = LogOptions({})
    options.parseOptions([])
    return options

"""The service at the top of each application, which twistd runs."""

from __future__ import annotations

from typing import Any

from twisted.application.service import IServiceCollection
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver
from twisted.python.failure import Failure

from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.file import LogFile
from firezone_tunnel.shell.logs.writer import LogWriter, TwistedMessages
from firezone_tunnel.shell.process.process import Process, stdout
from firezone_tunnel.shell.process.settings import Options
from firezone_tunnel.shell.reactor.service import MultiService, Service


class ApplicationService(MultiService):
    """The service that a twistd plugin gives to twistd, which shows it everything the process needs.

    Its parts start in order, each only if those before it did; they stop at once, and the process waits for all.
    """

    def __init__(self, reactor: Any, name: str, options: Options, *parts: Service | MultiService) -> None:
        """
        Raises: ConfigurationError.
        """
        super().__init__()
        _refuse_background(name, options)
        self.process = Process(reactor, name)
        self._log_level = options["log-level"]
        self._logs = [LogWriter(stdout(), style=options["log-format"])]
        if options["log-dir"] is not None:
            self._logs.append(LogWriter(LogFile(options["log-dir"], name), style=options["log-format"]))
        for part in parts:
            part.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:
        """twistd's application is the parent: from now on Twisted's own messages are among ours."""
        log.set_threshold(self._log_level)
        for one in self._logs:
            one.open()
        self.process.install(*self._logs)
        if IServiceCollection(parent, None) is not None:
            parent.setComponent(ILogObserver, TwistedMessages())
        super().setServiceParent(parent)

    def startService(self) -> None:
        """Whatever goes wrong, now or later, ends the process: twistd would swallow it."""
        running: Deferred[None] = Deferred.fromCoroutine(self._run())
        running.addErrback(self._failed)

    async def _run(self) -> None:
        super().startService()
        await self.watch()

    def _failed(self, failure: Failure) -> None:
        error: Any = failure.value
        self.process.fail(error)

    # What follows is for subclasses.

    async def watch(self) -> None:
        """The parts have started: say when the process is ready, and raise what has to end it."""
        raise NotImplementedError


def _refuse_background(name: str, options: Options) -> None:
    """twistd forks to the background after this: our threads would be gone, and stdout, which has the log, closed.

    Raises: ConfigurationError.
    """
    twistd = options.parent
    if twistd is not None and not (twistd["nodaemon"] or twistd["debug"]):
        raise ConfigurationError(
            f"It runs in the foreground only: start it with twistd -n --pidfile= {name}, by a service manager if needed"
        )

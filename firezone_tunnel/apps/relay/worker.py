"""A worker of a relay, as a process: `python -m firezone_tunnel.apps.relay.worker`, which only the relay itself starts.

Its parent controls it through pipes (`relay.worker_messages`). It ignores signals, which a terminal or a service
manager sends to all processes: a worker ends when the parent orders it to, or is gone.
"""

from __future__ import annotations

import gc
import signal
import socket
import sys
from typing import Any

import msgspec
from twisted.internet.protocol import Protocol
from twisted.logger import globalLogBeginner
from twisted.python.failure import Failure

from firezone_tunnel.apps.relay.engine import Engine
from firezone_tunnel.apps.relay.worker_messages import (
    FIRST_SOCKET,
    ORDERS,
    REPORTS,
    Begin,
    Drain,
    Lines,
    StopDraining,
    WorkerFailed,
    WorkerServing,
    decode_order,
    encode,
)
from firezone_tunnel.errors import FirezoneError, InternalError, one_line
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.writer import LogWriter, TwistedMessages
from firezone_tunnel.shell.reactor.clock import call_later

FLUSH_TIMEOUT = 1.0  # seconds for the last report


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from twisted.internet import reactor
    from twisted.internet.stdio import StandardIO

    logs = LogWriter(sys.stdout, style="json")
    logs.open()
    globalLogBeginner.beginLoggingTo([TwistedMessages()], redirectStandardIO=False, discardBuffer=True)
    worker = WorkerProtocol(reactor)
    pipes: Any = StandardIO
    pipes(worker, stdin=ORDERS, stdout=REPORTS)
    running: Any = reactor
    running.run(installSignalHandlers=False)
    logs.close()
    sys.exit(worker.exit_code)


class WorkerProtocol(Protocol):
    """Executes its parent's orders."""

    def __init__(self, reactor: Any) -> None:
        self.exit_code = 0
        self.transport: Any = None
        self._reactor = reactor
        self._lines = Lines()
        self._engine: Engine | None = None
        self._is_ending = False

    def dataReceived(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            try:
                self._obey(line)
            except (FirezoneError, OSError, ValueError, msgspec.MsgspecError) as error:
                self._fail(error)

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The parent is gone, or our last report is sent."""
        if self._reactor.running:
            self._reactor.stop()

    def _obey(self, line: bytes) -> None:
        match decode_order(line):
            case Begin() as begin:
                self._begin(begin)
            case Drain() if self._engine is not None:
                self._engine.stop().addCallback(lambda _: self._end())
            case StopDraining() if self._engine is not None:
                self._engine.stop_draining()
                self._engine.stop().addCallback(lambda _: self._end())
            case _:
                self._end()

    def _begin(self, begin: Begin) -> None:
        log.set_threshold(begin.log_level)
        sockets = [socket.socket(fileno=FIRST_SOCKET + number) for number in range(begin.sockets)]
        for one in sockets:
            one.setblocking(False)
        self._engine = Engine(self._reactor, begin.config, begin.secrets, sockets, self._fail)
        self._engine.start()
        gc.collect()
        gc.freeze()  # no collection looks at what start-up made
        self.transport.write(encode(WorkerServing()))

    def _fail(self, error: BaseException) -> None:
        self.exit_code = 1
        if isinstance(error, InternalError):  # the parent learns the reason only
            log.error("relay:crashed", reason=one_line(error), traceback=error.traceback)
        self.transport.write(encode(WorkerFailed(one_line(error))))
        self._end()

    def _end(self) -> None:
        """End once our last report is sent."""
        if not self._is_ending:
            self._is_ending = True
            call_later(self._reactor, FLUSH_TIMEOUT, self.connectionLost)
            self.transport.loseConnection()


if __name__ == "__main__":
    main()

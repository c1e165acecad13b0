"""The workers of a relay, as their parent manages them: start, stop, and replacement when one dies.

See docs/decisions.md, 24.

The parent holds the listening sockets of all workers, and each worker holds its own. A new worker inherits the sockets
of its predecessor, so the group of sockets, and with it the worker of each client, stays the same.
"""

from __future__ import annotations

import enum
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import attrs
import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from firezone_tunnel.apps.relay.config import EngineConfig, Secrets
from firezone_tunnel.apps.relay.listening import close_all
from firezone_tunnel.apps.relay.worker_messages import (
    ERRORS,
    FIRST_SOCKET,
    LOG,
    ORDERS,
    REPORTS,
    Begin,
    Drain,
    Lines,
    Order,
    StopDraining,
    WorkerServing,
    decode_report,
    encode,
)
from firezone_tunnel.errors import FirezoneError, PlatformError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, call_later

FIRST_DELAY = 0.1  # seconds before a worker that died is replaced, twice as many each time
MAX_DELAY = 30.0
STEADY_AFTER = 60.0
"""Seconds of service after which a death is again the first."""
KILL_AFTER = 2.0
"""Seconds that a worker is overdue before it is killed."""

_COMMAND = (sys.executable, "-P", "-m", "firezone_tunnel.apps.relay.worker")
_NOT_INHERITED = frozenset({"CREDENTIALS_DIRECTORY", "FIREZONE_TOKEN", "NOTIFY_SOCKET"})


class WorkerGroup:
    """A relay in several processes, with the methods of an `Engine`."""

    def __init__(
        self,
        reactor: Any,
        config: EngineConfig,
        secrets: Secrets,
        sockets: list[list[socket.socket]],
        failed: Callable[[FirezoneError], object],
    ) -> None:
        """`sockets` are those of each worker, owned by the group; `failed(error)` is called if it can't start."""
        self._sockets = sockets
        self._failed = failed
        self._serving: Deferred[None] = Deferred()
        self._stopped: Deferred[None] | None = None
        self._drain_time = config.drain_time
        self._workers = [
            WorkerProcess(reactor, number, _begin(config, secrets, number, ours), ours, self)
            for number, ours in enumerate(sockets)
        ]

    @property
    def is_serving(self) -> bool:
        """Whether all workers serve."""
        return all(worker.state is WorkerState.SERVING for worker in self._workers)

    def start(self) -> Deferred[None]:
        """Fires once all workers serve."""
        for worker in self._workers:
            worker.start()
        return self._serving

    def stop(self) -> Deferred[None]:
        """Let each worker serve its clients until they have moved elsewhere, or the drain time is over; then fire.

        May be called more than once.
        """
        if self._stopped is None:
            self._stopped = Deferred()
            for worker in self._workers:
                worker.end(Drain(), self._drain_time + KILL_AFTER)
            self.worker_ended()
        done: Deferred[None] = Deferred()
        self._stopped.addBoth(lambda _: done.callback(None))
        return done

    def stop_draining(self) -> None:
        """Stop draining, or don't start."""
        for worker in self._workers:
            worker.end(StopDraining(), KILL_AFTER)

    # The workers call the methods below.

    def worker_serves(self) -> None:
        if self.is_serving and not self._serving.called:
            self._serving.callback(None)

    def worker_lost(self, number: int, reason: str) -> bool:
        """Whether to replace the worker. Not before all have served: the next would fail the same way."""
        if self._serving.called:
            return True
        self._failed(PlatformError(f"Worker {number} of the relay can't start: {reason}"))
        return False

    def worker_ended(self) -> None:
        is_over = all(worker.state is WorkerState.ENDED for worker in self._workers)
        if is_over and self._stopped is not None and not self._stopped.called:
            close_all(self._sockets)
            self._stopped.callback(None)


class WorkerState(enum.Enum):
    """The state of a worker."""

    STARTING = "starting"
    SERVING = "serving"
    RESTING = "resting"
    """Its process died, and the next is not started yet."""
    ENDING = "ending"
    ENDED = "ended"


class WorkerProcess:
    """A worker: its process, and the replacement when that dies."""

    def __init__(self, reactor: Any, number: int, begin: Begin, sockets: list[socket.socket], group: WorkerGroup):
        self.state = WorkerState.ENDED
        self.number = number
        self._reactor = reactor
        self._group = group
        self._begin = begin
        self._sockets = sockets
        self._pipes: _Pipes | None = None
        self._delay = FIRST_DELAY
        self._served_since = 0.0
        self._timer: BoottimeTimer | None = None
        self._reason = ""  # the reason that it reported

    def start(self) -> None:
        self.state = WorkerState.STARTING
        self._reason = ""
        pipes = {ORDERS: "w", LOG: "r", ERRORS: "r", REPORTS: "r"}
        inherited = {FIRST_SOCKET + index: one.fileno() for index, one in enumerate(self._sockets)}
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self._pipes = _Pipes(self)
        try:
            process = self._reactor.spawnProcess(
                self._pipes, _COMMAND[0], _COMMAND, env=environment, childFDs={**pipes, **inherited}
            )
        except OSError as error:
            self.died(f"can't start: {error.strerror}")
            return
        log.info("relay:worker_started", worker=self.number, pid=process.pid)
        self._pipes.send(self._begin)

    def end(self, order: Order, patience: float) -> None:
        """Order it to end, and kill it after `patience` seconds. May be called again."""
        if self.state is WorkerState.ENDED:
            return
        self._cancel_timer()
        if self.state is WorkerState.RESTING or self._pipes is None:
            self._ended()
            return
        self.state = WorkerState.ENDING
        self._pipes.send(order)
        self._timer = call_later(self._reactor, patience, self._pipes.kill)

    # Its pipes call the methods below.

    def reported(self, line: bytes) -> None:
        try:
            report = decode_report(line)
        except msgspec.MsgspecError as error:
            log.error("relay:worker_report_rejected", worker=self.number, reason=str(error))
            return
        if not isinstance(report, WorkerServing):
            self._reason = report.reason
        elif self.state is WorkerState.STARTING:
            self.state = WorkerState.SERVING
            self._served_since = boottime()
            self._group.worker_serves()

    def died(self, reason: str) -> None:
        """Its process has ended, or never started."""
        self._pipes = None
        self._cancel_timer()
        if self.state is WorkerState.ENDING:
            self._ended()
            return
        if self.state is WorkerState.SERVING and boottime() - self._served_since >= STEADY_AFTER:
            self._delay = FIRST_DELAY
        self.state = WorkerState.RESTING
        reason = self._reason or reason
        log.warning("relay:worker_lost", worker=self.number, reason=reason, next_after=self._delay)
        if not self._group.worker_lost(self.number, reason):
            self._ended()
        elif self.state is WorkerState.RESTING:  # else: `worker_lost` ended it
            self._timer = call_later(self._reactor, self._delay, self.start)
            self._delay = min(MAX_DELAY, 2 * self._delay)

    def _ended(self) -> None:
        if self.state is not WorkerState.ENDED:
            self.state = WorkerState.ENDED
            self._group.worker_ended()

    def _cancel_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()


class _Pipes(ProcessProtocol):
    """The parent's ends of the pipes to one process."""

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__()
        self._worker = worker
        self.transport: Any = None
        self._lines = {descriptor: Lines() for descriptor in (LOG, ERRORS, REPORTS)}

    def send(self, order: Order) -> None:
        if self.transport is not None:
            self.transport.writeToChild(ORDERS, encode(order))

    def kill(self) -> None:
        log.error("relay:worker_killed", worker=self._worker.number, reason="it did not stop in time")
        try:
            self.transport.signalProcess("KILL")
        except ProcessExitedAlready:
            return

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        handle = {LOG: self._logged, ERRORS: self._printed, REPORTS: self._worker.reported}[childFD]
        for line in self._lines[childFD].feed(data):
            handle(line)

    def processEnded(self, reason: Failure) -> None:
        problem: Any = reason.value
        if reason.check(ProcessDone) is not None:
            self._worker.died("exited unexpectedly")
        elif problem.signal is not None:
            self._worker.died(f"killed by signal {problem.signal}")
        else:
            self._worker.died(f"exited with code {problem.exitCode}")

    def _logged(self, line: bytes) -> None:
        """Log a message of the worker's log as ours."""
        try:
            message = json.loads(line)
            message_type, write = message.pop("message_type"), _WRITERS[message.pop("level")]
        except (ValueError, KeyError, TypeError, AttributeError):
            self._printed(line)
            return
        for name in ("timestamp", "task_uuid", "task_level", "worker"):
            message.pop(name, None)
        write(message_type, worker=self._worker.number, **message)

    def _printed(self, line: bytes) -> None:
        log.warning("relay:worker_printed", worker=self._worker.number, text=line.decode(errors="replace"))


_WRITERS = {"debug": log.debug, "info": log.info, "warning": log.warning, "error": log.error}


def _begin(config: EngineConfig, secrets: Secrets, number: int, sockets: list[socket.socket]) -> Begin:
    ours = attrs.evolve(config, relaying=attrs.evolve(config.relaying, worker=number))
    level = min((level for level in log.NAMES if log.enabled(level)), default=log.ERROR)
    return Begin(config=ours, secrets=secrets, sockets=len(sockets), log_level=level)

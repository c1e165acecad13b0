"""The start and the end of a process under twistd: signals, fatal errors, exit codes, service manager.

twistd itself ends with 143 after SIGTERM, swallows a SystemExit and replaces signal handlers that a service installs
while it starts (architecture, section 3): so all of this has one place, here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from traceback import format_exception
from typing import Any, TextIO

from firezone_tunnel.errors import FirezoneError, one_line
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.writer import LogWriter
from firezone_tunnel.shell.reactor.clock import boottime

STDERR_PATIENCE = 1.0  # seconds that the end of a process waits for a pipe to be read


class Process:
    """The end of this process, which is the reactor's end. Only one application runs in a process."""

    def __init__(self, reactor: Any, name: str) -> None:
        """`name` stands before the sentence on stderr that says why it ended."""
        self._reactor = reactor
        self.name = name
        self._code = 0
        self._is_ending = False
        self._hangup: Callable[[], object] | None = None
        self._hurry: Callable[[], object] | None = None

    def install(self, *logs: LogWriter) -> None:
        """Call it before the reactor runs. The logs are closed at the end."""
        _forbid_core_dumps()
        # Its timers run on the wall clock otherwise: an hour's step back would delay whatever is due by an hour.
        self._reactor.seconds = boottime
        atexit.register(self._exit, *logs)
        self._reactor.callWhenRunning(self._handle_signals)

    def on_hangup(self, callback: Callable[[], object]) -> None:
        """SIGHUP calls this, in the reactor's thread. Without it SIGHUP is ignored."""
        self._hangup = callback

    def on_second_signal(self, callback: Callable[[], object]) -> None:
        """SIGINT or SIGTERM while it ends calls this, in the reactor's thread. Without it they are ignored then."""
        self._hurry = callback

    def ready(self) -> None:
        """Tell a service manager that we are (sd_notify(3)); from now on no collection looks at what start-up made."""
        gc.collect()
        gc.freeze()
        _notify(b"READY=1")

    def stop(self) -> None:
        """End in good order with code 0, or with the code of the error that is ending us already."""
        if self._is_ending:
            return
        self._is_ending = True
        _notify(b"STOPPING=1")
        if self._reactor.running:
            self._reactor.stop()
        else:  # still starting: a reactor that doesn't run yet can't be stopped
            self._reactor.callWhenRunning(self._reactor.stop)

    def fail(self, error: BaseException) -> None:
        """End in good order because of an error: one line on stderr, and in the log the traceback of a bug."""
        if self._is_ending:
            return
        fields = {"reason": one_line(error), "error": type(error).__name__}
        if isinstance(error, FirezoneError):
            self._code = error.exit_code
        else:
            self._code = 1
            fields["traceback"] = "".join(format_exception(error))
        log.error("process:failed", **fields)
        _write_stderr(f"{self.name}: {one_line(error)}")
        self.stop()

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._reactor.callFromThread(self._asked_to_end))
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._hung_up))

    def _asked_to_end(self) -> None:
        if not self._is_ending:
            self.stop()
        elif self._hurry is not None:
            self._hurry()

    def _hung_up(self) -> None:
        if self._hangup is not None:
            self._hangup()

    def _exit(self, *logs: LogWriter) -> None:
        """The last thing in a process: twistd has run all shutdown triggers and removed its pidfile."""
        are_done = False not in [one.close() for one in logs]  # each of them
        if are_done and not self._code:
            return
        # An exit handler can't change the code in any other way. If our output is not read, a thread of ours holds the
        # lock of stdout, and the interpreter would wait for it.
        if are_done:
            with contextlib.suppress(OSError, ValueError):
                stdout().flush()
        os._exit(self._code)


def stdout() -> TextIO:
    """The real one: while its reactor runs, twistd has the names of stdout and stderr lead to its log."""
    return sys.__stdout__ or sys.stdout


def _write_stderr(line: str) -> None:
    """Write a line to the real stderr, unless that is a pipe that is not read."""
    stream = sys.__stderr__
    with contextlib.suppress(OSError, ValueError):
        if stream is not None and select.select([], [stream], [], STDERR_PATIENCE)[1]:
            print(line, file=stream, flush=True)


def _notify(state: bytes) -> None:
    """Send a state to the service manager, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = f"\0{address[1:]}"
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as manager:
        manager.sendto(state, address)


def _forbid_core_dumps() -> None:
    """Keys and tokens are in memory."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

"""The start and the end of a process under twistd: signals, fatal errors, exit codes, service manager.

twistd itself ends with 143 after SIGTERM, swallows a SystemExit and replaces signal handlers that a service installs
while it starts (architecture, section 3): so all of this has one place, here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from traceback import format_exception
from typing import Any, TextIO

from firezone_tunnel.errors import FirezoneError, one_line
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.writer import LogWriter
from firezone_tunnel.shell.reactor.clock import boottime

END_TIMEOUT = 3.5
"""Seconds for an end in good order. With what follows a forced end takes five: Docker kills after ten."""
LAST_STEP_TIMEOUT = 0.7
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
        self._last_resort: Callable[[], object] = lambda: None
        self._logs: tuple[LogWriter, ...] = ()
        self._end_by = float("inf")
        # True when `_end_by` has changed. A SimpleQueue, because a signal handler may call its `put` at any time.
        self._news: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def install(self, *logs: LogWriter) -> None:
        """Call it before the reactor runs. The logs are closed at the end."""
        _forbid_core_dumps()
        # Its timers run on the wall clock otherwise: an hour's step back would delay whatever is due by an hour.
        self._reactor.seconds = boottime
        self._logs = logs
        atexit.register(self._exit)
        self._reactor.callWhenRunning(self._handle_signals)

    def on_hangup(self, callback: Callable[[], object]) -> None:
        """SIGHUP calls this, in the reactor's thread. Without it SIGHUP is ignored."""
        self._hangup = callback

    def on_second_signal(self, callback: Callable[[], object]) -> None:
        """SIGINT or SIGTERM while it ends calls this, in the reactor's thread. Without it they are ignored then."""
        self._hurry = callback

    def on_forced_end(self, callback: Callable[[], object]) -> None:
        """A forced end calls this, in a thread of its own: something that the end in good order waits for hangs."""
        self._last_resort = callback

    def prolong_end(self, seconds: float) -> None:
        """The end in good order, which has begun, may take that long in addition, unless another signal comes."""
        self._end_by = boottime() + END_TIMEOUT + seconds
        self._news.put(True)

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
        self._limit_end()
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
        threading.Thread(target=self._watch_end, name="end", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._hung_up))

    def _signalled(self, *_: object) -> None:
        self._limit_end()  # here already: what the reactor calls may hang
        self._reactor.callFromThread(self._asked_to_end)

    def _asked_to_end(self) -> None:
        if not self._is_ending:
            self.stop()
        elif self._hurry is not None:
            self._hurry()

    def _limit_end(self) -> None:
        self._end_by = min(self._end_by, boottime() + END_TIMEOUT)
        self._news.put(True)

    def _watch_end(self) -> None:
        """In a thread: force the end when it takes too long.

        A resolver that never answers, a hung netlink call or a locked database keep a thread that Twisted and the
        interpreter join, without a limit.
        """
        is_running = self._news.get()
        while is_running and (remaining := self._end_by - boottime()) > 0:
            with contextlib.suppress(queue.Empty):
                is_running = self._news.get(timeout=remaining)
        if not is_running:
            return
        log.warning("process:end_forced", threads=_positions())
        _call(self._last_resort)
        _call(lambda: [one.close() for one in self._logs])
        os._exit(self._code)

    def _hung_up(self) -> None:
        if self._hangup is not None:
            self._hangup()

    def _exit(self) -> None:
        """The last thing in a process: twistd has run all shutdown triggers and removed its pidfile."""
        are_done = False not in [one.close() for one in self._logs]  # each of them
        self._news.put(False)
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


def _call(step: Callable[[], object]) -> None:
    """Call a step of a forced end, which may hang or fail like what came before."""

    def call() -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  # the process ends whatever it is
            log.error("process:last_step_failed", reason=one_line(error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LAST_STEP_TIMEOUT)


def _positions() -> list[str]:
    """Each thread and the function that it is in: what the end waits for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    return [
        f"{names.get(ident, ident)}: {frame.f_code.co_name} "
        f"({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        for ident, frame in sys._current_frames().items()
        if ident != own and names.get(ident) != "logs"
    ]


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

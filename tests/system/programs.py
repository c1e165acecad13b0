"""A program running on a host: its readiness, log messages, resource usage and exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.polling import PATIENCE, until

_T = TypeVar("_T")


class NotReady(Exception):
    """A program ended or timed out before an expected event. The message ends with its last lines of output."""


class Program:
    """A running program. Its output goes to the file `log`; `events` returns eliot's JSON lines.

    The program reports its readiness: it sends READY=1 to NOTIFY_SOCKET, as under systemd.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        notify_socket: Path,
        working_directory: Path,
    ) -> None:
        self.name = name
        self.log = log
        self._notify_path = notify_socket
        notify_socket.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(notify_socket))
        with log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                # If the lab is killed, the kernel kills its programs.
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=working_directory,
                env={**environment, "NOTIFY_SOCKET": str(notify_socket)},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        """Wait until the program sends READY=1.

        Raises: NotReady.
        """
        self.wait_until(self._said_ready, "being ready", timeout)

    def wait_for(self, message_type: str, timeout: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """Wait until the program has logged a message of this type with these fields. Returns the message.

        Raises: NotReady.
        """
        event = f"logging {message_type} {fields or ''}"
        return self.wait_until(lambda: next(self.events(message_type, **fields), None), event, timeout)

    def wait_exit(self, timeout: float = PATIENCE) -> int:
        """Wait until the program ends by itself. Returns its exit code.

        Raises: NotReady.
        """
        self.wait_until(lambda: not self.is_running, "ending", timeout)
        self._close()
        return self.process.wait()

    def wait_until(self, ask: Callable[[], _T | None], what: str, timeout: float = PATIENCE) -> _T:
        """Wait until `ask` returns a true value before the program ends. Returns the value.

        Raises: NotReady.
        """

        def answer() -> _T | None:
            was_running = self.is_running
            found = ask()
            if not found and not was_running:
                raise NotReady(f"{self.name} ended with {self.process.returncode} before {what}:\n{self._tail()}")
            return found

        try:
            return until(answer, what, timeout)
        except TimeoutError as error:
            raise NotReady(f"{self.name}: {error}:\n{self._tail()}") from None

    def events(self, message_type: str | None = None, **fields: Any) -> Iterator[dict[str, Any]]:
        """The program's JSON log messages, oldest first."""
        for line in self.output().splitlines():
            event = _parse_event(line)
            if event is None or (message_type is not None and event.get("message_type") != message_type):
                continue
            if all(event.get(name) == value for name, value in fields.items()):
                yield event

    def output(self) -> str:
        """The program's whole output."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM, without waiting for the end."""
        if self.is_running:
            self.process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.wait()
        self._close()

    def stop(self, timeout: float = PATIENCE) -> int:
        """Send SIGTERM, and after the timeout SIGKILL. Returns the exit code."""
        self.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._close()
        return self.process.wait()

    def cpu_seconds(self) -> float:
        """The CPU time of all its threads, in user space and in the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, proc(5)

    def resident_bytes(self) -> int:
        """The resident set size."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _said_ready(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                if b"READY=1" in self._notify.recv(4096, socket.MSG_DONTWAIT).split(b"\n"):
                    return True
        return False

    def _tail(self) -> str:
        return "\n".join(self.output().splitlines()[-15:])

    def _close(self) -> None:
        self._notify.close()
        self._notify_path.unlink(missing_ok=True)


def _parse_event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None

"""Continuous traffic through the tunnel, to detect interruptions and measure their length."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from types import TracebackType
from typing import NamedTuple

from tests.polling import until
from tests.system.hosts import Host
from tests.system.namespace import inside
from tests.system.programs import Program

PING_INTERVAL = 0.05  # 20 Hz: docs/decisions.md, 3
_STEADY = 10  # consecutive replies that count as a recovery
_ANSWER = re.compile(r"^\[(\d+\.\d+)\] \d+ bytes from .* icmp_seq=(\d+) .*time=([\d.]+) ms", re.MULTILINE)


class Answer(NamedTuple):
    """An answered ping, with Unix times in seconds."""

    number: int
    sent_at: float
    arrived_at: float


class Ping:
    """Twenty pings per second from a host to an address, until the end of the context."""

    def __init__(self, host: Host, target: str) -> None:
        self._host = host
        self._program: Program = host.spawn("ping", "ping", "-D", "-n", "-i", str(PING_INTERVAL), target)

    def __enter__(self) -> Ping:
        self.wait_steady(time.time())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._program.stop()
        self._host.programs.remove(self._program)

    def answers(self) -> list[Answer]:
        """All answered pings so far, in the order they were sent."""
        found = [
            (int(number), float(at), float(ms) / 1000) for at, number, ms in _ANSWER.findall(self._program.output())
        ]
        return sorted(Answer(number, at - round_trip, at) for number, at, round_trip in found)

    def wait_steady(self, moment: float, timeout: float = 30.0) -> float:
        """Wait until pings sent after `moment`, a Unix time, are answered steadily.

        Returns the seconds from `moment` to the first of these replies.

        Raises: NotReady.
        """

        def first_of_many() -> Answer | None:
            later = [answer for answer in self.answers() if answer.sent_at >= moment]
            for first, last in zip(later, later[_STEADY - 1 :], strict=False):
                if last.number - first.number < _STEADY + 1:  # allow for one lost ping
                    return first
            return None

        return self._program.wait_until(first_of_many, "getting steady answers", timeout).arrived_at - moment


class Download:
    """An endless download over one TCP connection, until the end of the context. `received` counts bytes."""

    def __init__(self, host: Host, server: str, port: int) -> None:
        self.received = 0
        self.error: OSError | None = None
        with inside(host):
            self._socket = socket.create_connection((server, port), timeout=15)
        self._socket.settimeout(60)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, args=(server,), daemon=True)

    def __enter__(self) -> Download:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closing = True
        with contextlib.suppress(OSError):  # the connection may already be closed
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def wait_for_more(self, count: int = 1_000_000, timeout: float = 20.0) -> None:
        """Wait until so many more bytes have arrived on the same connection.

        Raises: AssertionError, if the connection broke; TimeoutError.
        """
        wanted = self.received + count

        def have_arrived() -> bool:
            is_enough = self.received >= wanted
            assert is_enough or self.error is None, f"the TCP connection broke: {self.error}"
            return is_enough

        until(have_arrived, f"the arrival of {count} more bytes", timeout)

    def _run(self, server: str) -> None:
        try:
            self._socket.sendall(f"GET /bytes?num={10**12} HTTP/1.1\r\nHost: {server}\r\n\r\n".encode())
            while data := self._socket.recv(65536):
                self.received += len(data)
                time.sleep(0.01)  # limit the rate to 6.5 MB/s, to leave CPU time to other processes
            self.error = None if self._is_closing else ConnectionResetError("the server closed the connection")
        except OSError as error:
            self.error = None if self._is_closing else error

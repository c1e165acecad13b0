"""Limit each network namespace to one client or gateway: they share its rules, its routing table and its interface."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path

from firezone_tunnel.errors import InUseError, PlatformError

_LOCK = "firezone_tunnel/host"
_SOCKETS = Path("/proc/thread-self/net/unix")


class Instance:
    """Reserves this network namespace for one role until `close` or the end of the process.

    The lock is an abstract Unix socket (unix(7)), which the kernel releases even if the process is killed. A second
    one names the owner.
    """

    def __init__(self, role: str) -> None:
        """
        Raises: InUseError, if another process holds the lock; PlatformError, if the socket can't be bound.
        """
        self._sockets: list[socket.socket] = []
        try:
            self._bind(_LOCK)
            self._bind(f"{_LOCK}/{role}/{os.getpid()}")
        except OSError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise InUseError(
                    f"{owner() or 'A client or gateway'} is already running on this host: stop it first, since a host "
                    "has room for one client or gateway"
                ) from error
            raise PlatformError(
                f"Can't check whether a client or gateway is running: binding a Unix socket failed ({error.strerror})"
            ) from error

    def close(self) -> None:
        """Release the namespace. May be called more than once."""
        for one in reversed(self._sockets):
            one.close()
        self._sockets.clear()

    def _bind(self, name: str) -> None:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sockets.append(bound)
        bound.bind(f"\0{name}")


def owner() -> str | None:
    """The client or gateway that has reserved this network namespace, such as "A gateway (process 123)"."""
    try:
        sockets = _SOCKETS.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(rf"@{_LOCK}/(\w+)/(\d+)$", sockets, re.MULTILINE)
    return None if found is None else f"A {found[1]} (process {found[2]})"

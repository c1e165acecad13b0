"""Limit each network namespace to one client and one gateway: a second would take over interface and routes."""

from __future__ import annotations

import errno
import socket

from firezone_tunnel.errors import InUseError, PlatformError


class Instance:
    """Reserves a name in this network namespace until `close` or the end of the process.

    The name is bound as an abstract Unix socket (unix(7)), which the kernel releases even if the process is killed.
    """

    def __init__(self, name: str) -> None:
        """
        Raises: InUseError, if another process holds the name; PlatformError, if the socket can't be bound.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(f"\0firezone_tunnel/{name}")
        except OSError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise InUseError(f"Another {name} is already running on this host: stop it first") from error
            raise PlatformError(
                f"Can't check whether another {name} is running: binding a Unix socket failed ({error.strerror})"
            ) from error

    def close(self) -> None:
        """Release the name. May be called more than once."""
        self._socket.close()

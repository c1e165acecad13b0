"""One client and one gateway per network namespace: they would take each other's interface and routes away."""

from __future__ import annotations

import errno
import socket

from firezone_tunnel.errors import InUseError, PlatformError


class Instance:
    """Holds a name in this network namespace for as long as the process lives, or until `close`.

    The name is that of an abstract Unix socket (unix(7)): it leaves no file, and a killed process leaves nothing.
    """

    def __init__(self, name: str) -> None:
        """
        Raises: InUseError, if another process holds it.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(f"\0firezone_tunnel/{name}")
        except OSError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise InUseError(
                    f"Another {name} is running on this host, so its tunnel is in use: stop it first"
                ) from error
            raise PlatformError(f"Can't make sure that no other {name} is running: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the name. May be called more than once."""
        self._socket.close()

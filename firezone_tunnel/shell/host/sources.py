"""The addresses that the kernel sends our own datagrams from."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

# a.root-servers.net. Nothing is sent to it: it stands for the internet, and no host has a route of its own to it.
_FAR_AWAY = ((socket.AF_INET, "198.41.0.4"), (socket.AF_INET6, "2001:503:ba3e::2:30"))
_PORT = 9


def internet_sources(mark: int) -> Iterator[str]:
    """The source of each family that leads to the internet, for a socket with this firewall mark.

    Connecting a UDP socket makes the kernel choose, with all of its rules and tables. A family that it has no route
    for is left out, and so are both where this process may not mark its sockets.
    """
    for family, host in _FAR_AWAY:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _MARK.pack(mark))
            probe.connect((host, _PORT))
            yield probe.getsockname()[0]


_MARK = struct.Struct("=I")  # exceeds a signed int

"""Requests to rtnetlink, of this network namespace. All calls block.

pyroute2 runs its own asyncio loop, so it can't be used in the reactor's thread. The first call imports it.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, NamedTuple

from firezone_tunnel.errors import PlatformError

FAMILIES = (socket.AF_INET, socket.AF_INET6)

EXISTS = frozenset({errno.EEXIST})
GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})
NO_IPV6 = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EINVAL})

_NOTHING_TO_DUMP = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT})  # ENOENT: the table is empty
_DUMP_ATTEMPTS = 5  # the kernel interrupts a dump when the configuration changes meanwhile


class Families(NamedTuple):
    """A flag for each IP version."""

    ipv4: bool
    ipv6: bool


class RtNetlink:
    """One rtnetlink socket, opened by the first call. Must be used from one thread only."""

    def __init__(self) -> None:
        self._route: Any = None
        self.port_id: int | None = None
        """The socket's port (netlink(7)), by which the kernel names it in notifications of its changes."""

    def close(self) -> None:
        """The next call opens a new socket."""
        if self._route is not None:
            self._route.close()
            self._route = None

    def request(
        self, kind: str, command: str, *, tolerated: frozenset[int] = frozenset(), **arguments: Any
    ) -> OSError | None:
        """Request a change of a "link", "addr", "route" or "rule". Returns the error, unless it is tolerated."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            getattr(self._open(), kind)(command, **arguments)
        except NetlinkError as error:
            return None if error.code in tolerated else OSError(error.code, os.strerror(error.code))
        return None

    def dump(self, kind: str, **arguments: Any) -> list[Any]:
        """All entries of a kind, or an empty list if the kernel doesn't have the family or table.

        Raises: PlatformError.
        """
        return self._read(kind, "dump", _NOTHING_TO_DUMP, **arguments)

    def get(self, kind: str, *, tolerated: frozenset[int], **arguments: Any) -> Any | None:
        """One entry, or None if the kernel's error is tolerated.

        Raises: PlatformError.
        """
        found = self._read(kind, "get", tolerated, **arguments)
        return found[0] if found else None

    def _read(self, kind: str, command: str, tolerated: frozenset[int], **arguments: Any) -> list[Any]:
        from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

        function = getattr(self._open(), kind)
        for _ in range(_DUMP_ATTEMPTS):
            try:
                messages = list(function(command, **arguments))
            except NetlinkDumpInterrupted:
                continue
            except NetlinkError as error:
                if error.code in tolerated:
                    return []
                reason = os.strerror(error.code)
                raise PlatformError(f"Can't read the host's network configuration: {reason}") from error
            if messages:
                self.port_id = messages[0]["header"]["pid"]
            return messages
        raise PlatformError(
            "Can't read the host's network configuration: it changed during each of "
            f"{_DUMP_ATTEMPTS} attempts; try again"
        )

    def _open(self) -> Any:
        if self._route is None:
            from pyroute2.iproute.linux import IPRoute

            self._route = IPRoute(strict_check=True)  # the kernel filters dumps by table and interface
        return self._route

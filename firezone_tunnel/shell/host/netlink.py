"""Read, change and watch the host's network configuration without blocking the reactor's thread."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.shell.host.addresses import HostSnapshot
from firezone_tunnel.shell.host.kernel import TUNNEL_MTU, TUNNEL_QUEUE, USER_TABLE, Families, Kernel, Table
from firezone_tunnel.shell.host.worker_thread import WorkerThread


class Netlink:
    """The methods of `host.kernel.Kernel` as Deferreds. Requests run in order in the worker's thread.

    It works on the network namespace that the worker's thread was in at the first call.
    """

    def __init__(self, worker: WorkerThread) -> None:
        self._worker = worker
        self._kernel = Kernel()

    def configure_link(
        self,
        name: str,
        *,
        ipv4: str | None,
        ipv6: str | None,
        mtu: int = TUNNEL_MTU,
        txqueuelen: int = TUNNEL_QUEUE,
    ) -> Deferred[Families]:
        """Set exactly these addresses on the interface and bring it up. Fires with the families that work.

        Fails with: PlatformError, if the interface does not exist or neither family works.
        """
        return self._worker.call(
            self._kernel.configure_link, name, ipv4=ipv4, ipv6=ipv6, mtu=mtu, txqueuelen=txqueuelen
        )

    def set_rules(self, families: Families, table: Table = USER_TABLE) -> Deferred[None]:
        """Look up all packets without our mark in `table` before the main table."""
        return self._worker.call(self._kernel.set_rules, families, table)

    def set_routes(self, name: str, routes: Iterable[str], table: Table = USER_TABLE) -> Deferred[None]:
        """Make these networks ("10.0.0.0/8", of both families) the only ones routed through the interface.

        Fails with: PlatformError, if the interface does not exist.
        """
        return self._worker.call(self._kernel.set_routes, name, tuple(routes), table)

    def remove_everything(self) -> Deferred[int]:
        """Delete our rules and routes, including any left by a process that was killed. Fires with their number.

        Fails with: PlatformError.
        """
        return self._worker.call(self._kernel.remove_everything)

    def snapshot(self) -> Deferred[HostSnapshot]:
        """The current network configuration, for `host.addresses`.

        Fails with: PlatformError.
        """
        return self._worker.call(self._kernel.snapshot)

    def close(self) -> Deferred[None]:
        """Close the socket. Fires when all earlier requests are done."""
        return self._worker.call(self._kernel.close)


@implementer(IReadDescriptor)
class NetworkWatcher:
    """Calls `changed()` in the reactor's thread when links, addresses or routes may have changed.

    It doesn't report the change itself. Wait until the notifications stop, then compare snapshots.
    """

    def __init__(self, reactor: IReactorFDSet, changed: Callable[[], object]) -> None:
        """Watch this thread's network namespace.

        Raises: OSError.
        """
        self._reactor = reactor
        self._changed = changed
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket: socket.socket | None = socket.socket(socket.AF_NETLINK, kind, _NETLINK_ROUTE)
        self._socket.bind((0, _GROUPS))
        reactor.addReader(self)

    def close(self) -> None:
        """May be called more than once."""
        if self._socket is None:
            return
        self._reactor.removeReader(self)
        self._socket.close()
        self._socket = None

    def doRead(self) -> None:
        if self._socket is None:
            return
        try:
            for _ in range(_MAX_NOTIFICATIONS):
                self._socket.recv(_NOTIFICATION_SIZE)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # ENOBUFS: notifications were lost, so there were changes
                raise
        self._changed()

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def logPrefix(self) -> str:
        return "NetworkWatcher"


_NETLINK_ROUTE = 0  # <linux/netlink.h>
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # link, IPv4 address and route, IPv6 address and route: rtnetlink.h
_MAX_NOTIFICATIONS = 64  # per reactor turn
_NOTIFICATION_SIZE = 1  # the content is not used, so the kernel may truncate it

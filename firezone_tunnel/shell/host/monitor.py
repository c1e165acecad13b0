"""Monitor the host's addresses and uplinks for changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.shell.host.addresses import HostSnapshot, Uplinks, has_moved, host_candidates, uplinks
from firezone_tunnel.shell.host.rtnetlink import RtNetlink
from firezone_tunnel.shell.host.snapshot import read_snapshot
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime

DEBOUNCE = 0.2  # docs/decisions.md, 3


class NetworkMonitor:
    """Reports the host's candidate addresses, and when the host has moved to another network."""

    def __init__(
        self,
        reactor: Any,
        worker: WorkerThread,
        netlink: RtNetlink,
        *,
        own_link: str,
        on_hosts: Callable[[list[str]], object],
        on_moved: Callable[[Uplinks], object],
    ) -> None:
        """`on_hosts` is called when the addresses change, `on_moved` when an uplink changes, in this order."""
        self._worker = worker
        self._netlink = netlink
        self._own_link = own_link
        self._on_hosts = on_hosts
        self._on_moved = on_moved
        self.hosts: list[str] = []
        self._uplinks: Uplinks | None = None
        self._timer = BoottimeTimer(reactor, self._look)
        self._is_closed = False

    @property
    def interfaces(self) -> list[str]:
        """The interfaces that lead to the internet, without duplicates."""
        found = [uplink.interface for uplink in self._uplinks or () if uplink is not None]
        return list(dict.fromkeys(found))

    async def start(self) -> None:
        """Read the configuration. `on_hosts` is called before this returns.

        Raises: PlatformError.
        """
        self._compare(await self._worker.call(read_snapshot, self._netlink))

    def notice(self) -> None:
        """Links, addresses or routes may have changed: wait for the changes to stop, then look."""
        if self._timer.deadline is None:
            self._timer.set(boottime() + DEBOUNCE)

    def close(self) -> None:
        """May be called more than once."""
        self._is_closed = True
        self._timer.close()

    def _look(self) -> None:
        looking: Deferred[HostSnapshot] = self._worker.call(read_snapshot, self._netlink)
        looking.addCallbacks(self._compare, self._failed).addErrback(self._crashed)

    def _compare(self, snapshot: HostSnapshot) -> None:
        if self._is_closed:
            return
        before, self._uplinks = self._uplinks, uplinks(snapshot, own_link=self._own_link)
        hosts = host_candidates(snapshot, own_link=self._own_link)
        if hosts != self.hosts:
            self.hosts = hosts
            log.debug("network:addresses_changed", hosts=hosts)
            self._on_hosts(hosts)
        if before is not None and has_moved(before, self._uplinks):
            log.info("network:moved", interfaces=self.interfaces)
            self._on_moved(self._uplinks)

    def _failed(self, failure: Failure) -> None:
        """Log it; the next change triggers another snapshot."""
        log.warning("network:look_failed", reason=failure.getErrorMessage())

    def _crashed(self, failure: Failure) -> None:
        """Log an exception raised while handling a snapshot, which is a bug."""
        log.error("network:crashed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())

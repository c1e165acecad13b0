"""The host's addresses and its way to the internet, and word of their changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.shell.host.addresses import HostSnapshot, Uplinks, host_candidates, uplinks
from firezone_tunnel.shell.host.netlink import Netlink, NetworkWatcher
from firezone_tunnel.shell.logs import events as log

DEBOUNCE = 0.2  # docs/decisions.md, 3


class NetworkMonitor:
    """Tells which addresses may be candidates, and when the host has moved to another network."""

    def __init__(
        self,
        reactor: Any,
        netlink: Netlink,
        *,
        own_link: str,
        on_hosts: Callable[[list[str]], object],
        on_moved: Callable[[Uplinks], object],
    ) -> None:
        """`on_hosts` is called whenever the addresses have changed; `on_moved` after it where the uplink has, too."""
        self._reactor = reactor
        self._netlink = netlink
        self._own_link = own_link
        self._on_hosts = on_hosts
        self._on_moved = on_moved
        self.hosts: list[str] = []
        self._uplinks: Uplinks | None = None
        self._watcher: NetworkWatcher | None = None
        self._calm: Any = None
        self._is_closed = False

    @property
    def interfaces(self) -> list[str]:
        """Those that lead to the internet, each once."""
        found = [uplink.interface for uplink in self._uplinks or () if uplink is not None]
        return list(dict.fromkeys(found))

    async def start(self) -> None:
        """Look once, then watch. `on_hosts` has been called when this is done.

        Raises: PlatformError; OSError, where the kernel lets nobody watch.
        """
        self._watcher = NetworkWatcher(self._reactor, self._changed)
        self._compare(await self._netlink.snapshot())

    def close(self) -> None:
        """May be called more than once."""
        self._is_closed = True
        if self._watcher is not None:
            self._watcher.close()
        if self._calm is not None and self._calm.active():
            self._calm.cancel()

    def _changed(self) -> None:
        if self._calm is None or not self._calm.active():
            self._calm = self._reactor.callLater(DEBOUNCE, self._look)

    def _look(self) -> None:
        looking: Deferred[None] = self._netlink.snapshot().addCallbacks(self._compare, self._failed)
        looking.addErrback(self._crashed)

    def _compare(self, snapshot: HostSnapshot) -> None:
        if self._is_closed:
            return
        before, self._uplinks = self._uplinks, uplinks(snapshot, own_link=self._own_link)
        hosts = host_candidates(snapshot, own_link=self._own_link)
        if hosts != self.hosts:
            self.hosts = hosts
            log.debug("network:addresses_changed", hosts=hosts)
            self._on_hosts(hosts)
        if before is not None and before != self._uplinks and any(self._uplinks):
            log.info("network:moved", interfaces=self.interfaces)
            self._on_moved(self._uplinks)

    def _failed(self, failure: Failure) -> None:
        """The next change is looked at again."""
        log.warning("network:look_failed", reason=failure.getErrorMessage())

    def _crashed(self, failure: Failure) -> None:
        """Over what was seen, which is a mistake of ours."""
        log.error("network:crashed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())

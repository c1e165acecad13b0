"""The host's network as one object: observed, kept as a role wants it, and put back at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.host.link import TunnelLink
from firezone_tunnel.shell.host.monitor import NetworkMonitor
from firezone_tunnel.shell.host.parts import EVERYTHING, Aspect, HostState, Part
from firezone_tunnel.shell.host.reconciler import Reconciler
from firezone_tunnel.shell.host.route_socket import RouteSocket
from firezone_tunnel.shell.host.routing import TunnelRoutes, TunnelRules
from firezone_tunnel.shell.host.rtnetlink import Families, RtNetlink
from firezone_tunnel.shell.host.watcher import NetworkWatcher
from firezone_tunnel.shell.host.worker_thread import WorkerThread


class HostNetwork:
    """The monitor of uplinks and the reconciler, with the thread, the sockets and the watcher that they share."""

    def __init__(
        self,
        reactor: Any,
        *,
        interface: str,
        parts: Sequence[Part],
        on_hosts: Callable[[list[str]], object],
        on_moved: Callable[[], object],
        on_settled: Callable[[HostState], object],
    ) -> None:
        """`parts` are kept right in addition to the interface, its rules and its routes.

        `on_hosts` gets the addresses of this host, `on_moved` is called when the host is in another network, and
        `on_settled` after each look after which the wanted state is there, as far as this host can have it.
        """
        self._reactor = reactor
        self._interface = interface
        self._on_settled = on_settled
        self._worker = WorkerThread(reactor)
        self._netlink, self._routes = RtNetlink(), RouteSocket()
        self._link = TunnelLink(self._netlink, interface)
        self._monitor = NetworkMonitor(
            reactor,
            self._worker,
            self._netlink,
            own_link=interface,
            on_hosts=on_hosts,
            on_moved=lambda _: self._moved(on_moved),
        )
        self._reconciler = Reconciler(
            reactor,
            self._worker,
            (
                self._link,
                TunnelRules(self._netlink, self._link),
                TunnelRoutes(self._routes, self._link),
                *parts,
            ),
            on_settled=self._settled,
            on_failed=self._failed,
        )
        self._wanted = HostState()
        self._ready: Deferred[None] = Deferred()
        self._watcher: NetworkWatcher | None = None

    @property
    def hosts(self) -> list[str]:
        """The addresses of this host, the preferred one of each family first."""
        return self._monitor.hosts

    @property
    def families(self) -> Families:
        """The families that work on the interface."""
        return self._link.families

    def problems(self) -> list[str]:
        """The differences from the wanted state that remain, with reasons."""
        if self._reconciler.problems or self._reconciler.is_applied:
            return list(self._reconciler.problems)
        return ["the host's network is being set up"]

    async def start(self) -> None:
        """Watch the network of this thread's namespace, and bring the first state about. The interface exists.

        Raises: PlatformError; OSError, if the kernel doesn't allow the subscription.
        """
        self._watcher = NetworkWatcher(
            self._reactor, self._noticed, own_link=self._interface, own_ports=self._own_ports
        )
        await self._monitor.start()
        self.want(uplinks=tuple(self._monitor.interfaces))
        await self._ready

    def want(self, **changes: Any) -> None:
        """Change the wanted state, by the fields of `HostState`, and keep the host so."""
        self._wanted = attrs.evolve(self._wanted, **changes)
        self._reconciler.want(self._wanted)

    def suspect(self) -> None:
        """Anything may have changed unnoticed."""
        self._noticed(EVERYTHING, None)

    def close(self) -> None:
        """Watch and keep nothing any more. May be called more than once."""
        self._reconciler.close()
        if self._watcher is not None:
            self._watcher.close()
        self._monitor.close()

    async def restore(self) -> None:
        """Leave the host as it was before. Failures are logged."""
        await self._reconciler.stop()

    async def stop(self) -> None:
        """Release the sockets and the thread."""
        await self._worker.call(self._netlink.close)
        await self._worker.call(self._routes.close)
        await self._worker.stop()

    def free(self) -> None:
        """Remove rules and routes at once, although the worker's thread hangs. The rest is for the next start.

        Blocks. Only for the end of the process.

        Raises: PlatformError.
        """
        netlink, routes = RtNetlink(), RouteSocket()
        link = TunnelLink(netlink, self._interface)
        try:
            TunnelRules(netlink, link).remove()
            TunnelRoutes(routes, link).remove()
        finally:
            netlink.close()
            routes.close()

    def _moved(self, on_moved: Callable[[], object]) -> None:
        on_moved()
        self.want(uplinks=tuple(self._monitor.interfaces))

    def _noticed(self, aspects: Aspect, program: str | None) -> None:
        if Aspect.UPLINKS in aspects:
            self._monitor.notice()
        self._reconciler.notice(aspects, program)

    def _own_ports(self) -> tuple[int | None, ...]:
        return self._netlink.port_id, self._routes.port_id

    def _settled(self, state: HostState) -> None:
        if not self._ready.called:
            self._ready.callback(None)
        self._on_settled(state)

    def _failed(self, error: FirezoneError) -> None:
        self._ready.errback(error)

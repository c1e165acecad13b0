"""The client as a service: its core, its host, and the events for a front end."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from firezone_tunnel.apps.client.events import (
    AllGatewaysOffline,
    Disconnected,
    Event,
    EventBuffer,
    GatewayVersionMismatch,
    ResourcesUpdated,
    TunInterfaceUpdated,
)
from firezone_tunnel.core.messages import client as messages
from firezone_tunnel.core.tunnel.base import ToPortal
from firezone_tunnel.core.tunnel.client import (
    ClientTunnel,
    FlowIgnored,
    FlowRefused,
    ResourcesChanged,
    TunConfig,
    TunConfigChanged,
)
from firezone_tunnel.core.wireguard.seal import seal_pool
from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.host.kernel import Families
from firezone_tunnel.shell.host.rpfilter import ReplyMarks
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.clock import boottime
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig, TunnelEndpoint

GATEWAYS_PATIENCE = 15.0
"""Seconds after which a gateway gives up a peer that doesn't answer its checks (docs/protocol/data-plane.md, 0.3)."""

_REFUSALS: dict[str, Callable[[str], Event]] = {
    "offline": AllGatewaysOffline,
    "version_mismatch": GatewayVersionMismatch,
}


class ClientService(TunnelEndpoint):
    """One client at work. `events` end when it has stopped."""

    name = "client"

    def __init__(self, reactor: Any, config: EndpointConfig) -> None:
        self._client = ClientTunnel(entropy=os.urandom, now=boottime(), pool=seal_pool())
        super().__init__(reactor, config, self._client, role=messages.TOPIC, peer_field="gid", parse=messages.parse)
        self.events = EventBuffer()
        self._reply_marks = ReplyMarks(self.worker, state_directory=config.state_directory)
        self._wanted: TunConfig | None = None
        self._applied: TunConfig | None = None
        self._families = Families(ipv4=False, ipv6=False)
        self._reported: dict[Event, None] = {}

    def reset(self, reason: str, *, paused: float = 0.0) -> None:
        """Start again with a new key and new sockets, after the network has changed or on request.

        `paused`: for so many seconds this process didn't run.
        """
        log.info("client:reset", reason=reason)
        self._client.reset(boottime(), paused=paused)
        self.rebind()

    async def set_up_host(self) -> None:
        """Let replies to our own sockets arrive whatever the tunnel's routes are (docs/decisions.md, 13)."""
        await self._reply_marks.ensure(self.monitor.interfaces)

    async def restore_host(self) -> None:
        await self._reply_marks.remove()

    def moved(self) -> None:
        self.reset("the network has changed")
        self.run(self.set_up_host)

    def resumed(self, paused: float) -> None:
        """After a pause that no gateway waits for, start again rather than find out for each that it has closed."""
        if paused < GATEWAYS_PATIENCE:
            super().resumed(paused)
            return
        self.reset(f"paused for {paused:.0f} s", paused=paused)

    def handle_event(self, event: Any) -> None:
        match event:
            case ToPortal(message):
                self.say(message)
            case TunConfigChanged(config):
                self._wanted = config
                self.run(self._apply)
            case ResourcesChanged(resources):
                self.events.put(ResourcesUpdated(resources))
            case FlowRefused(rid, reason):
                log.debug("tunnel:flow_refused", rid=rid, reason=reason)
                if reason in _REFUSALS:
                    self._put_once(_REFUSALS[reason](rid))
            case FlowIgnored(rid, gid, reason):
                log.warning("tunnel:flow_ignored", rid=rid, gid=gid, reason=reason)

    def ended(self, error: FirezoneError | None) -> None:
        if error is not None:
            self.events.put(Disconnected(error))
        self.events.end()

    def _put_once(self, event: Event) -> None:
        if event not in self._reported:
            self._reported[event] = None
            self.events.put(event)

    async def _apply(self) -> None:
        """Set up the interface for the newest configuration.

        Raises: PlatformError.
        """
        config, self._wanted = self._wanted, None
        if config is None:
            return
        before, self._applied = self._applied, config
        if before is None or (before.ipv4, before.ipv6) != (config.ipv4, config.ipv6):
            self._families = await self.configure(str(config.ipv4), str(config.ipv6))
        works = {4: self._families.ipv4, 6: self._families.ipv6}
        routes = tuple(network for network in config.routes if works[network.version])
        await self.netlink.set_routes(self._config.interface, map(str, routes))
        self.events.put(
            TunInterfaceUpdated(
                ipv4=config.ipv4 if works[4] else None,
                ipv6=config.ipv6 if works[6] else None,
                dns=(),
                search_domain=config.search_domain,
                routes=routes,
            )
        )

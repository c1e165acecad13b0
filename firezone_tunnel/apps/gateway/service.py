"""The gateway as a service: its core, its host, and when it is ready."""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.defer import Deferred

from firezone_tunnel.core.messages import gateway as messages
from firezone_tunnel.core.tunnel.base import ToPortal
from firezone_tunnel.core.tunnel.gateway import (
    FlowAuthorized,
    FlowEnded,
    FlowIgnored,
    GatewayTunnel,
    InterfaceChanged,
)
from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6
from firezone_tunnel.core.wireguard.seal import seal_pool
from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.host.firewall import GatewayFirewall
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.clock import boottime, utc
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig, TunnelEndpoint


class GatewayService(TunnelEndpoint):
    """One gateway at work.

    `ready` fires with None once clients can be admitted; `failed` with the FirezoneError that ended the service.
    """

    name = "gateway"

    def __init__(self, reactor: Any, config: EndpointConfig) -> None:
        self._gateway = GatewayTunnel(entropy=os.urandom, now=boottime(), utc_now=utc(), pool=seal_pool())
        super().__init__(reactor, config, self._gateway, role=messages.TOPIC, peer_field="cid", parse=messages.parse)
        self.ready: Deferred[None] = Deferred()
        self.failed: Deferred[FirezoneError] = Deferred()
        self._firewall = GatewayFirewall(
            self.worker, interface=config.interface, state_directory=config.state_directory
        )

    @property
    def is_ready(self) -> bool:
        return bool(self.running and self.ready.called)

    async def set_up_host(self) -> None:
        await self._firewall.install()

    async def restore_host(self) -> None:
        await self._firewall.remove()

    def moved(self) -> None:
        """Unlike a client, a gateway keeps its key and its connections: it only takes other paths.

        See docs/decisions.md, 3.
        """
        self.rebind()
        self._gateway.restart_relays(boottime())
        self._tunnel.settle()

    def handle_event(self, event: Any) -> None:
        match event:
            case ToPortal(message):
                self.say(message)
            case InterfaceChanged():
                self.run(lambda: self._configure(event))
            case FlowAuthorized(cid, rid, expires_at):
                log.info("gateway:flow_authorized", cid=cid, rid=rid, expires_at=expires_at)
            case FlowIgnored(cid, rid, reason):
                log.warning("gateway:flow_ignored", cid=cid, rid=rid, reason=reason)
            case FlowEnded(cid, rid, reason):
                log.info("gateway:flow_ended", cid=cid, rid=rid, reason=reason)

    def ended(self, error: FirezoneError | None) -> None:
        if error is not None:
            self.failed.callback(error)

    async def _configure(self, interface: InterfaceChanged) -> None:
        """
        Raises: PlatformError.
        """
        families = await self.configure(str(interface.ipv4), str(interface.ipv6))
        routes = [str(TUNNEL_IPV4)] * families.ipv4 + [str(TUNNEL_IPV6)] * families.ipv6
        await self.netlink.set_routes(self._config.interface, routes)
        if not self.ready.called:
            log.info("gateway:ready", ipv4=str(interface.ipv4), ipv6=str(interface.ipv6))
            self.ready.callback(None)

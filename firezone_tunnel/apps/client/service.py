"""The client as a service: its core, its host, and the events for a front end."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
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
from firezone_tunnel.apps.client.resource_log import ResourceLog
from firezone_tunnel.core.messages import client as messages
from firezone_tunnel.core.tunnel.base import ToPortal
from firezone_tunnel.core.tunnel.client import (
    ClientTunnel,
    FlowIgnored,
    FlowRefused,
    PacketFiltered,
    ResourcesChanged,
    TunConfig,
    TunConfigChanged,
)
from firezone_tunnel.core.wireguard.seal import seal_pool
from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.host.guard import ResourceGuard
from firezone_tunnel.shell.host.parts import HostState
from firezone_tunnel.shell.host.rpfilter import ReplyMarks
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.names import Names
from firezone_tunnel.shell.reactor.clock import boottime
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig, TunnelEndpoint
from firezone_tunnel.shell.runtime.endpoint_log import describe_packet

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
        super().__init__(
            reactor,
            config,
            self._client,
            role=messages.TOPIC,
            parse=messages.parse,
            # Replies to our own sockets arrive whatever the tunnel's routes are (docs/decisions.md, 13).
            parts=(ReplyMarks(state_directory=config.state_directory), ResourceGuard(interface=config.interface)),
        )
        self._resources = ResourceLog(reactor)
        self._sites = Names()  # of gateways
        self.events = EventBuffer()
        self._tun_config: TunConfig | None = None
        self._tun_interface: TunInterfaceUpdated | None = None
        self._reported: dict[Event, None] = {}

    def reset(self, reason: str, *, paused: float = 0.0) -> None:
        """Start again with a new key and new sockets, after the network has changed or on request.

        `paused`: for so many seconds this process didn't run.
        """
        log.info("client:reset", reason=reason)
        self._client.reset(boottime(), paused=paused)
        self.rebind()

    def moved(self) -> None:
        self.reset("the network has changed")

    def resumed(self, paused: float) -> None:
        """After a pause that no gateway waits for, start again rather than find out for each that it has closed."""
        if paused < GATEWAYS_PATIENCE:
            super().resumed(paused)
            return
        self.reset(f"paused for {paused:.0f} s", paused=paused)

    def handle_event(self, event: Any) -> None:
        match event:
            case ToPortal(message):
                if isinstance(message, messages.CreateFlow):
                    log.debug("tunnel:flow_requested", **self._resources.fields(message.resource_id))
                self.say(message)
            case TunConfigChanged(config):
                self._tun_config = config
                self._host.want(ipv4=str(config.ipv4), ipv6=str(config.ipv6), routes=config.routes)
            case ResourcesChanged(resources):
                self.events.put(ResourcesUpdated(resources))
            case FlowRefused(rid, reason):
                if reason in _REFUSALS:
                    self._put_once(_REFUSALS[reason](rid))
            case FlowIgnored(rid, gid, reason):
                self.limiter.warning(
                    "tunnel:flow_ignored",
                    key=rid,
                    **self._resources.fields(rid),
                    **self.peer_fields(gid),
                    reason=reason,
                )
            case PacketFiltered(rid):
                self.limiter.warning("tunnel:packet_filtered", key=rid, details=partial(self._packet_fields, event))

    def peer_fields(self, peer_id: str) -> dict[str, Any]:
        site = self._sites.get(peer_id)
        return {"gid": peer_id} if site is None else {"gid": peer_id, "site": site}

    def message_received(self, message: messages.FromPortal) -> None:
        self._resources.handle_message(message)
        match message:
            case messages.FlowCreated(resource_id=rid, gateway_id=gid):
                self._sites.learn(gid, self._resources.site_name(message.gateway_group_id, rid))
                log.debug("tunnel:flow_created", **self._resources.fields(rid), **self.peer_fields(gid))
            case messages.FlowCreationFailed(resource_id=rid, reason="offline"):
                self.limiter.warning(
                    "tunnel:gateway_offline",
                    key=rid,
                    **self._resources.fields(rid),
                    site=self._resources.site(rid),
                )
            case messages.FlowCreationFailed(resource_id=rid):
                self.limiter.warning(
                    "tunnel:flow_refused",
                    key=rid,
                    **self._resources.fields(rid),
                    reason=message.reason,
                    violated=message.violated_properties,
                )

    def _packet_fields(self, refused: PacketFiltered) -> dict[str, Any]:
        packet = describe_packet(refused.protocol, refused.port)
        return {**self._resources.fields(refused.rid), "packet": packet, "allows": self._resources.allows(refused.rid)}

    def ended(self, error: FirezoneError | None) -> None:
        self._resources.close()
        if error is not None:
            self.events.put(Disconnected(error))
        self.events.end()

    def _put_once(self, event: Event) -> None:
        if event not in self._reported:
            self._reported[event] = None
            self.events.put(event)

    def host_settled(self, state: HostState) -> None:
        config = self._tun_config
        if config is None or state.ipv4 is None:
            return
        works = {4: self._host.families.ipv4, 6: self._host.families.ipv6}
        interface = TunInterfaceUpdated(
            ipv4=config.ipv4 if works[4] else None,
            ipv6=config.ipv6 if works[6] else None,
            dns=(),
            search_domain=config.search_domain,
            routes=tuple(network for network in state.routes if works[network.version]),
        )
        if interface == self._tun_interface:
            return
        if self._tun_interface is None:
            log.info("client:tunnel_ready", ipv4=str(config.ipv4), ipv6=str(config.ipv6))
            self._resources.ready()
        self._tun_interface = interface
        self.events.put(interface)

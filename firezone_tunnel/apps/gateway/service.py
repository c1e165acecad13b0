"""The gateway as a service: its core, its host, and when it is ready."""

from __future__ import annotations

import os
from pathlib import Path
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
from firezone_tunnel.shell.host.parts import HostState
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link.service import trust_from_file
from firezone_tunnel.shell.portal_link.url import LoginUrl, default_name
from firezone_tunnel.shell.process.identity import load_identity
from firezone_tunnel.shell.reactor.clock import boottime, utc
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig, TunnelEndpoint
from firezone_tunnel.shell.tun.device import DEFAULT_NAME

DEFAULT_STATE_DIRECTORY = Path("/var/lib/firezone")
_IDENTITY_FILE = "gateway_id"


class GatewayService(TunnelEndpoint):
    """One gateway at work.

    `ready` fires with None once clients can be admitted; `failed` with the FirezoneError that ended the service.
    """

    name = "gateway"

    def __init__(
        self,
        reactor: Any,
        *,
        url: str,
        token: str,
        device_id: str | None = None,
        name: str | None = None,
        state_directory: str | Path = DEFAULT_STATE_DIRECTORY,
        interface: str = DEFAULT_NAME,
        ca_file: str | Path | None = None,
        max_partition_time: float | None = None,
    ) -> None:
        """
        :param url: the portal's URL; :param token: a gateway token.
        :param device_id: the portal recognizes the gateway by it. Default: a random one stored in `state_directory`.
        :param name: the gateway's name in the portal. Default: the host's name.
        :param state_directory: for files that must survive a restart.
        :param interface: name of the TUN device.
        :param ca_file: PEM file with the only CAs to trust for the portal. Default: the host's.
        :param max_partition_time: seconds without a portal after which the gateway fails. Default: never.

        Raises: ConfigurationError.
        """
        state_directory = Path(state_directory)
        config = EndpointConfig(
            url=LoginUrl.gateway(
                url,
                token,
                device_id=device_id or load_identity(state_directory / _IDENTITY_FILE),
                name=name or default_name(),
            ),
            state_directory=state_directory,
            interface=interface,
            trust=None if ca_file is None else trust_from_file(Path(ca_file)),
            max_partition_time=max_partition_time,
        )
        self._gateway = GatewayTunnel(entropy=os.urandom, now=boottime(), utc_now=utc(), pool=seal_pool())
        super().__init__(
            reactor,
            config,
            self._gateway,
            role=messages.TOPIC,
            peer_field="cid",
            parse=messages.parse,
            parts=(GatewayFirewall(interface=interface, state_directory=state_directory),),
        )
        self.ready: Deferred[None] = Deferred()
        self.failed: Deferred[FirezoneError] = Deferred()

    @property
    def is_ready(self) -> bool:
        """Whether clients can be served."""
        return not self.obstacles()

    def obstacles(self) -> list[str]:
        """Why clients can't be served at the moment; empty if they can."""
        if not self.running or not self.ready.called:
            return ["the portal has not admitted this gateway yet"]
        return list(self.host_problems())

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
            case InterfaceChanged(ipv4, ipv6):
                self.want(ipv4=str(ipv4), ipv6=str(ipv6), routes=(TUNNEL_IPV4, TUNNEL_IPV6))
            case FlowAuthorized(cid, rid, expires_at):
                log.info("gateway:flow_authorized", cid=cid, rid=rid, expires_at=expires_at)
            case FlowIgnored(cid, rid, reason):
                log.warning("gateway:flow_ignored", cid=cid, rid=rid, reason=reason)
            case FlowEnded(cid, rid, reason):
                log.info("gateway:flow_ended", cid=cid, rid=rid, reason=reason)

    def ended(self, error: FirezoneError | None) -> None:
        if error is not None:
            self.failed.callback(error)

    def host_settled(self, state: HostState) -> None:
        if state.ipv4 is not None and not self.ready.called:
            log.info("gateway:ready", ipv4=state.ipv4, ipv6=state.ipv6)
            self.ready.callback(None)

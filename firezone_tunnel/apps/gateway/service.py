"""The gateway as a service: its core, its host, and when it is ready."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from firezone_tunnel.core.messages import gateway as messages
from firezone_tunnel.core.messages.common import describe_filters
from firezone_tunnel.core.tunnel.base import ToPortal
from firezone_tunnel.core.tunnel.gateway import (
    FlowAuthorized,
    FlowEnded,
    FlowIgnored,
    GatewayTunnel,
    InterfaceChanged,
    PacketFiltered,
)
from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6
from firezone_tunnel.core.wireguard.seal import seal_pool
from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.host.firewall import GatewayFirewall
from firezone_tunnel.shell.host.parts import HostState
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.names import Names
from firezone_tunnel.shell.portal_link.service import trust_from_file
from firezone_tunnel.shell.portal_link.url import LoginUrl, default_name
from firezone_tunnel.shell.process.identity import load_identity
from firezone_tunnel.shell.reactor.clock import boottime, utc
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig, TunnelEndpoint
from firezone_tunnel.shell.runtime.endpoint_log import describe_packet
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
            parse=messages.parse,
            parts=(GatewayFirewall(interface=interface, state_directory=state_directory),),
        )
        self._names = Names()  # of clients and resources
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
        return self._host.problems()

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
                self._host.want(ipv4=str(ipv4), ipv6=str(ipv6), routes=(TUNNEL_IPV4, TUNNEL_IPV6))
            case FlowAuthorized(cid, rid, expires_at):
                log.info("gateway:flow_authorized", **self._flow_fields(cid, rid), expires_at=expires_at)
            case FlowIgnored(cid, rid, reason):
                self.limiter.warning(
                    "gateway:flow_ignored", key=(cid, rid), **self._flow_fields(cid, rid), reason=reason
                )
            case FlowEnded(cid, rid, reason):
                log.info("gateway:flow_ended", **self._flow_fields(cid, rid), reason=reason)
            case PacketFiltered(cid):
                # For each client, not for each resource: finding that costs too much for every packet.
                self.limiter.warning("gateway:packet_filtered", key=cid, details=partial(self._refusal_fields, event))

    def peer_fields(self, peer_id: str) -> dict[str, Any]:
        name = self._names.get(peer_id)
        return {"cid": peer_id} if name is None else {"cid": peer_id, "client": name}

    def message_received(self, message: messages.FromPortal) -> None:
        match message:
            case messages.AuthorizeFlow(client=client, resource=resource):
                self._names.learn(client.id, client.name)
                named = None if isinstance(resource, messages.InternetResource) else resource.name
                self._names.learn(resource.id, named)
            case messages.ExpiryUpdated(client_id=cid, resource_id=rid):
                log.debug("gateway:expiry_changed", **self._flow_fields(cid, rid), expires_at=message.expires_at)
            case messages.ResourceUpdated(resource=messages.CidrResource() as resource):
                self._names.learn(resource.id, resource.name)
                allows = describe_filters(resource.filters)
                log.debug("gateway:filters_changed", rid=resource.id, resource=resource.name, allows=allows)

    def _flow_fields(self, cid: str, rid: str) -> dict[str, Any]:
        name = self._names.get(rid)
        resource = {"rid": rid} if name is None else {"rid": rid, "resource": name}
        return {**self.peer_fields(cid), **resource}

    def _refusal_fields(self, refused: PacketFiltered) -> dict[str, Any]:
        packet = describe_packet(refused.protocol, refused.port)
        resource = self._gateway.resource_at(refused.cid, refused.destination)
        if resource is None:
            return {**self.peer_fields(refused.cid), "packet": packet, "allows": "nothing"}
        flow = self._flow_fields(refused.cid, resource.id)
        return {**flow, "packet": packet, "allows": describe_filters(resource.filters)}

    def ended(self, error: FirezoneError | None) -> None:
        if error is not None:
            self.failed.callback(error)

    def host_settled(self, state: HostState) -> None:
        if state.ipv4 is not None and not self.ready.called:
            log.info("gateway:ready", ipv4=state.ipv4, ipv6=state.ipv6)
            self.ready.callback(None)

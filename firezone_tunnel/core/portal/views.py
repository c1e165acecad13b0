"""The configuration as payloads for each role, generation and version (docs/protocol/portal-protocol.md, 2.0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from firezone_tunnel.core.messages import client, gateway
from firezone_tunnel.core.messages.common import (
    Authorization,
    Do53Server,
    DohServer,
    Filter,
    FlowLogs,
    Relay,
    RelaysPresence,
    write,
)
from firezone_tunnel.core.portal.account import Account, DnsSettings, Resource
from firezone_tunnel.core.portal.derived_credentials import FOREVER
from firezone_tunnel.core.portal.devices import Device, DeviceSession

_DNS_PORT = 53
# An interval of 0 disables the upload. The URL is never requested, but must be valid.
_FLOW_LOGS = FlowLogs(api_url="https://flow-logs.invalid/", upload_interval_secs=0, upload_batch_size=0)


def client_resource(account: Account, resource: Resource, session: DeviceSession) -> dict[str, Any] | None:
    """A resource as this client's version reads it; None if it can't."""
    if resource.type == "internet" and not session.agent.knows_internet_resource:
        return None
    sites = [{"id": account.sites[id_].id, "name": account.sites[id_].name} for id_ in resource.sites]
    view: dict[str, Any] = {
        "id": resource.id,
        "type": _wire_type(resource),
        "name": resource.name,
        "sites" if session.agent.knows_sites else "gateway_groups": sites,
    }
    if resource.type == "internet":
        return view | {"can_be_disabled": True}
    view |= {
        "address": resource.address,
        "address_description": resource.address_description,
        "filters": _filters(resource.filters),
    }
    return view | {"ip_stack": resource.ip_stack} if resource.type == "dns" else view


def gateway_resource(resource: Resource) -> dict[str, Any]:
    if resource.type == "internet":
        return {"id": resource.id, "type": "internet"}
    return {
        "id": resource.id,
        "type": _wire_type(resource),
        "name": resource.name,
        "address": resource.address,
        "filters": _filters(resource.filters),
    }


def client_interface(device: Device, dns: DnsSettings) -> dict[str, Any]:
    """V2's `upstream_do53` takes precedence over `upstream_dns` but has no port: it stays empty if a port matters."""
    on_usual_port = all(port == _DNS_PORT for _, port in dns.upstream)
    return {
        "ipv4": device.ipv4,
        "ipv6": device.ipv6,
        "upstream_dns": [
            {"protocol": "ip_port", "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}"}
            for host, port in dns.upstream
        ],
        "search_domain": dns.search_domain,
        "upstream_do53": [write(Do53Server(ip=host)) for host, _ in dns.upstream if on_usual_port],
        "upstream_doh": [write(DohServer(url=url)) for url in dns.upstream_doh],
    }


def client_init(account: Account, session: DeviceSession, relays: Sequence[Relay]) -> dict[str, Any]:
    """The payload of a client's `init`, with the resources of its session."""
    return {
        "interface": client_interface(session.device, account.dns),
        "resources": list(session.resources.values()),
        "relays": [write(relay) for relay in (*relays, *turn_servers(account, session))],
        "authorizations": [],
        "flow_logs": write(_FLOW_LOGS),
    }


def gateway_init(
    account: Account, session: DeviceSession, relays: Sequence[Relay], authorizations: Sequence[Authorization]
) -> dict[str, Any]:
    return {
        "interface": {"ipv4": session.device.ipv4, "ipv6": session.device.ipv6},
        "config": write(gateway.Config()),
        "account_slug": account.slug,
        "relays": [write(relay) for relay in (*relays, *turn_servers(account, session))],
        "authorizations": [write(one) for one in authorizations],
        "flow_logs": write(_FLOW_LOGS),
    }


def turn_servers(account: Account, session: DeviceSession) -> list[Relay]:
    """Standard TURN servers, in addition to the relays, for our own peers only (docs/decisions.md, 4)."""
    if not session.agent.is_ours:
        return []
    return [
        Relay(
            id=server.id,
            addr=str(address),
            username=server.username,
            password=server.password,
            expires_at=FOREVER,
            realm=server.realm,
        )
        for server in account.turn_servers.values()
        for address in server.addresses
    ]


def push_relays(session: DeviceSession, presence: RelaysPresence) -> None:
    session.socket.push(RelaysPresence.event(session.generation), write(presence))


def push_to_client(session: DeviceSession, message: client.FlowCreated | client.FlowCreationFailed) -> None:
    payload = write(message)
    if session.agent.knows_sites and "gateway_group_id" in payload:
        payload["site_id"] = payload.pop("gateway_group_id")
    session.socket.push(message.event(session.generation), payload)


def _wire_type(resource: Resource) -> str:
    return "cidr" if resource.type == "ip" else resource.type


def _filters(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    return [{"protocol": "icmp"} if one.protocol == "icmp" else write(one) for one in filters]

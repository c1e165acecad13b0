"""Messages between the portal and a client (docs/protocol/portal-protocol.md, 2.1 and 2.2)."""

from __future__ import annotations

from typing import Any, Literal

from firezone_tunnel.core.messages.common import (
    Authorization,
    Filter,
    FlowLogs,
    IceCredentials,
    Interface,
    Key,
    NoRelays,
    PortalMessage,
    Record,
    Relay,
    RelaysPresence,
    Site,
    SnownetCapabilities,
    read,
    readable,
    rename,
)

TOPIC = "client"


class DnsResource(Record, frozen=True, kw_only=True, tag_field="type", tag="dns"):
    id: str
    name: str
    address: str
    address_description: str | None = None
    gateway_groups: list[Site]
    ip_stack: Literal["dual", "ipv4_only", "ipv6_only"] | None = None
    filters: list[Filter] = []


class CidrResource(Record, frozen=True, kw_only=True, tag_field="type", tag="cidr"):
    """`address` is a network whose host bits are zero; a single address is a /32 or /128."""

    id: str
    name: str
    address: str
    address_description: str | None = None
    gateway_groups: list[Site]
    filters: list[Filter] = []


class InternetResource(Record, frozen=True, kw_only=True, tag_field="type", tag="internet"):
    id: str
    name: str = "Internet Resource"
    gateway_groups: list[Site]
    can_be_disabled: bool = True


Resource = DnsResource | CidrResource | InternetResource


class Init(PortalMessage, frozen=True, kw_only=True):
    """Sent after each join, and authoritative: resources and relays that it doesn't list are gone."""

    EVENTS = ("init",)

    interface: Interface
    resources: list[Resource] = []
    relays: list[Relay] = []
    authorizations: list[Authorization] = []
    flow_logs: FlowLogs = FlowLogs()


class ConfigChanged(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("config_changed",)

    interface: Interface


class ResourceChanged(PortalMessage, frozen=True, kw_only=True):
    """On the wire the payload is the bare resource."""

    EVENTS = ("resource_created_or_updated",)

    resource: Resource


class ResourceDeleted(PortalMessage, frozen=True, kw_only=True):
    """On the wire the payload is the bare id."""

    EVENTS = ("resource_deleted",)

    id: str


class FlowCreated(PortalMessage, frozen=True, kw_only=True):
    """The gateway admitted us: connect to it. Answers the `CreateFlow` for the same resource."""

    EVENTS = ("flow_created", "authorization_created")

    resource_id: str
    gateway_id: str
    gateway_public_key: Key
    gateway_ipv4: str
    gateway_ipv6: str
    gateway_group_id: str
    preshared_key: Key
    client_ice_credentials: IceCredentials
    gateway_ice_credentials: IceCredentials
    use_iceless: bool = False
    flow_logs_ingest_token: str = ""


class FlowCreationFailed(PortalMessage, frozen=True, kw_only=True):
    """`reason`: not_found, offline, forbidden, version_mismatch, …; other values are only logged."""

    EVENTS = ("flow_creation_failed", "authorization_creation_failed")

    resource_id: str
    reason: str
    violated_properties: list[str] = []


class IceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("ice_candidates", "gateway_ice_candidates", "ice_candidates")

    gateway_id: str
    candidates: list[str]


class InvalidateIceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("invalidate_ice_candidates", "invalidate_gateway_ice_candidates", "invalidate_ice_candidates")

    gateway_id: str
    candidates: list[str]


class CreateFlow(PortalMessage, frozen=True, kw_only=True):
    """Ask for access to a resource. The portal prefers the connected gateways."""

    EVENTS = ("create_flow", "request_authorization")

    resource_id: str
    connected_gateway_ids: list[str]


class BroadcastIceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("broadcast_ice_candidates",)

    gateway_ids: list[str]
    candidates: list[str]


class BroadcastInvalidatedIceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("broadcast_invalidated_ice_candidates",)

    gateway_ids: list[str]
    candidates: list[str]


FromPortal = (
    Init
    | ConfigChanged
    | ResourceChanged
    | ResourceDeleted
    | RelaysPresence
    | FlowCreated
    | FlowCreationFailed
    | IceCandidates
    | InvalidateIceCandidates
)
ToPortal = CreateFlow | BroadcastIceCandidates | BroadcastInvalidatedIceCandidates | NoRelays | SnownetCapabilities

_FROM_PORTAL: dict[str, type[PortalMessage]] = {
    event: kind
    for kind in (
        Init, ConfigChanged, RelaysPresence, FlowCreated, FlowCreationFailed, IceCandidates, InvalidateIceCandidates,
    )
    for event in kind.EVENTS
}  # fmt: skip


def parse(event: str, payload: object, skipped: list[str] | None = None) -> FromPortal | None:
    """Parse a portal's message to a client. None for an unknown event, which is not an error.

    Resources and relays that don't parse are left out of their list, and the reasons are added to `skipped`.

    Raises: ProtocolError.
    """
    if event == "resource_created_or_updated":
        return read(ResourceChanged, {"resource": _with_groups(payload)})
    if event == "resource_deleted":
        return read(ResourceDeleted, {"id": payload})
    kind = _FROM_PORTAL.get(event)
    if kind is None:
        return None
    payload = rename(payload, {"site_id": "gateway_group_id"})
    if isinstance(payload, dict):
        payload = _with_readable(payload, skipped)
    return read(kind, payload)  # type: ignore[return-value]  # the table above holds FromPortal's members


def _with_readable(payload: dict[str, Any], skipped: list[str] | None) -> dict[str, Any]:
    lists: dict[str, object] = {
        key: readable(Relay, payload[key], skipped) for key in ("relays", "connected") if key in payload
    }
    if isinstance(payload.get("resources"), list):
        lists["resources"] = readable(Resource, [_with_groups(entry) for entry in payload["resources"]], skipped)
    return payload | lists


def _with_groups(resource: object) -> object:
    return rename(resource, {"sites": "gateway_groups"})

"""Messages between the portal and a gateway (docs/protocol/portal-protocol.md, 2.4)."""

from __future__ import annotations

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
    SnownetCapabilities,
    UnixTime,
    read,
    readable,
)

TOPIC = "gateway"


class DnsResource(Record, frozen=True, kw_only=True, tag_field="type", tag="dns"):
    id: str
    name: str
    address: str
    filters: list[Filter]


class CidrResource(Record, frozen=True, kw_only=True, tag_field="type", tag="cidr"):
    id: str
    name: str
    address: str
    filters: list[Filter]


class InternetResource(Record, frozen=True, kw_only=True, tag_field="type", tag="internet"):
    id: str


Resource = DnsResource | CidrResource | InternetResource


class Config(Record, frozen=True, kw_only=True):
    """Gateways don't use it, but can't decode an `init` without it."""

    ipv4_masquerade_enabled: bool = True
    ipv6_masquerade_enabled: bool = True


class Init(PortalMessage, frozen=True, kw_only=True):
    """Sent after each join. Whatever its authorizations don't list is revoked."""

    EVENTS = ("init",)

    interface: Interface
    config: Config = Config()
    account_slug: str | None = None
    relays: list[Relay] = []
    authorizations: list[Authorization] = []
    flow_logs: FlowLogs = FlowLogs()


class AuthorizedClient(Record, frozen=True, kw_only=True):
    """The client that an authorization is for. `name` is an extension of ours, sent to our own gateways only."""

    id: str
    name: str | None = None
    public_key: Key
    preshared_key: Key
    ipv4: str
    ipv6: str


class AuthorizeFlow(PortalMessage, frozen=True, kw_only=True):
    """Admit this client to this resource, then answer `FlowAuthorized` with the opaque `ref`."""

    EVENTS = ("authorize_flow", "create_authorization")

    ref: str
    resource: Resource
    client: AuthorizedClient
    client_ice_credentials: IceCredentials
    gateway_ice_credentials: IceCredentials
    expires_at: UnixTime | None
    use_iceless: bool = False
    flow_logs_ingest_token: str = ""


class RejectAccess(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("reject_access",)

    client_id: str
    resource_id: str


class ExpiryUpdated(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("access_authorization_expiry_updated",)

    client_id: str
    resource_id: str
    expires_at: UnixTime | None


class ResourceUpdated(PortalMessage, frozen=True, kw_only=True):
    """On the wire the payload is the bare resource; only its filters matter."""

    EVENTS = ("resource_updated",)

    resource: Resource


class IceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("ice_candidates",)

    client_id: str
    candidates: list[str]


class InvalidateIceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("invalidate_ice_candidates",)

    client_id: str
    candidates: list[str]


class FlowAuthorized(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("flow_authorized", "authorization_created")

    ref: str


class BroadcastIceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("broadcast_ice_candidates",)

    client_ids: list[str]
    candidates: list[str]


class BroadcastInvalidatedIceCandidates(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("broadcast_invalidated_ice_candidates",)

    client_ids: list[str]
    candidates: list[str]


FromPortal = (
    Init
    | AuthorizeFlow
    | RejectAccess
    | ExpiryUpdated
    | ResourceUpdated
    | RelaysPresence
    | IceCandidates
    | InvalidateIceCandidates
)
ToPortal = FlowAuthorized | BroadcastIceCandidates | BroadcastInvalidatedIceCandidates | NoRelays | SnownetCapabilities

_FROM_PORTAL: dict[str, type[PortalMessage]] = {
    event: kind
    for kind in (
        Init, AuthorizeFlow, RejectAccess, ExpiryUpdated, RelaysPresence, IceCandidates, InvalidateIceCandidates,
    )
    for event in kind.EVENTS
}  # fmt: skip


def parse(event: str, payload: object, skipped: list[str] | None = None) -> FromPortal | None:
    """Parse a portal's message to a gateway. None for an unknown event, which is not an error.

    Relays that don't parse are left out of their list, and the reasons are added to `skipped`.

    Raises: ProtocolError.
    """
    if event == "resource_updated":
        return read(ResourceUpdated, {"resource": payload})
    kind = _FROM_PORTAL.get(event)
    if kind is None:
        return None
    if isinstance(payload, dict):
        relays = {key: readable(Relay, payload[key], skipped) for key in ("relays", "connected") if key in payload}
        payload = payload | relays
    return read(kind, payload)  # type: ignore[return-value]  # the table above holds FromPortal's members

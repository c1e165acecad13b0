"""Who may reach what, and through which gateway (docs/protocol/portal-protocol.md, 3.8).

A flow permits one client to reach one resource at one gateway. When a client requests a flow, the portal grants or
refuses it, asks the gateway to admit the client, waits for its answer, and answers the client.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import attrs

from firezone_tunnel.core.messages import client
from firezone_tunnel.core.messages.common import Generation, write
from firezone_tunnel.core.portal import views
from firezone_tunnel.core.portal.account import Account, Actor, Policy, Resource
from firezone_tunnel.core.portal.conditions import Circumstances
from firezone_tunnel.core.portal.derived_credentials import (
    expiry,
    ice_credentials,
    json_web_token,
    open_reference,
    preshared_key,
    sign_reference,
)
from firezone_tunnel.core.portal.devices import DeviceSession
from firezone_tunnel.core.portal.presence import Presence
from firezone_tunnel.core.portal.versions import is_compatible
from firezone_tunnel.core.sansio import Entropy, Timeout, earliest

GATEWAY_TIMEOUT = 15.0  # docs/protocol/portal-protocol.md, 3.8, V2
# An ingest token outlives its authorization by this (docs/protocol/portal-protocol.md, 2.6).
_INGEST_GRACE = 30 * 24 * 3600

Reason = Literal["not_found", "offline", "forbidden", "version_mismatch"]


@attrs.frozen
class Grant:
    """The policy that gives an actor a resource, and when that ends (unix time; None: never)."""

    policy_id: str
    expires_at: int | None


@attrs.frozen
class Flow:
    """A flow as it is stored, one for each client, gateway and resource. `reach` is `Resource.reach`."""

    id: str
    client_id: str
    gateway_id: str
    resource_id: str
    policy_id: str
    token_hash: str
    reach: str
    created_at: int
    expires_at: int | None


@attrs.frozen
class Failure:
    reason: Reason
    violated: tuple[str, ...] = ()


@attrs.define(eq=False)
class PendingFlow:
    """A granted flow whose gateway has not answered yet."""

    flow: Flow
    resource: Resource
    client: DeviceSession
    gateway: DeviceSession
    deadline: float


def grant(
    account: Account, actor: Actor, resource: Resource, circumstances: Circumstances, *, preferred: str | None = None
) -> Grant | Failure:
    """The conforming policy that lasts longest, or the properties that violate the policies.

    If the policy `preferred` conforms, it takes precedence.
    """
    grants: list[Grant] = []
    violated: dict[str, None] = {}
    for policy in account.policies_for(actor, resource.id):
        failing = [one.property_name for one in policy.conditions if not one.holds(circumstances)]
        violated |= dict.fromkeys(failing)
        if not failing:
            grants.append(Grant(policy.id, _end_of(policy, circumstances)))
    if grants:
        return max(grants, key=lambda one: (one.policy_id == preferred, one.expires_at is None, one.expires_at or 0))
    return Failure("forbidden" if violated else "not_found", tuple(violated))


def visible_resources(account: Account, session: DeviceSession, utc_now: float) -> dict[str, Mapping[str, Any]]:
    """The resources that a policy gives this client now, by id, as its version reads them."""
    actor = account.actors.get(session.device.identity.owner)
    circumstances = Circumstances(session.device.remote_ip, utc_now)
    visible: dict[str, Mapping[str, Any]] = {}
    for resource in account.resources.values():
        if actor is None or not isinstance(grant(account, actor, resource, circumstances), Grant):
            continue
        view = views.client_resource(account, resource, session)
        if view is not None:
            visible[resource.id] = view
    return visible


class FlowAuthorizer:
    """Grants or refuses flows, and keeps the requests that wait for a gateway."""

    def __init__(self, *, reference_key: bytes, ingest_key: bytes, entropy: Entropy) -> None:
        self._reference_key = reference_key
        self._ingest_key = ingest_key
        self._entropy = entropy
        self._pending: dict[tuple[str, str], PendingFlow] = {}

    def request(
        self,
        account: Account,
        presence: Presence,
        session: DeviceSession,
        message: client.CreateFlow,
        *,
        new_id: str,
        now: float,
        utc_now: float,
    ) -> PendingFlow | Failure:
        """Grant or refuse a flow. The caller stores a granted flow and then calls `admit`.

        A client's second request for the same resource replaces the first.
        """
        self._pending.pop((session.device.id, message.resource_id), None)
        resource = account.resources.get(message.resource_id)
        actor = account.actors.get(session.device.identity.owner)
        if resource is None or actor is None or message.resource_id not in session.resources:
            return Failure("not_found")
        granted = grant(account, actor, resource, Circumstances(session.device.remote_ip, utc_now))
        if isinstance(granted, Failure):
            return granted
        gateway = self._choose_gateway(presence.gateways_of(resource.sites), session, message.connected_gateway_ids)
        if isinstance(gateway, Failure):
            return gateway
        flow = Flow(
            id=new_id,
            client_id=session.device.id,
            gateway_id=gateway.device.id,
            resource_id=resource.id,
            policy_id=granted.policy_id,
            token_hash=session.token.hash,
            reach=resource.reach,
            created_at=int(utc_now),
            expires_at=earlier(granted.expires_at, session.token.expires_at),
        )
        pending = PendingFlow(flow, resource, session, gateway, now + GATEWAY_TIMEOUT)
        self._pending[session.device.id, resource.id] = pending
        return pending

    def admit(self, account: Account, pending: PendingFlow) -> None:
        """The flow is stored: ask the gateway to admit the client."""
        flow, client_, gateway = pending.flow, pending.client.device, pending.gateway
        credentials = ice_credentials(client_.party, gateway.device.party)
        payload = {
            "ref": sign_reference(
                {"flow": flow.id, "client": client_.id, "resource": flow.resource_id, "gateway": flow.gateway_id},
                self._reference_key,
            ),
            "resource": views.gateway_resource(pending.resource),
            "client": {
                "id": client_.id,
                "public_key": client_.public_key,
                "preshared_key": base64.b64encode(preshared_key(client_.party, gateway.device.party)).decode(),
                "ipv4": client_.ipv4,
                "ipv6": client_.ipv6,
                **({"name": client_.name} if gateway.agent.is_ours else {}),
            },
            "client_ice_credentials": write(credentials.client),
            "gateway_ice_credentials": write(credentials.gateway),
            "expires_at": expiry(flow.expires_at),
            "use_iceless": False,
            "flow_logs_ingest_token": self._ingest_token(account, pending, "responder"),
        }
        event = "authorize_flow" if gateway.generation is Generation.V1 else "create_authorization"
        gateway.socket.push(event, payload)

    def answered(self, gateway: DeviceSession, reference: str) -> PendingFlow | Literal["invalid_ref"] | None:
        """The gateway admitted the client. None: the request has timed out or was replaced."""
        contents = open_reference(reference, self._reference_key)
        if contents is None or contents["gateway"] != gateway.device.id:
            return "invalid_ref"
        key = (contents["client"], contents["resource"])
        pending = self._pending.get(key)
        if pending is None or pending.flow.id != contents["flow"] or pending.gateway is not gateway:
            return None
        return self._pending.pop(key)

    def push_created(self, account: Account, pending: PendingFlow) -> None:
        """The gateway is ready: the client may connect."""
        client_, gateway = pending.client.device, pending.gateway.device
        credentials = ice_credentials(client_.party, gateway.party)
        message = client.FlowCreated(
            resource_id=pending.flow.resource_id,
            gateway_id=gateway.id,
            gateway_public_key=base64.b64decode(gateway.public_key),
            gateway_ipv4=gateway.ipv4,
            gateway_ipv6=gateway.ipv6,
            gateway_group_id=gateway.identity.owner,
            preshared_key=preshared_key(client_.party, gateway.party),
            client_ice_credentials=credentials.client,
            gateway_ice_credentials=credentials.gateway,
            use_iceless=False,
            flow_logs_ingest_token=self._ingest_token(account, pending, "initiator"),
        )
        views.push_to_client(pending.client, message)

    def forget(self, session: DeviceSession) -> None:
        """Forget the requests of a connection that is gone. Requests that wait for it as a gateway time out."""
        self._pending = {key: one for key, one in self._pending.items() if one.client is not session}

    def discard(self, pending: PendingFlow) -> None:
        """Drop a request whose flow could not be stored."""
        key = (pending.flow.client_id, pending.flow.resource_id)
        if self._pending.get(key) is pending:
            del self._pending[key]

    def next_timeout(self) -> Timeout | None:
        return earliest(Timeout(one.deadline, "gateway answers") for one in self._pending.values())

    def overdue(self, now: float) -> Iterator[PendingFlow]:
        """Remove and yield requests whose gateway did not answer in time."""
        for key, pending in list(self._pending.items()):
            if now >= pending.deadline:
                del self._pending[key]
                yield pending

    def _choose_gateway(
        self, online: Sequence[DeviceSession], session: DeviceSession, connected: Sequence[str]
    ) -> DeviceSession | Failure:
        """A qualifying gateway that the client is connected to, else a random one."""
        if not online:
            return Failure("offline")
        is_v2 = session.generation is Generation.V2
        compatible = [
            one
            for one in online
            if is_compatible(
                session.agent.version,
                one.agent.version,
                minor_window=is_v2 and one.generation is Generation.V2,
            )
        ]
        if not compatible:
            return Failure("version_mismatch" if is_v2 else "not_found")
        preferred = [one for one in compatible if one.device.id in connected] or compatible
        return preferred[int.from_bytes(self._entropy(4)) % len(preferred)]

    def _ingest_token(self, account: Account, pending: PendingFlow, role: Literal["initiator", "responder"]) -> str:
        """The token for flow logs, which V2 peers require; nothing is uploaded with it.

        See docs/protocol/portal-protocol.md, 2.6.
        """
        flow, device, resource = pending.flow, pending.client.device, pending.resource
        actor = account.actors.get(device.identity.owner)
        ends_at = expiry(flow.expires_at)
        version = pending.client.agent.version
        claims = {
            "account_id": account.id,
            "iat": flow.created_at,
            "exp": ends_at + _INGEST_GRACE,
            "uploads_enabled": False,
            "role": role,
            "initiator_device_id": device.id,
            "responder_device_id": flow.gateway_id,
            "policy_authorization_id": flow.id,
            "policy_id": flow.policy_id,
            "resource_id": resource.id,
            "resource_name": resource.name,
            "initiator_actor_id": device.identity.owner,
            "initiator_actor_name": "" if actor is None else actor.name,
            "authorized_at": _timestamp(flow.created_at),
            "authorization_expires_at": _timestamp(ends_at),
        }
        optional = {
            "resource_address": resource.address or None,
            "initiator_actor_email": None if actor is None else actor.email,
            "initiator_client_version": None if version is None else ".".join(map(str, version)),
        }
        claims |= {name: value for name, value in optional.items() if value is not None}
        return json_web_token(claims, self._ingest_key)


def earlier(one: int | None, other: int | None) -> int | None:
    """The earlier of two ends; None means no end."""
    return min((end for end in (one, other) if end is not None), default=None)


def _end_of(policy: Policy, circumstances: Circumstances) -> int | None:
    end: int | None = None
    for condition in policy.conditions:
        end = earlier(end, condition.ends_at(circumstances))
    return end


def _timestamp(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

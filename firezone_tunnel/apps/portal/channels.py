"""Handles the messages of clients, gateways and relays. Each connection has one handler."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import attrs

from firezone_tunnel.apps.portal.state import PortalState
from firezone_tunnel.core.messages import client, gateway, relay
from firezone_tunnel.core.messages.common import (
    MAX_CANDIDATES,
    Authorization,
    Generation,
    PortalMessage,
    RelaysPresence,
    SnownetCapabilities,
    read,
)
from firezone_tunnel.core.phoenix.server_socket import JoinRequested, MessageReceived
from firezone_tunnel.core.portal import views
from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.core.portal.derived_credentials import expiry
from firezone_tunnel.core.portal.devices import DeviceSession, new_id
from firezone_tunnel.core.portal.flows import Failure, visible_resources
from firezone_tunnel.core.portal.relay_registry import RelaySession
from firezone_tunnel.errors import PlatformError, ProtocolError
from firezone_tunnel.shell.logs import events as log

MAX_RECIPIENTS = 100
"""Of one message with candidates. Upstream's peers name one."""

_M = TypeVar("_M", bound=PortalMessage)


@attrs.frozen
class JoinAccepted:
    """Accept the join, and push this event first."""

    event: str
    payload: Any


@attrs.frozen
class JoinRefused:
    reason: str


class UnknownMessage(Exception):
    """A message that this role doesn't send, or a malformed one (docs/protocol/portal-protocol.md, 2.8)."""


class ChannelHandler(Protocol):
    """Handles a role's messages. The caller passes one at a time."""

    async def join(self, request: JoinRequested) -> JoinAccepted | JoinRefused: ...

    async def handle(self, message: MessageReceived) -> str | None:
        """Handle a message. Returns the reason if it is refused.

        Raises: Unknown; PlatformError.
        """

    def answers(self, event: str) -> bool:
        """Whether this event gets an ok reply."""

    def left(self) -> None:
        """The peer left the channel, or its connection is gone."""


class ClientChannel:
    def __init__(self, state: PortalState, session: DeviceSession) -> None:
        self._state = state
        self._session = session

    async def join(self, request: JoinRequested) -> JoinAccepted | JoinRefused:
        state, session = self._state, self._session
        if session.agent.version is None:
            return JoinRefused("invalid_version")
        session.resources = visible_resources(state.account, session, state.utc_now())
        session.is_joined = True
        return JoinAccepted("init", views.client_init(state.account, session, state.relays.assign(session)))

    async def handle(self, message: MessageReceived) -> str | None:
        is_v1 = self._session.generation is Generation.V1
        match message.event:
            case "create_flow" if is_v1:
                await self._request_flow(_read(client.CreateFlow, message.payload))
            case "request_authorization" if not is_v1:
                await self._request_flow(_read(client.CreateFlow, {"connected_gateway_ids": []} | _table(message)))
            case "broadcast_ice_candidates" | "broadcast_invalidated_ice_candidates":
                to = _read(client.BroadcastIceCandidates, message.payload)
                self._forward(message.event, to.gateway_ids, to.candidates)
            case "new_gateway_ice_candidates" | "invalidate_gateway_ice_candidates":
                one = _read(client.IceCandidates, message.payload)
                self._forward(message.event, [one.gateway_id], one.candidates)
            case _:
                _handle_common(self._state, self._session, message)
        return None

    def answers(self, event: str) -> bool:
        return False

    def left(self) -> None:
        self._session.is_joined = False
        self._state.flows.forget(self._session)

    async def _request_flow(self, message: client.CreateFlow) -> None:
        state, session = self._state, self._session
        now, utc_now = state.now(), state.utc_now()
        answer = state.flows.request(
            state.account, state.presence, session, message, new_id=new_id(state.entropy), now=now, utc_now=utc_now
        )
        if isinstance(answer, Failure):
            refuse_flow(session, message.resource_id, answer)
            return
        try:
            await state.store.put_flow(answer.flow)
        except PlatformError:
            state.flows.discard(answer)
            raise
        if state.presence.connected(PeerRole.CLIENT, session.device.id) is not session:
            state.flows.discard(answer)  # it is gone, or a newer connection has replaced it
            return
        log.info("portal:flow_granted", **state.flow_fields(answer.flow))
        state.flows.admit(state.account, answer)

    def _forward(self, event: str, gateway_ids: list[str], candidates: list[str]) -> None:
        kind = gateway.InvalidateIceCandidates if "invalidate" in event else gateway.IceCandidates
        gateway_ids, candidates = _bounded(self._state, self._session, gateway_ids, candidates)
        for id_ in dict.fromkeys(gateway_ids) if candidates else ():
            peer = self._state.presence.get(PeerRole.GATEWAY, id_)
            if peer is not None:
                payload = {"client_id": self._session.device.id, "candidates": candidates}
                peer.socket.push(kind.event(peer.generation), payload)


class GatewayChannel:
    def __init__(self, state: PortalState, session: DeviceSession) -> None:
        self._state = state
        self._session = session

    async def join(self, request: JoinRequested) -> JoinAccepted | JoinRefused:
        session = self._session
        authorizations = await current_authorizations(self._state, session)
        session.is_joined = True
        relays = self._state.relays.assign(session)
        return JoinAccepted("init", views.gateway_init(self._state.account, session, relays, authorizations))

    async def handle(self, message: MessageReceived) -> str | None:
        is_v1 = self._session.generation is Generation.V1
        match message.event:
            case "flow_authorized" if is_v1:
                return self._admitted(_read(gateway.FlowAuthorized, message.payload))
            case "authorization_created" if not is_v1:
                return self._admitted(_read(gateway.FlowAuthorized, message.payload))
            case "broadcast_ice_candidates" | "broadcast_invalidated_ice_candidates":
                to = _read(gateway.BroadcastIceCandidates, message.payload)
                self._forward(message.event, to.client_ids, to.candidates)
            case _:
                _handle_common(self._state, self._session, message)
        return None

    def answers(self, event: str) -> bool:
        return event in gateway.FlowAuthorized.EVENTS

    def left(self) -> None:
        self._session.is_joined = False

    def _admitted(self, message: gateway.FlowAuthorized) -> str | None:
        pending = self._state.flows.answered(self._session, message.ref)
        if pending == "invalid_ref":
            return "invalid_ref"
        if pending is not None:
            log.info("portal:flow_authorized", **self._state.flow_fields(pending.flow))
            self._state.flows.push_created(self._state.account, pending)
        return None

    def _forward(self, event: str, client_ids: list[str], candidates: list[str]) -> None:
        kind = client.InvalidateIceCandidates if "invalidate" in event else client.IceCandidates
        client_ids, candidates = _bounded(self._state, self._session, client_ids, candidates)
        for id_ in dict.fromkeys(client_ids) if candidates else ():
            peer = self._state.presence.get(PeerRole.CLIENT, id_)
            if peer is not None:
                payload = {"gateway_id": self._session.device.id, "candidates": candidates}
                peer.socket.push(kind.event(peer.generation), payload)


class RelayChannel:
    def __init__(self, state: PortalState, session: RelaySession) -> None:
        self._state = state
        self._session = session

    async def join(self, request: JoinRequested) -> JoinAccepted | JoinRefused:
        self._session.stamp_secret = _read(relay.Join, request.payload).stamp_secret
        displaced = self._state.relays.join(self._session, self._state.now())
        if displaced is not None:
            addresses = [str(address) for address in self._session.addresses]
            self._state.displace(displaced.id, displaced.socket, role=PeerRole.RELAY.value, addresses=addresses)
        return JoinAccepted("init", {})

    async def handle(self, message: MessageReceived) -> str | None:
        raise UnknownMessage(message.event)

    def answers(self, event: str) -> bool:
        return False

    def left(self) -> None:
        self._state.relays.leave(self._session, self._state.now())


def refuse_flow(session: DeviceSession, resource_id: str, failure: Failure) -> None:
    """Push the refusal of a flow and its reason to the client."""
    known = session.resources.get(resource_id, {})
    resource = {"resource": known["name"]} if "name" in known else {}
    client_ = {"cid": session.device.id, "client": session.device.name}
    log.info("portal:flow_refused", **client_, rid=resource_id, **resource, reason=failure.reason)
    message = client.FlowCreationFailed(
        resource_id=resource_id, reason=failure.reason, violated_properties=list(failure.violated)
    )
    views.push_to_client(session, message)


async def current_authorizations(state: PortalState, session: DeviceSession) -> list[Authorization]:
    """The flows at this gateway: one entry for each client and resource."""
    flows = await state.store.flows_of_gateway(session.device.id, state.utc_now())
    return [
        Authorization(client_id=flow.client_id, resource_id=flow.resource_id, expires_at=expiry(flow.expires_at))
        for flow in flows
    ]


def _handle_common(state: PortalState, session: DeviceSession, message: MessageReceived) -> None:
    """Handle what V2 clients and gateways both send; V1 peers don't send it, but may."""
    match message.event:
        case "no_relays":
            connected = [*state.relays.assign(session), *views.turn_servers(state.account, session)]
            views.push_relays(session, RelaysPresence(disconnected_ids=[], connected=connected))
        case "set_snownet_capabilities":
            _read(SnownetCapabilities, message.payload)  # only validated: the portal doesn't use it
        case _:
            raise UnknownMessage(message.event)


def _bounded(
    state: PortalState, session: DeviceSession, ids: list[str], candidates: list[str]
) -> tuple[list[str], list[str]]:
    """The first ids and candidates, as many as one message may have: a peer handles it in one turn of its reactor."""
    if len(ids) > MAX_RECIPIENTS or len(candidates) > MAX_CANDIDATES:
        state.limiter.warning(
            "portal:message_cut",
            key=session.device.id,
            device=session.device.id,
            name=session.device.name,
            recipients=len(ids),
            candidates=len(candidates),
        )
    return ids[:MAX_RECIPIENTS], candidates[:MAX_CANDIDATES]


def _read(kind: type[_M], payload: object) -> _M:
    try:
        return read(kind, payload)
    except ProtocolError as error:
        raise UnknownMessage(str(error)) from error


def _table(message: MessageReceived) -> dict[str, Any]:
    if not isinstance(message.payload, dict):
        raise UnknownMessage(f"{message.event} without an object")
    return message.payload

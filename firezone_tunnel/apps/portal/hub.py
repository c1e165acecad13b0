"""Admits connections, applies configuration changes, and handles timeouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from firezone_tunnel.apps.portal.channels import (
    ClientChannel,
    GatewayChannel,
    RelayChannel,
    current_authorizations,
    refuse_flow,
)
from firezone_tunnel.apps.portal.state import PortalState
from firezone_tunnel.apps.portal.websocket_connection import WebSocket, WebSocketConnection
from firezone_tunnel.core.messages import gateway
from firezone_tunnel.core.messages.common import Generation, write
from firezone_tunnel.core.phoenix.channel import IDENTITY_SHARED
from firezone_tunnel.core.portal import changes, views
from firezone_tunnel.core.portal.account import Account, PeerRole
from firezone_tunnel.core.portal.admission import AdmittedDevice, AdmittedRelay, Refused, UpgradeRequest, admit
from firezone_tunnel.core.portal.changes import StoredFlow
from firezone_tunnel.core.portal.derived_credentials import expiry
from firezone_tunnel.core.portal.devices import Device, DeviceSession
from firezone_tunnel.core.portal.flows import Failure, Flow, earlier
from firezone_tunnel.core.portal.relay_registry import RelaySession
from firezone_tunnel.core.sansio import Timeout, earliest
from firezone_tunnel.errors import PlatformError, one_line
from firezone_tunnel.shell.logs import events as log

SWEEP_INTERVAL = 60.0  # expired flows, and policies that time changed (docs/protocol/portal-protocol.md, 3.8, 3.13)
_IDLE_CHECK_INTERVAL = 5.0
_PROBE_TIME = 10.0  # a contested session that lasts longer is of a host that is there: `PeerSocket.probe`
_RETRY_AFTER = 1  # seconds


@attrs.frozen
class RegisteredDevice:
    admitted: AdmittedDevice
    device: Device


@attrs.frozen
class RegisteredRelay:
    admitted: AdmittedRelay
    id: str


Registered = RegisteredDevice | RegisteredRelay


class Hub:
    """`on_timeout_changed` is called when `next_timeout` may have changed."""

    def __init__(self, state: PortalState, on_timeout_changed: Callable[[], None]) -> None:
        self._state = state
        self._on_timeout_changed = on_timeout_changed
        self._peers: dict[WebSocketConnection, DeviceSession | RelaySession] = {}
        self._first_expiry: int | None = None
        self._sweep_at = state.now() + SWEEP_INTERVAL
        self._idle_check_at = state.now() + _IDLE_CHECK_INTERVAL

    async def register(self, request: UpgradeRequest) -> Registered:
        """Decide about an upgrade request and store the device.

        Raises: Refused.
        """
        state = self._state
        try:
            admitted = admit(state.account, request, state.utc_now())
            if isinstance(admitted, AdmittedDevice):
                self._refuse_twin(admitted)
            registered: Registered
            if isinstance(admitted, AdmittedRelay):
                registered = RegisteredRelay(admitted, await state.store.upsert_relay(admitted, state.utc_now()))
            else:
                registered = RegisteredDevice(admitted, await state.store.upsert_device(admitted, state.utc_now()))
            if admit(state.account, request, state.utc_now()) != admitted:  # the configuration changed meanwhile
                raise Refused(503, "try_again", "The configuration has just changed.", retry_after=_RETRY_AFTER)
        except Refused as refused:
            log.info("portal:connection_refused", path=request.path, status=refused.status, code=refused.code)
            raise
        except PlatformError as error:
            log.error("portal:store_failed", path=request.path, reason=one_line(error))
            raise Refused(
                503, "store_unavailable", "The portal can't store this connection.", retry_after=_RETRY_AFTER
            ) from error
        return registered

    def open(self, registered: Registered, web_socket: WebSocket) -> WebSocketConnection:
        """The WebSocket of a registered peer is open."""
        if isinstance(registered, RegisteredRelay):
            return self._open_relay(registered, web_socket)
        return self._open_device(registered, web_socket)

    async def apply(self, account: Account) -> None:
        """Replace the configuration, end what it no longer allows, and push the changes to connected peers.

        Raises: PlatformError.
        """
        state, old = self._state, self._state.account
        state.account = account
        self._check_tokens()
        utc_now = state.utc_now()
        for session in list(state.presence.joined(PeerRole.CLIENT)):
            changes.push_client_changes(old, account, session, utc_now)
        for session in list(state.presence.joined(PeerRole.GATEWAY)):
            changes.push_gateway_changes(old, account, session)
        for session in list(state.presence.all()):
            if session.is_joined:
                changes.push_turn_servers(old, account, session)
        await self.review_flows()
        if old.slug != account.slug:
            for session in list(state.presence.joined(PeerRole.GATEWAY)):
                await self._send_gateway_init(session)
        self._on_timeout_changed()

    async def review_flows(self) -> None:
        """End or shorten stored flows that the configuration no longer allows as they are.

        Gateways are notified before anything else is awaited, so a flow that is granted meanwhile is pushed after that.
        If the process ends before the store is updated, the next start updates it.

        Raises: PlatformError.
        """
        state = self._state
        gone: list[str] = []
        changed: list[Flow] = []
        for stored in await state.store.flows():
            flow = stored.flow
            verdict = changes.judge(state.account, self._up_to_date(stored), state.utc_now())
            if verdict == flow:
                continue
            if verdict is None or not self._push_expiry(flow, verdict):
                gone.append(flow.id)
                self._push_rejection(flow)
            else:
                changed.append(verdict)
        await state.store.drop_flows(gone)
        for flow in changed:
            await state.store.update_flow(flow)

    def next_timeout(self) -> Timeout:
        state = self._state
        due = earliest(
            (
                Timeout(self._sweep_at, "sweep"),
                Timeout(self._idle_check_at, "idle sockets"),
                state.flows.next_timeout(),
                state.relays.next_timeout(),
                self._next_expiry(),
            )
        )
        assert due is not None
        return due

    async def handle_timeout(self, now: float) -> None:
        state = self._state
        for pending in state.flows.overdue(now):
            refuse_flow(pending.client, pending.flow.resource_id, Failure("offline"))
        for session, presence in state.relays.settled_updates(self._relay_users(), now):
            views.push_relays(session, presence)
        self._check_tokens()
        if now >= self._idle_check_at:
            self._idle_check_at = now + _IDLE_CHECK_INTERVAL
            for connection in list(self._peers):
                connection.close_if_idle(now)
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_INTERVAL
            await self._sweep(now)

    def close_all(self) -> None:
        """Close every WebSocket in a way that makes its peer reconnect soon."""
        for connection in list(self._peers):
            connection.close(is_failure=True)

    def _open_device(self, registered: RegisteredDevice, web_socket: WebSocket) -> WebSocketConnection:
        state, admitted, device = self._state, registered.admitted, registered.device
        connection = self._connection(admitted, web_socket, lambda: self._device_lost(connection, session))
        session = DeviceSession(
            device=device,
            generation=admitted.generation,
            agent=admitted.agent,
            token=admitted.token,
            socket=connection,
        )
        is_client = session.role is PeerRole.CLIENT
        connection.channel = ClientChannel(state, session) if is_client else GatewayChannel(state, session)
        connection.fields["cid" if is_client else "gid"] = device.id
        displaced = state.presence.arrive(session)
        if displaced is not None:
            self._displace(displaced, admitted)
        self._opened(connection, session, admitted)
        return connection

    def _displace(self, displaced: DeviceSession, admitted: AdmittedDevice) -> None:
        if displaced.device.public_key == admitted.public_key:  # the same process, as in `_refuse_twin`
            displaced.socket.close()
            return
        self._state.displace(displaced.device.id, displaced.socket, **_twins(displaced, admitted))

    def _refuse_twin(self, admitted: AdmittedDevice) -> None:
        """Refuse another host with the identity of a device that is connected (docs/decisions.md, 25).

        A gateway's second host is refused at once; a client's once they have displaced each other too often. The same
        tunnel key means the same process, which has lost its connection sooner than we have.

        Raises: Refused.
        """
        state, now = self._state, self._state.now()
        present = state.presence.with_identity(admitted.identity)
        if present is None or present.device.public_key == admitted.public_key:
            return
        is_gateway = present.role is PeerRole.GATEWAY
        if not is_gateway and not state.swaps.is_excessive(present.device.id, now):
            return
        state.swaps.note(present.device.id, now)
        present.socket.probe()
        if present.contested_since is None:
            present.contested_since = now
        elif now >= present.contested_since + _PROBE_TIME:
            state.warn_of_twins(present.device.id, **_twins(present, admitted))
            if present.agent.is_ours:  # upstream's programs don't know the event
                present.socket.push(IDENTITY_SHARED, {})
        # Upstream's programs of 2025-08 end for ever after any 4xx.
        is_patient = admitted.generation is Generation.V2 or admitted.agent.is_ours
        raise Refused(
            409 if is_patient else 503,
            "gateway_already_connected" if is_gateway else "device_identity_conflict",
            f"Another host is connected with this identity, as {present.device.name}: give each host its own.",
        )

    def _open_relay(self, registered: RegisteredRelay, web_socket: WebSocket) -> WebSocketConnection:
        admitted = registered.admitted
        connection = self._connection(admitted, web_socket, lambda: self._lost(connection))
        relay = RelaySession(registered.id, admitted.token, admitted.addresses, connection)
        connection.channel = RelayChannel(self._state, relay)
        connection.fields["relay"] = relay.id
        self._opened(connection, relay, admitted)
        return connection

    def _connection(
        self, admitted: AdmittedDevice | AdmittedRelay, web_socket: WebSocket, on_lost: Callable[[], None]
    ) -> WebSocketConnection:
        return WebSocketConnection(
            web_socket,
            topic=admitted.role.value,
            form=admitted.form,
            now=self._state.now,
            on_lost=on_lost,
            on_handled=self._handled,
        )

    def _opened(
        self,
        connection: WebSocketConnection,
        peer: DeviceSession | RelaySession,
        admitted: AdmittedDevice | AdmittedRelay,
    ) -> None:
        self._peers[connection] = peer
        log.info("portal:device_connected", **connection.fields, agent=admitted.user_agent)
        self._first_expiry = earlier(self._first_expiry, admitted.token.expires_at)
        self._on_timeout_changed()

    def _device_lost(self, connection: WebSocketConnection, session: DeviceSession) -> None:
        self._state.presence.leave(session)
        self._lost(connection)

    def _lost(self, connection: WebSocketConnection) -> None:
        del self._peers[connection]
        if connection.channel is not None:
            connection.channel.left()
        log.info("portal:device_disconnected", **connection.fields)
        self._on_timeout_changed()

    def _handled(self) -> None:
        """A mailbox was emptied, which may have changed anything."""
        for session, presence in self._state.relays.urgent_updates(self._relay_users()):
            views.push_relays(session, presence)
        self._on_timeout_changed()

    def _relay_users(self) -> list[DeviceSession]:
        return [session for session in self._state.presence.all() if session.is_joined]

    def _check_tokens(self) -> None:
        """Disconnect for good peers whose token has expired, was removed or has another owner."""
        state, utc_now = self._state, self._state.utc_now()
        first: int | None = None
        for peer in list(self._peers.values()):
            token = state.account.live_token(peer.token.role, peer.token.hash, utc_now)
            if token is None or token.owner != peer.token.owner:
                peer.socket.disconnect("token_expired")
                continue
            peer.token = token
            first = earlier(first, token.expires_at)
        self._first_expiry = first

    def _next_expiry(self) -> Timeout | None:
        if self._first_expiry is None:
            return None
        state = self._state
        return Timeout(state.now() + max(0.0, self._first_expiry - state.utc_now()), "token expires")

    async def _send_gateway_init(self, session: DeviceSession) -> None:
        authorizations = await current_authorizations(self._state, session)
        relays = self._state.relays.assign(session)
        session.socket.push("init", views.gateway_init(self._state.account, session, relays, authorizations))

    def _up_to_date(self, stored: StoredFlow) -> StoredFlow:
        session = self._state.presence.connected(PeerRole.CLIENT, stored.flow.client_id)
        return stored if session is None else attrs.evolve(stored, remote_ip=session.device.remote_ip)

    def _push_expiry(self, flow: Flow, verdict: Flow) -> bool:
        """Notify the gateway of a flow's new end; False if it can't be: V2 has no message for it."""
        session = self._state.presence.connected(PeerRole.GATEWAY, flow.gateway_id)
        if session is None or flow.expires_at == verdict.expires_at:
            return True
        if session.generation is not Generation.V1:
            return False
        message = gateway.ExpiryUpdated(
            client_id=flow.client_id, resource_id=flow.resource_id, expires_at=expiry(verdict.expires_at)
        )
        session.socket.push(message.event(session.generation), write(message))
        return True

    def _push_rejection(self, flow: Flow) -> None:
        log.info("portal:flow_revoked", cid=flow.client_id, gid=flow.gateway_id, rid=flow.resource_id)
        session = self._state.presence.connected(PeerRole.GATEWAY, flow.gateway_id)
        if session is not None:
            message = gateway.RejectAccess(client_id=flow.client_id, resource_id=flow.resource_id)
            session.socket.push(message.event(session.generation), write(message))

    async def _sweep(self, now: float) -> None:
        state, utc_now = self._state, self._state.utc_now()
        state.swaps.forget_old(now)
        for session in list(state.presence.joined(PeerRole.CLIENT)):
            changes.push_resource_changes(state.account, session, utc_now)
        try:
            await state.store.drop_expired_flows(utc_now)
        except PlatformError as error:
            log.error("portal:store_failed", reason=one_line(error))


def _twins(present: DeviceSession, other: AdmittedDevice) -> dict[str, Any]:
    """Log fields about two hosts with one identity."""
    return {
        "role": present.role.value,
        "name": present.device.name,
        "addresses": [present.device.remote_ip, other.remote_ip],
    }

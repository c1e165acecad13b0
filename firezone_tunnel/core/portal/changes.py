"""How a changed configuration affects connected peers and granted flows.

See docs/protocol/portal-protocol.md, 3.8, 3.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from firezone_tunnel.core.messages.common import RelaysPresence
from firezone_tunnel.core.portal import views
from firezone_tunnel.core.portal.account import Account, PeerRole, Resource
from firezone_tunnel.core.portal.conditions import Circumstances
from firezone_tunnel.core.portal.devices import DeviceSession
from firezone_tunnel.core.portal.flows import Flow, Grant, earlier, grant, visible_resources


@attrs.frozen
class StoredFlow:
    """A flow with the client's actor and last address, and the gateway's site."""

    flow: Flow
    actor_id: str
    remote_ip: str
    site_id: str


def judge(account: Account, stored: StoredFlow, utc_now: float) -> Flow | None:
    """The flow under this configuration: unchanged, under another policy, with an earlier end, or None if it ends."""
    flow = stored.flow
    token = account.live_token(PeerRole.CLIENT, flow.token_hash, utc_now)
    resource = account.resources.get(flow.resource_id)
    actor = account.actors.get(stored.actor_id)
    if token is None or resource is None or actor is None or token.owner != actor.id:
        return None
    if resource.reach != flow.reach or stored.site_id not in resource.sites:
        return None
    granted = grant(account, actor, resource, Circumstances(stored.remote_ip, utc_now), preferred=flow.policy_id)
    if not isinstance(granted, Grant):
        return None
    expires_at = earlier(flow.expires_at, earlier(granted.expires_at, token.expires_at))
    if expires_at is not None and expires_at <= utc_now:
        return None
    return attrs.evolve(flow, policy_id=granted.policy_id, expires_at=expires_at)


def push_turn_servers(old: Account, new: Account, session: DeviceSession) -> None:
    """Push the ids of removed TURN servers, and all present TURN servers."""
    if old.turn_servers == new.turn_servers or not session.agent.is_ours:
        return
    gone = [id_ for id_ in old.turn_servers if old.turn_servers[id_] != new.turn_servers.get(id_)]
    views.push_relays(session, RelaysPresence(disconnected_ids=gone, connected=views.turn_servers(new, session)))


def push_client_changes(old: Account, new: Account, session: DeviceSession, utc_now: float) -> None:
    """Push whatever differs from the client's view."""
    if old.dns != new.dns:
        session.socket.push("config_changed", {"interface": views.client_interface(session.device, new.dns)})
    push_resource_changes(new, session, utc_now)


def push_resource_changes(account: Account, session: DeviceSession, utc_now: float) -> None:
    """Push resources that were added, removed or changed for this client, by time-dependent policies too."""
    known, visible = session.resources, visible_resources(account, session, utc_now)
    session.resources = visible
    for id_ in known:
        if id_ not in visible or _sites(known[id_]) != _sites(visible[id_]):
            session.socket.push("resource_deleted", id_)
    for id_, view in visible.items():
        if known.get(id_) != view:
            session.socket.push("resource_created_or_updated", view)


def push_gateway_changes(old: Account, new: Account, session: DeviceSession) -> None:
    """Push resources of the gateway's site whose filters or name changed. A new address has ended their flows."""
    for resource in _changed_in_place(old, new):
        if session.device.identity.owner in resource.sites:
            session.socket.push("resource_updated", views.gateway_resource(resource))


def _changed_in_place(old: Account, new: Account) -> Iterator[Resource]:
    for resource in new.resources.values():
        before = old.resources.get(resource.id)
        if before is None or before.reach != resource.reach:
            continue
        if views.gateway_resource(before) != views.gateway_resource(resource):
            yield resource


def _sites(view: Any) -> list[str]:
    return [site["id"] for site in view.get("sites", view.get("gateway_groups", []))]

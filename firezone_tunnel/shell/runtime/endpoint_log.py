"""The messages in a client's or gateway's log about connections, candidates and packets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, TCP, UDP
from firezone_tunnel.core.snownet.events import (
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionEvent,
    ConnectionFailed,
    PairNominated,
    PathChanged,
    RelayNews,
)
from firezone_tunnel.core.snownet.relays import RelayAllocated, RelayFailed
from firezone_tunnel.shell.logs import events as log

PeerFields = Callable[[str], dict[str, Any]]
"""The log fields of a peer by its id: the id, and a name if one is known."""

_MAX_CANDIDATES = 20


def log_node_event(event: ConnectionEvent | RelayNews, peer_fields: PeerFields) -> None:
    """Log a change of a connection or a relay."""
    match event:
        case RelayAllocated(rid, address):
            log.info("tunnel:relay_allocated", relay=rid, address=str(address))
        case RelayFailed():
            log.info("tunnel:relay_failed", relay=event.rid, reason=f"the relay {event.reason}")
        case PairNominated(peer_id, local_kind, local, remote_kind, remote):
            ends = {"local": f"{local_kind} {local}", "remote": f"{remote_kind} {remote}"}
            log.debug("tunnel:pair_nominated", **peer_fields(peer_id), **ends)
        case ConnectionEstablished(peer_id, path, local, remote):
            peer, ends = peer_fields(peer_id), {"local": str(local), "remote": str(remote)}
            log.info("tunnel:connection_established", **peer, path=path, **ends)
        case PathChanged(peer_id, path, local, remote):
            peer, ends = peer_fields(peer_id), {"local": str(local), "remote": str(remote)}
            log.info("tunnel:path_changed", **peer, path=path, **ends)
        case ConnectionFailed(peer_id, reason):
            log.info("tunnel:connection_failed", **peer_fields(peer_id), reason=reason)
        case ConnectionClosed(peer_id):
            log.info("tunnel:connection_closed", **peer_fields(peer_id))


def log_candidates(message: Any, peer_fields: PeerFields) -> None:
    """Log the candidates in a message from or to the portal. Other messages are ignored."""
    match message:
        case to_client.IceCandidates(gateway_id=peer_id) | to_gateway.IceCandidates(client_id=peer_id):
            peer, candidates = peer_fields(peer_id), message.candidates[:_MAX_CANDIDATES]
            log.debug("tunnel:candidates_added", **peer, side="remote", candidates=candidates)
        case (
            to_client.InvalidateIceCandidates(gateway_id=peer_id)
            | to_gateway.InvalidateIceCandidates(client_id=peer_id)
        ):
            peer, candidates = peer_fields(peer_id), message.candidates[:_MAX_CANDIDATES]
            log.debug("tunnel:candidates_removed", **peer, side="remote", candidates=candidates)
        case (
            to_client.BroadcastIceCandidates(gateway_ids=[peer_id])
            | to_gateway.BroadcastIceCandidates(client_ids=[peer_id])
        ):
            peer, candidates = peer_fields(peer_id), message.candidates
            log.debug("tunnel:candidates_added", **peer, side="local", candidates=candidates)
        case (
            to_client.BroadcastInvalidatedIceCandidates(gateway_ids=[peer_id])
            | to_gateway.BroadcastInvalidatedIceCandidates(client_ids=[peer_id])
        ):
            peer, candidates = peer_fields(peer_id), message.candidates
            log.debug("tunnel:candidates_removed", **peer, side="local", candidates=candidates)


def describe_packet(protocol: int, port: int) -> str:
    """A packet in the form of the filters: "tcp/22"."""
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    return f"{name}/{port}" if protocol in {TCP, UDP} else name


_PROTOCOLS = {ICMP: "icmp", ICMPV6: "icmp", TCP: "tcp", UDP: "udp"}

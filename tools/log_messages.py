"""Generate the reference page of all log messages from the calls that write them: `python tools/log_messages.py FILE`.

The calls have level and fields; `MEANINGS` below has a sentence for each message type.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs

_PACKAGE = Path(__file__).parents[1] / "firezone_tunnel"
_TYPE = re.compile(r"[a-z]+:[a-z][a-z0-9_]+")
_LEVELS = ("debug", "info", "warning", "error")

# The roles that log the messages of a module, by the longest prefix of its path.
_ROLES = {
    "apps/client": "client",
    "apps/gateway": "gateway",
    "apps/portal": "portal",
    "apps/relay": "relay",
    "shell": "all",
    "shell/host": "client, gateway",
    "shell/host/firewall": "gateway",
    "shell/host/rpfilter": "client",
    "shell/host/sysctl": "gateway",
    "shell/portal_link": "client, gateway, relay",
    "shell/process/health": "gateway, relay",
    "shell/runtime": "client, gateway",
    "shell/tun": "client, gateway",
    "shell/udp": "client, gateway, relay",
}

_PEER = ("gid", "site", "cid", "client")
_FLOW = ("cid", "client", "rid", "resource")
_CONNECTION = ("role", "cid", "client", "actor", "gid", "gateway", "site", "relay")
_BOUNDARY = ("reason", "traceback", "suppressed")
_COUNTERS = ("…counters that are not zero",)

# The fields that a `**expression` or `details=expression` in a call adds.
_EXPANSIONS = {
    "self._flow_fields(cid, rid)": _FLOW,
    "partial(self._refusal_fields, event)": (*_FLOW, "packet", "allows"),
    "partial(self._packet_fields, event)": ("rid", "resource", "packet", "allows"),
    "self._resources.fields(rid)": ("rid", "resource"),
    "self._resources.fields(message.resource_id)": ("rid", "resource"),
    "self._state.flow_fields(flow)": ("cid", "client", "gid", "gateway", "rid", "resource"),
    "self._state.flow_fields(pending.flow)": ("cid", "client", "gid", "gateway", "rid", "resource"),
    "state.flow_fields(answer.flow)": ("cid", "client", "gid", "gateway", "rid", "resource"),
    "self.peer_fields(gid)": ("gid", "site"),
    "peer_fields(peer_id)": _PEER,
    "peer": _PEER,
    "ends": ("local", "remote"),
    "named": ("missing", "count", "program"),
    "client_": ("cid", "client"),
    "resource": ("resource",),
    "lists": ("added", "removed", "changed"),
    "fields": ("reason", "error", "traceback"),
    "late": ("late_p999_ms", "late_max_ms"),
    "counters": _COUNTERS,
    "log.nonzero(self.counters)": _COUNTERS,
    "log.nonzero(self._tun.counters)": _COUNTERS,
    "log.nonzero(transport.counters)": _COUNTERS,
    "self.fields": _CONNECTION,
    "connection.fields": _CONNECTION,
    "advice": ("advice",),
}

MEANINGS = {
    "client:reset": "The client starts again with a new key and new sockets. Flows recover by themselves.",
    "client:resources_changed": "Resources were added, removed or changed. At most 20 of each kind are listed.",
    "client:resources_listed": "The resources of this client when the tunnel is ready. At most 20 are listed.",
    "client:tunnel_ready": "The interface is configured, and packets to resources enter the tunnel.",
    "firewall:chain_opened": "The gateway added its accept rules to another program's chain, which drops others.",
    "firewall:forwarding_left_on": "Forwarding stays on at the end, because something else may need it by now.",
    "firewall:ipv6_not_forwarded": "IPv6 forwarding can't be switched on: IPv6 resources are unreachable.",
    "firewall:legacy_iptables_found": "Rules of legacy iptables exist, which may drop forwarded packets.",
    "gateway:expiry_changed": "The portal changed the time at which a flow ends.",
    "gateway:filters_changed": "The portal changed what a resource's filters allow.",
    "gateway:flow_authorized": "A client may use a resource, until the unix time `expires_at` if there is one.",
    "gateway:flow_ended": "A client may not use a resource any more: it was rejected, has expired or is unlisted.",
    "gateway:flow_ignored": "The portal authorized a client that can't be admitted.",
    "gateway:packet_filtered": "A client's packet was refused: no resource of the client allows it.",
    "gateway:ready": "The interface is configured, and clients can be admitted.",
    "health:listening": "The health checks answer at this address.",
    "host:as_wanted_again": "What `host:not_as_wanted` named is there.",
    "host:contested": "Another program changes the same things again and again: repairs are made once a second.",
    "host:crashed": "A bug in the keeping of the host's network. It goes on.",
    "host:not_as_wanted": "Something is not as wanted and can't be put right. It is tried again.",
    "host:not_restored": "A part of the host's configuration could not be restored.",
    "host:originals_not_deleted": "The file with the host's original settings can't be deleted.",
    "host:originals_not_stored": "The host's original settings can't be stored: a killed process leaves them changed.",
    "host:repaired": "Another program had changed the host's network, and what it changed is put right.",
    "host:sysctl_not_restored": "A kernel setting could not be restored.",
    "logs:dropped": "Messages were dropped, as the reader of the log is too slow or the disk is full.",
    "netlink:address_failed": "The interface did not get its address in one family.",
    "network:addresses_changed": "The host has other addresses, which are offered to peers.",
    "network:crashed": "A bug in following the host's network.",
    "network:look_failed": "The host's network could not be read. The next change triggers another try.",
    "network:moved": "The host's default route leads elsewhere: it is in another network.",
    "network:nftables_not_watched": "The kernel doesn't report changes of nftables. They are found within a minute.",
    "portal:attempt_crashed": "A bug in connecting to the portal. The next attempt follows.",
    "portal:channel_crashed": "A bug in handling a peer's message. Its connection is closed.",
    "portal:channel_lost": "The portal closed the channel but not the connection. It is joined again.",
    "portal:closed": "The connection to the portal at its end, with its counters.",
    "portal:connection_idle": "A peer sent nothing for too long. Its connection is closed.",
    "portal:connection_lost": "The connection was lost. The next attempt follows in `delay` seconds.",
    "portal:connection_refused": "A peer was refused with this HTTP status.",
    "portal:connection_stalled": "The portal accepts connections, but `missing` did not come. It is tried further.",
    "portal:device_connected": "A client, gateway or relay opened a connection.",
    "portal:device_disconnected": "The connection of a client, gateway or relay is closed.",
    "portal:dialed": "An attempt to connect begins.",
    "portal:entries_left_out": "Entries of a list could not be read, and were left out.",
    "portal:flow_authorized": "The gateway admitted the client, which is informed now.",
    "portal:flow_granted": "A policy gives a client access to a resource. The gateway is asked to admit it.",
    "portal:flow_refused": "A client was refused access to a resource.",
    "portal:flow_revoked": "A flow that the configuration no longer allows was ended.",
    "portal:frame_rejected": "A peer violated the protocol. Its connection is closed.",
    "portal:identity_shared": "Two hosts use one identity, and displace each other.",
    "portal:joined": "The connection to the portal is established.",
    "portal:listening": "The portal accepts connections.",
    "portal:message_cut": "A peer named more candidates or recipients than one message may have. The rest is ignored.",
    "portal:message_malformed": "A message of the portal could not be read, and was ignored.",
    "portal:message_unknown": "A message of an unknown kind was ignored or refused.",
    "portal:resolved": "The name of the portal's host was resolved to these addresses.",
    "portal:retry_scheduled": "The portal can't be reached. Attempt number `attempt` follows in `delay` seconds.",
    "portal:seed_incomplete": "The seed file has an entry without effect.",
    "portal:seed_rejected": "The seed file is invalid. The portal keeps its current configuration.",
    "portal:seed_reloaded": "The seed file was read again, and changes were pushed to the peers.",
    "portal:store_failed": "The database failed.",
    "portal:timeout_failed": "A bug in handling a timeout.",
    "process:resumed": "The machine or the process did not run for `paused` seconds. All peers are asked at once.",
    "process:end_forced": "The end took too long: where each thread hangs. Rules and routes are removed.",
    "process:failed": "The process ends because of this error.",
    "process:last_step_failed": "A step of a forced end failed.",
    "process:timer_failed": "A bug in handling a timeout, which is tried again after a second.",
    "relay:allocation_closed": "The port of an allocation was closed.",
    "relay:allocation_opened": "The port of an allocation was opened.",
    "relay:crashed": "A bug ended a worker, or occurred while the relay stopped.",
    "relay:drained": "All clients have moved to another relay, or the drain time is over.",
    "relay:draining": "The relay accepts no new clients, and waits until present clients have moved elsewhere.",
    "relay:event_failed": "A bug in handling datagrams.",
    "relay:listening": "The relay serves clients.",
    "relay:login_rejected": "The last login that the relay rejected.",
    "relay:logins_rejected": "The relay rejected logins since the last such message.",
    "relay:measured": "The load has changed. Written every 10 s at most.",
    "relay:peers_refused": "Clients asked for peers that the relay must not reach since the last such message.",
    "relay:private_peers_refused": "Clients asked for peers in a private network that is not allowed.",
    "relay:ready": "The relay serves, and the portal knows it.",
    "relay:stopped": "The counters of the relay at its end.",
    "relay:worker_killed": "A worker did not end in time.",
    "relay:worker_lost": "A worker ended unexpectedly, and is started again after `next_after` seconds.",
    "relay:worker_printed": "A worker wrote something other than log messages.",
    "relay:worker_report_rejected": "A report of a worker could not be read.",
    "relay:worker_started": "A worker process was started.",
    "rpfilter:reply_marks_installed": "Replies are marked with nftables: these interfaces use strict rp_filter.",
    "service:started": "The first message: what starts.",
    "tun:closed": "The counters of the TUN device at its end.",
    "tun:opened": "The TUN device is open.",
    "tun:read_failed": "Reading from the TUN device failed.",
    "tun:segmentation_refused": "The kernel refuses super-packets of a protocol, and gets single packets instead.",
    "tun:write_failed": "Writing to the TUN device failed. The packet was dropped.",
    "tunnel:callback_failed": "A bug in handling packets or datagrams, which were dropped.",
    "tunnel:candidates_added": "Candidates of this side were sent to the peer, or of the peer received.",
    "tunnel:candidates_removed": "Candidates were withdrawn, by this side or by the peer.",
    "tunnel:closed": "The counters of all protocols at the end.",
    "tunnel:connection_closed": "The connection to a peer was closed on purpose.",
    "tunnel:connection_established": "There is a path and a WireGuard session. `path` is direct or relayed.",
    "tunnel:connection_failed": "A peer can't be reached, or no longer.",
    "tunnel:crashed": "A bug in stopping the service.",
    "tunnel:flow_created": "A gateway admitted this client to a resource.",
    "tunnel:flow_ignored": "The portal named a gateway that can't be used.",
    "tunnel:flow_refused": "The portal refused access to a resource. `violated` are the conditions that do not hold.",
    "tunnel:flow_requested": "A packet to a resource needs a gateway, and the portal is asked for one.",
    "tunnel:gateway_offline": "All gateways of the resource's site are offline.",
    "tunnel:loop_measured": "How late timers fired at most, and in 99.9 % of all cases.",
    "tunnel:packet_filtered": "A packet was refused, because the resource's filters do not allow it.",
    "tunnel:pair_nominated": "ICE selected this pair of addresses for the connection.",
    "tunnel:path_changed": "An established connection moved to another path.",
    "tunnel:relay_allocated": "A relay gave this host an address.",
    "tunnel:relay_failed": "A relay can't be used.",
    "twisted:failed": "An error that only Twisted noticed: a bug.",
    "twisted:logged": "A message of Twisted's.",
    "twisted:warned": "A warning of Twisted's or Python's.",
    "udp:bound": "A UDP socket is open. Peers connect most easily if its port is the preferred one.",
    "udp:closed": "The counters of a UDP socket at its end.",
    "udp:receive_failed": "Receiving failed.",
    "udp:send_failed": "A datagram could not be sent.",
    "udp:sending_forbidden": "A local firewall refuses some of our datagrams.",
    "udp:unreachable": "A datagram could not be sent, because its destination is unreachable from here.",
}

_HEAD = (
    "# Log messages",
    "`make docs` generates this page from the source. With `--log-format json` each message is a JSON object with "
    "`timestamp`, `level`, `message_type` and the fields below. A field whose value is unknown is absent.",
    "`cid`, `gid` and `rid` are the ids of a client, a gateway and a resource. `client`, `gateway`, `resource`, `site` "
    "and `actor` are the names that the portal sends for them; Firezone's own portal sends no names of clients.",
    "A *limited* message is logged at most once a minute for each resource, "
    "client or error. Its field `suppressed` counts those left out since, which are logged at DEBUG. Messages that "
    "report a bug have a field `traceback`, and those of a relay's worker a field `worker`.",
)


@attrs.define
class MessageType:
    """What the calls say about a message type, in the order of the source."""

    levels: dict[str, None] = attrs.Factory(dict)
    roles: dict[str, None] = attrs.Factory(dict)
    fields: dict[str, None] = attrs.Factory(dict)


def page() -> str:
    """The whole page in Markdown."""
    found = message_types()
    parts = list(_HEAD)
    for area in sorted({name.partition(":")[0] for name in found}):
        rows = [_row(name, found[name]) for name in sorted(found) if name.startswith(f"{area}:")]
        parts += [
            f"## {area}",
            "\n".join(["| type | level | roles | meaning | fields |", "|---|---|---|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def message_types() -> dict[str, MessageType]:
    """All message types that the source logs.

    Raises: KeyError, if a call passes `**fields` or `details` that `_EXPANSIONS` lacks.
    """
    found: dict[str, MessageType] = {}
    for path, tree in _modules():
        for name, level, fields in _messages(tree):
            message = found.setdefault(name, MessageType())
            message.levels[level] = None
            message.roles[_roles(path)] = None
            message.fields |= dict.fromkeys(fields)
    return found


def mentioned() -> set[str]:
    """All texts in the source that look like a message type, logged by whatever call."""
    nodes = (node for _, tree in _modules() for node in ast.walk(tree))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    areas = {name.partition(":")[0] for name in MEANINGS}
    return {text for text in texts if _TYPE.fullmatch(text) and text.partition(":")[0] in areas}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """Each module outside the core, which doesn't log, with its path in the package."""
    for path in sorted(_PACKAGE.rglob("*.py")):
        relative = path.relative_to(_PACKAGE).with_suffix("").as_posix()
        if not relative.startswith("core/"):
            yield relative, ast.parse(path.read_text())


def _messages(tree: ast.Module) -> Iterator[tuple[str, str, list[str]]]:
    """Message type, level and fields of each call that logs."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=level, value=target), args=[ast.Constant(value=str(name)), *_]) if (
                level in _LEVELS and _TYPE.fullmatch(name)
            ):
                is_limited = ast.unparse(target).endswith("limiter")
                fields = [field for keyword in node.keywords for field in _fields(keyword) if field != "key"]
                yield name, f"{level}, limited" if is_limited else level, fields + ["suppressed"] * is_limited
            case ast.Call(func=ast.Name(id="Boundary"), args=[ast.Constant(value=str(name))]):
                yield name, "error, limited", list(_BOUNDARY)
            case ast.Dict(keys=[ast.Constant(value="message_type"), ast.Constant(value="level")]):
                name, level = (ast.literal_eval(value) for value in node.values)
                yield name, level, ["count"]


def _fields(keyword: ast.keyword) -> tuple[str, ...]:
    if keyword.arg is None or keyword.arg == "details":
        return _EXPANSIONS[ast.unparse(keyword.value)]
    return (keyword.arg,)


def _roles(path: str) -> str:
    return _ROLES[max((prefix for prefix in _ROLES if f"{path}/".startswith(f"{prefix}/")), key=len)]


def _row(name: str, message: MessageType) -> str:
    fields = ", ".join(field if field.startswith("…") else f"`{field}`" for field in message.fields)
    roles = dict.fromkeys(role for roles in message.roles for role in roles.split(", "))
    cells = (f"`{name}`", "; ".join(message.levels), ", ".join(roles), MEANINGS[name], fields)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())

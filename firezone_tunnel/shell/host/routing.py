"""The rules and routes that lead packets into the tunnel. docs/protocol/data-plane.md, 8."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.errors import InUseError
from firezone_tunnel.shell.host.link import TunnelLink
from firezone_tunnel.shell.host.parts import Aspect, Change, HostState, Part
from firezone_tunnel.shell.host.rtnetlink import EXISTS, FAMILIES, GONE, RtNetlink
from firezone_tunnel.shell.host.tables import FIREZONE_MARK, ROUTE_PROTOCOL, TABLES, USER_TABLE, Table

_NAMES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


class TunnelRules(Part):
    """A rule for each family that works: unmarked packets look into our table before the main table."""

    watches = Aspect.RULES

    def __init__(self, netlink: RtNetlink, link: TunnelLink) -> None:
        self._netlink = netlink
        self._link = link

    def needs(self, state: HostState) -> object:
        return self._link.families

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        changes: list[Change] = []
        for family, is_wanted in zip(FAMILIES, self._link.families, strict=True):
            wanted = _rule(family, USER_TABLE)
            present = [_arguments(rule, family) for rule in self._own(family)]
            changes += [self._change("del", rule) for rule in present if rule != wanted or not is_wanted]
            if is_wanted and wanted not in present:
                changes.append(self._change("add", wanted))
        return changes

    def remove(self) -> None:
        """Rules of a process that was killed are among ours."""
        for family in FAMILIES:
            for rule in self._own(family):
                self._netlink.request("rule", "del", tolerated=GONE, **_arguments(rule, family))

    def _own(self, family: int) -> list[Any]:
        rules = self._netlink.dump("rule", family=family)
        return [rule for rule in rules if rule.get("FRA_PROTOCOL") == ROUTE_PROTOCOL]

    def _change(self, command: str, rule: dict[str, Any]) -> Change:
        failure = self._netlink.request("rule", command, tolerated=GONE | EXISTS, **rule)
        name = f"the {_NAMES[rule['family']]} rule of priority {rule['priority']}"
        item = name if command == "add" else f"no second rule like {name}"
        return Change(item, None if failure is None else failure.strerror)


class TunnelRoutes(Part):
    """Exactly the wanted routes in our table.

    The table is read only after another program may have changed it: reading 10,000 routes takes half a second.
    """

    watches = Aspect.ROUTES | Aspect.LINK  # the kernel deletes routes silently with an address or when a link is down

    def __init__(self, netlink: RtNetlink, link: TunnelLink) -> None:
        self._netlink = netlink
        self._link = link
        self._present: dict[Network, int | None] | None = None  # with the interface's index; None: never read
        self._kept: tuple[Network, ...] | None = None  # the routes that are right; None: not known

    def needs(self, state: HostState) -> object:
        return state.routes, self._link.families

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        works = {4: self._link.families.ipv4, 6: self._link.families.ipv6}
        if not any(works.values()):
            return []
        index = self._link.index()
        wanted = state.routes if all(works.values()) else tuple(one for one in state.routes if works[one.version])
        if is_suspect or self._kept is None or self._present is None:
            self._present = self._first_look(index) if self._present is None else dict(self._read(USER_TABLE))
            added, networks = list(wanted), set(wanted)
            stale = [network for network, oif in self._present.items() if network not in networks or oif != index]
        else:
            added, removed = _difference(self._kept, wanted)
            stale = [network for network in removed if network in self._present]
        changes = [self._change("del", network, self._present[network]) for network in stale]
        changes += [self._change("add", network, index) for network in added if network not in self._present]
        self._kept = wanted if all(change.failure is None for change in changes) else None
        return changes

    def remove(self) -> None:
        for table in TABLES:
            for network, oif in list(self._read(table, own=True)):
                self._request("del", network, oif, table)
        self._present = self._kept = None

    def _first_look(self, index: int) -> dict[Network, int | None]:
        """
        Raises: InUseError, if the routes belong to another program's tunnel.
        """
        present = dict(self._read(USER_TABLE))
        for other in present.values():
            if other is not None and other != index:
                raise InUseError(
                    f"The routing table {USER_TABLE.number:#x} is in use by the interface {_name(other)}: "
                    "stop the other Firezone program on this host first"
                )
        return present

    def _read(self, table: Table, *, own: bool = False) -> Iterator[tuple[Network, int | None]]:
        for family in FAMILIES:
            for message in self._netlink.dump("route", family=family, table=table.number):
                if message.get("RTA_TABLE") != table.number or message["type"] != _RTN_UNICAST:
                    continue
                if own and message["proto"] != ROUTE_PROTOCOL:
                    continue
                base = message.get("RTA_DST") or ("::" if family == socket.AF_INET6 else "0.0.0.0")
                yield ipaddress.ip_network((base, message["dst_len"])), message.get("RTA_OIF")

    def _change(self, command: str, network: Network, oif: int | None) -> Change:
        assert self._present is not None
        failure = self._request(command, network, oif, USER_TABLE)
        if failure is None and command == "add":
            self._present[network] = oif
        elif failure is None:
            del self._present[network]
        item = f"the route {network}" if command == "add" else f"no route {network}"
        return Change(item, None if failure is None else failure.strerror)

    def _request(self, command: str, network: Network, oif: int | None, table: Table) -> OSError | None:
        family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
        route: dict[str, Any] = {"dst": str(network), "oif": oif, "table": table.number, "family": family}
        if command == "del":
            return self._netlink.request("route", "del", tolerated=GONE, **route, scope=_RT_SCOPE_NOWHERE)
        route |= {"proto": ROUTE_PROTOCOL, "scope": _RT_SCOPE_UNIVERSE}
        return self._netlink.request("route", "add", tolerated=EXISTS, **route)


_RTN_UNICAST = 1  # <linux/rtnetlink.h>
_RT_SCOPE_UNIVERSE = 0
_RT_SCOPE_NOWHERE = 255  # in a deletion this matches any scope
_FIB_RULE_INVERT = 2  # <linux/fib_rules.h>


def _difference(before: tuple[Network, ...], after: tuple[Network, ...]) -> tuple[list[Network], list[Network]]:
    """The networks added and those removed. Most are the same objects, and comparing these is ten times as fast."""
    known, wanted = {id(network) for network in before}, {id(network) for network in after}
    added = [network for network in after if id(network) not in known]
    removed = [network for network in before if id(network) not in wanted]
    return added, [network for network in removed if network not in added]


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"number {index}"


def _rule(family: int, table: Table) -> dict[str, Any]:
    return {
        "family": family,
        "table": table.number,
        "priority": table.priority,
        "fwmark": FIREZONE_MARK,
        "flags": _FIB_RULE_INVERT,
        "protocol": ROUTE_PROTOCOL,
    }


def _arguments(rule: Any, family: int) -> dict[str, Any]:
    """The arguments to add or delete a rule of the kernel."""
    return {
        "family": family,
        "table": rule.get("FRA_TABLE"),
        "priority": rule.get("FRA_PRIORITY") or 0,
        "fwmark": rule.get("FRA_FWMARK"),
        "flags": rule["flags"] & _FIB_RULE_INVERT,
        "protocol": rule.get("FRA_PROTOCOL"),
    }

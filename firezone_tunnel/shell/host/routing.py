"""The rules and routes that lead packets into the tunnel. docs/protocol/data-plane.md, 8."""

from __future__ import annotations

import socket
from typing import Any

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.errors import InUseError
from firezone_tunnel.shell.host.link import TunnelLink
from firezone_tunnel.shell.host.parts import Aspect, Change, HostState, Part
from firezone_tunnel.shell.host.route_socket import RouteSocket
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
        return _change(item, failure)


class TunnelRoutes(Part):
    """Exactly the wanted routes in our table.

    The table is read only after another program may have changed it.
    """

    watches = Aspect.ROUTES | Aspect.LINK  # the kernel deletes routes silently with an address or when a link is down

    def __init__(self, routes: RouteSocket, link: TunnelLink) -> None:
        self._socket = routes
        self._link = link
        self._present: dict[Network, int] | None = None  # with the interface's index; None: never read
        self._kept: tuple[Network, ...] | None = None  # the routes that are right; None: not known

    def needs(self, state: HostState) -> object:
        return state.routes, self._link.families

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        """
        Raises: InUseError, if the routes belong to another program's tunnel; PlatformError.
        """
        works = {4: self._link.families.ipv4, 6: self._link.families.ipv6}
        if not any(works.values()):
            return []
        index = self._link.index()
        wanted = state.routes if all(works.values()) else tuple(one for one in state.routes if works[one.version])
        if is_suspect or self._kept is None or self._present is None:
            self._present = self._first_look(index) if self._present is None else self._socket.read(USER_TABLE.number)
            added, networks = list(wanted), set(wanted)
            stale = [network for network, oif in self._present.items() if network not in networks or oif != index]
        else:
            added, removed = _difference(self._kept, wanted)
            stale = [network for network in removed if network in self._present]
        self._kept = None
        changes = self._delete(stale, self._present)
        changes += self._add([network for network in added if network not in self._present], index, self._present)
        self._kept = wanted if all(change.failure is None for change in changes) else None
        return changes

    def remove(self) -> None:
        for table in TABLES:
            self._socket.delete(list(self._socket.read(table.number, only_own=True).items()), table.number)
        self._present = self._kept = None

    def _first_look(self, index: int) -> dict[Network, int]:
        present = self._socket.read(USER_TABLE.number)
        for other in present.values():
            if other != index:
                raise InUseError(
                    f"The routing table {USER_TABLE.number:#x} is in use by the interface {_name(other)}: "
                    "stop the other Firezone program on this host first"
                )
        return present

    def _add(self, networks: list[Network], index: int, present: dict[Network, int]) -> list[Change]:
        errors = self._socket.add([(network, index) for network in networks], USER_TABLE.number)
        present.update({network: index for network, error in zip(networks, errors, strict=True) if error is None})
        return [_change(f"the route {network}", error) for network, error in zip(networks, errors, strict=True)]

    def _delete(self, networks: list[Network], present: dict[Network, int]) -> list[Change]:
        errors = self._socket.delete([(network, present[network]) for network in networks], USER_TABLE.number)
        for network, error in zip(networks, errors, strict=True):
            if error is None:
                del present[network]
        return [_change(f"no route {network}", error) for network, error in zip(networks, errors, strict=True)]


def _change(item: str, error: OSError | None) -> Change:
    return Change(item, None if error is None else error.strerror)


_FIB_RULE_INVERT = 2  # <linux/fib_rules.h>


def _difference(before: tuple[Network, ...], after: tuple[Network, ...]) -> tuple[list[Network], list[Network]]:
    """The networks added and those removed. Most are the same objects, and comparing these is ten times as fast."""
    known, wanted = {id(network) for network in before}, {id(network) for network in after}
    added = [network for network in after if id(network) not in known]
    removed = [network for network in before if id(network) not in wanted]
    present = set(added)
    return added, [network for network in removed if network not in present]


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

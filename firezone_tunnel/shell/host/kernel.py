"""Configure links, addresses, routes and rules of this network namespace over rtnetlink. All calls block.

pyroute2 runs its own asyncio loop, so it can't be used in the reactor's thread. The first call imports it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.addresses import Address, HostSnapshot, Link, Route
from firezone_tunnel.shell.host.sources import internet_sources
from firezone_tunnel.shell.logs import events as log

FIREZONE_MARK = 0xFD002021  # docs/protocol/data-plane.md, 8: what carries it uses the main table

TUNNEL_MTU = 1280
TUNNEL_QUEUE = 128  # in super-packets; a longer queue only adds delay


class Table(NamedTuple):
    """A routing table for all unmarked packets, and the priority of the rule that selects it."""

    number: int
    priority: int


USER_TABLE = Table(0x2021FD00, 100)  # docs/protocol/data-plane.md, 8
LINK_SCOPE_TABLE = Table(0x2021FD01, 200)
INTERNET_TABLE = Table(0x2021FD02, 300)
TABLES = (USER_TABLE, LINK_SCOPE_TABLE, INTERNET_TABLE)


class Families(NamedTuple):
    """A flag for each IP version."""

    ipv4: bool
    ipv6: bool


class Kernel:
    """One rtnetlink socket, opened by the first call. Must be used from one thread only."""

    def __init__(self) -> None:
        self._route: Any = None

    def close(self) -> None:
        if self._route is not None:
            self._route.close()
            self._route = None

    def configure_link(self, name: str, *, ipv4: str | None, ipv6: str | None, mtu: int, txqueuelen: int) -> Families:
        """Set exactly these addresses on the interface and bring it up. Returns the families that work.

        Raises: PlatformError, if the interface does not exist or neither family works.
        """
        route = self._open()
        index = self._index(name)
        # This comes before the interface is up: otherwise the kernel adds a link-local address, which can't be
        # removed while duplicate address detection is running.
        _request(route.link, "set", index=index, IFLA_AF_SPEC=_NO_LINK_LOCAL, tolerated=_NO_IPV6)
        for message in [message for message in _dump(route.addr) if message["index"] == index]:
            _request(route.addr, "del", **_same_address(message), tolerated=_GONE)
        failure = _request(route.link, "set", index=index, mtu=mtu, txqlen=txqueuelen)
        families = Families(self._add_address(index, ipv4), self._add_address(index, ipv6))
        failure = _request(route.link, "set", index=index, state="up") or failure
        if failure is not None:
            raise PlatformError(f"Can't bring up the network interface {name}: {failure.strerror}")
        if not any(families):
            raise PlatformError(
                f"Can't add the address {' or '.join(filter(None, (ipv4, ipv6)))} to the network interface {name}: "
                "check that the host supports IPv4 or IPv6"
            )
        return families

    def set_rules(self, families: Families, table: Table = USER_TABLE) -> None:
        """Look up all unmarked packets in `table` before the main table. Rules that can't be added are logged."""
        for family, wanted in zip(_FAMILIES, families, strict=True):
            if not wanted:
                continue
            failure = _request(self._open().rule, "add", **_rule(family, table), tolerated=_EXISTS)
            if failure is not None:
                log.warning("netlink:rule_failed", table=table.number, reason=failure.strerror)

    def set_routes(self, name: str, routes: Iterable[str], table: Table = USER_TABLE) -> None:
        """Make these the only routes in `table`, all through the interface. Routes that can't be changed are logged.

        Raises: PlatformError, if the interface does not exist.
        """
        index = self._index(name)
        wanted = {ipaddress.ip_network(route, strict=False): index for route in routes}
        known = dict(self._routes(table))
        failures: list[OSError | None] = []
        for network, oif in known.items():
            if wanted.get(network) != oif:
                failures.append(self._change_route("del", network, oif, table))
        for network in wanted:
            if known.get(network) != index:
                failures.append(self._change_route("add", network, index, table))
        failed = [failure for failure in failures if failure is not None]
        if failed:
            log.warning("netlink:routes_failed", count=len(failed), reason=failed[0].strerror)

    def remove_everything(self) -> int:
        """Delete our rules and all routes in our tables. Returns the number of rules and routes deleted.

        The kernel deletes routes together with their interface.
        """
        removed = 0
        for table in TABLES:
            for family in _FAMILIES:
                rules = [rule for rule in _dump(self._open().rule, family=family) if _leads_to(rule, table)]
                for rule in rules:
                    removed += _request(self._open().rule, "del", **_same_rule(rule, family, table)) is None
            for network, oif in list(self._routes(table)):
                removed += self._change_route("del", network, oif, table) is None
        return removed

    def snapshot(self) -> HostSnapshot:
        """The current links, addresses, default routes of the main table, and sources of our own datagrams."""
        route = self._open()
        return HostSnapshot(
            links=tuple(_link(message) for message in _dump(route.link)),
            addresses=tuple(_address(message) for message in _dump(route.addr)),
            default_routes=tuple(self._default_routes()),
            sources=tuple(internet_sources(FIREZONE_MARK)),
        )

    def _open(self) -> Any:
        if self._route is None:
            from pyroute2.iproute.linux import IPRoute

            self._route = IPRoute(strict_check=True)  # the kernel filters dumps by table
        return self._route

    def _index(self, name: str) -> int:
        for message in _dump(self._open().link):
            if message.get("IFLA_IFNAME") == name:
                return int(message["index"])
        raise PlatformError(f"Network interface {name} not found: it may have been deleted by another program")

    def _add_address(self, index: int, host: str | None) -> bool:
        if host is None:
            return False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        length = 128 if ":" in host else 32
        failure = _request(
            *(self._open().addr, "add"), index=index, address=host, prefixlen=length, family=family, flags=_IFA_F_NODAD
        )
        if failure is not None:
            log.info("netlink:address_failed", host=host, reason=failure.strerror)
        return failure is None

    def _routes(self, table: Table) -> Iterator[tuple[_Network, int | None]]:
        for family in _FAMILIES:
            for message in _dump(self._open().route, family=family, table=table.number):
                if message.get("RTA_TABLE") == table.number and message["type"] == _RTN_UNICAST:
                    base = message.get("RTA_DST") or ("::" if family == socket.AF_INET6 else "0.0.0.0")
                    yield ipaddress.ip_network((base, message["dst_len"])), message.get("RTA_OIF")

    def _change_route(self, command: str, network: _Network, oif: int | None, table: Table) -> OSError | None:
        family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
        where: dict[str, Any] = {"dst": str(network), "oif": oif, "table": table.number, "family": family}
        if command == "del":
            return _request(self._open().route, "del", **where, scope=_RT_SCOPE_NOWHERE, tolerated=_GONE)
        where |= {"proto": _RTPROT_STATIC, "scope": _RT_SCOPE_UNIVERSE}
        return _request(self._open().route, "add", **where, tolerated=_EXISTS)

    def _default_routes(self) -> Iterator[Route]:
        for family in _FAMILIES:
            for message in _dump(self._open().route, family=family, table=_MAIN_TABLE):
                if message["dst_len"] or message["type"] != _RTN_UNICAST or message.get("RTA_TABLE") != _MAIN_TABLE:
                    continue
                # Only the first hop of a multipath route counts.
                hop = (message.get("RTA_MULTIPATH") or [message])[0]
                via = hop.get("RTA_VIA") or {}
                yield Route(
                    link=hop.get("RTA_OIF") or hop["oif"],
                    is_ipv6=family == socket.AF_INET6,
                    next_hop=hop.get("RTA_GATEWAY") or via.get("addr"),
                    preferred_source=message.get("RTA_PREFSRC"),
                    metric=message.get("RTA_PRIORITY") or 0,
                )


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FAMILIES = (socket.AF_INET, socket.AF_INET6)

_EXISTS = frozenset({errno.EEXIST, errno.EOPNOTSUPP})  # EOPNOTSUPP: the host doesn't support this family
_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})
_NO_IPV6 = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EINVAL})
_NOTHING_TO_DUMP = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT})  # ENOENT: the table is empty

_MAIN_TABLE = 254  # <linux/rtnetlink.h>
_RTN_UNICAST = 1
_RTPROT_STATIC = 4
_RT_SCOPE_UNIVERSE = 0
_RT_SCOPE_NOWHERE = 255  # in a deletion this matches any scope
_RTPROT_KERNEL = 2
_FIB_RULE_INVERT = 2  # <linux/fib_rules.h>
_NO_LINK_LOCAL = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]}  # <linux/if_link.h>

_IFF_UP = 0x1  # <linux/if.h>
_IFF_LOOPBACK = 0x8
_IFF_RUNNING = 0x40
_IFA_F_TEMPORARY = 0x01  # <linux/if_addr.h>; for IPv4 this bit means secondary
_IFA_F_NODAD = 0x02
_IFA_F_DADFAILED = 0x08
_IFA_F_DEPRECATED = 0x20
_IFA_F_TENTATIVE = 0x40

_DUMP_ATTEMPTS = 5  # the kernel interrupts a dump when the configuration changes meanwhile


def _request(
    function: Callable[..., Any], command: str, *, tolerated: frozenset[int] = frozenset(), **arguments: Any
) -> OSError | None:
    """Request a change from the kernel. Returns the error, or None if it succeeded or the error is tolerated."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        function(command, **arguments)
    except NetlinkError as error:
        return None if error.code in tolerated else OSError(error.code, os.strerror(error.code))
    return None


def _dump(function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """All entries, or an empty list if the kernel doesn't have the family or table.

    Raises: PlatformError.
    """
    from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

    for _ in range(_DUMP_ATTEMPTS):
        try:
            return list(function("dump", **arguments))
        except NetlinkDumpInterrupted:
            continue
        except NetlinkError as error:
            if error.code in _NOTHING_TO_DUMP:
                return []
            raise PlatformError(f"Can't read the host's network configuration: {os.strerror(error.code)}") from error
    raise PlatformError(
        f"Can't read the host's network configuration: it changed during each of {_DUMP_ATTEMPTS} attempts; try again"
    )


def _rule(family: int, table: Table) -> dict[str, Any]:
    return {
        "family": family,
        "table": table.number,
        "priority": table.priority,
        "fwmark": FIREZONE_MARK,
        "flags": _FIB_RULE_INVERT,
        "protocol": _RTPROT_KERNEL,
    }


def _leads_to(rule: Any, table: Table) -> bool:
    return bool(rule.get("FRA_TABLE") == table.number and rule.get("FRA_FWMARK") == FIREZONE_MARK)


def _same_rule(rule: Any, family: int, table: Table) -> dict[str, Any]:
    """Arguments to delete this rule, with its own priority and protocol, as another version may have set others."""
    own = {"priority": rule.get("FRA_PRIORITY") or 0, "protocol": rule.get("FRA_PROTOCOL") or 0}
    return _rule(family, table) | own


def _same_address(message: Any) -> dict[str, Any]:
    host = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
    return {
        "index": message["index"],
        "address": host,
        "prefixlen": message["prefixlen"],
        "family": message["family"],
    }


def _link(message: Any) -> Link:
    flags = message["flags"]
    return Link(
        index=message["index"],
        name=message.get("IFLA_IFNAME"),
        is_up=flags & (_IFF_UP | _IFF_RUNNING) == _IFF_UP | _IFF_RUNNING,
        is_loopback=bool(flags & _IFF_LOOPBACK),
    )


def _address(message: Any) -> Address:
    flags = message.get("IFA_FLAGS") or message["flags"]
    is_ipv6 = message["family"] == socket.AF_INET6
    return Address(
        link=message["index"],
        host=message.get("IFA_LOCAL") or message.get("IFA_ADDRESS"),
        is_deprecated=bool(flags & _IFA_F_DEPRECATED),
        is_tentative=bool(flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED)),
        is_temporary=is_ipv6 and bool(flags & _IFA_F_TEMPORARY),
    )

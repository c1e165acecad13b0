"""Read the host's links, addresses and uplinks. All calls block."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

from firezone_tunnel.shell.host.addresses import Address, HostSnapshot, Link, Route
from firezone_tunnel.shell.host.rtnetlink import RtNetlink
from firezone_tunnel.shell.host.tables import FIREZONE_MARK


def read_snapshot(netlink: RtNetlink) -> HostSnapshot:
    """The current links and addresses, and the route that our marked packets to the internet take in each family.

    Raises: PlatformError.
    """
    return HostSnapshot(
        links=tuple(_link(message) for message in netlink.dump("link")),
        addresses=tuple(_address(message) for message in netlink.dump("addr")),
        default_routes=tuple(_default_routes(netlink)),
    )


def read_hosts() -> tuple[str, ...]:
    """All addresses of this host as they are now.

    Raises: PlatformError.
    """
    netlink = RtNetlink()
    try:
        return tuple(_address(message).host for message in netlink.dump("addr"))
    finally:
        netlink.close()


# Two root name servers. The kernel only looks up the route: a table can hold 900,000 routes, and VPNs and other
# rules decide, too.
_FAR_AWAY = {socket.AF_INET: "193.0.14.129", socket.AF_INET6: "2001:7fd::1"}
_NO_ROUTE = frozenset(
    {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.EAFNOSUPPORT}
)
_RTM_F_FIB_MATCH = 0x2000  # <linux/rtnetlink.h>: the route itself, not the path that it gives
_RTN_UNICAST = 1

_IFF_UP = 0x1  # <linux/if.h>
_IFF_LOOPBACK = 0x8
_IFF_RUNNING = 0x40
_IFA_F_TEMPORARY = 0x01  # <linux/if_addr.h>; for IPv4 this bit means secondary
_IFA_F_DADFAILED = 0x08
_IFA_F_DEPRECATED = 0x20
_IFA_F_TENTATIVE = 0x40


def _default_routes(netlink: RtNetlink) -> Iterator[Route]:
    for family, host in _FAR_AWAY.items():
        message = netlink.get(
            "route", tolerated=_NO_ROUTE, family=family, dst=host, mark=FIREZONE_MARK, flags=_RTM_F_FIB_MATCH
        )
        if message is None or message["type"] != _RTN_UNICAST:
            continue
        # Only the first hop of a multipath route counts.
        hop = (message.get("RTA_MULTIPATH") or [message])[0]
        via = hop.get("RTA_VIA") or {}
        yield Route(
            link=hop.get("RTA_OIF") or hop["oif"],
            is_ipv6=family == socket.AF_INET6,
            next_hop=hop.get("RTA_GATEWAY") or via.get("addr"),
            preferred_source=message.get("RTA_PREFSRC"),
        )


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

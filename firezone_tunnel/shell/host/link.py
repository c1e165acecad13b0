"""The tunnel's interface: up, with exactly its addresses, its MTU and its queue."""

from __future__ import annotations

import errno
import socket
from typing import Any

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.parts import Aspect, Change, HostState, Part
from firezone_tunnel.shell.host.rtnetlink import EXISTS, GONE, NO_IPV6, Families, RtNetlink
from firezone_tunnel.shell.logs import events as log

TUNNEL_MTU = 1280
TUNNEL_QUEUE = 1000  # packets or super-packets: a burst of datagrams, until `tun.transport` reads them


class TunnelLink(Part):
    """The interface. `families` are those that work on it since the last `put_right`."""

    watches = Aspect.LINK

    def __init__(self, netlink: RtNetlink, interface: str, *, mtu: int = TUNNEL_MTU, queue: int = TUNNEL_QUEUE) -> None:
        """`queue` is in packets."""
        self._netlink = netlink
        self._interface = interface
        self._mtu = mtu
        self._queue = queue
        self.families = Families(ipv4=False, ipv6=False)
        self._refused: dict[str, str] = {}  # by address, why the kernel doesn't accept it
        self._accepted: set[str] = set()

    def index(self) -> int:
        """
        Raises: PlatformError, if the interface does not exist.
        """
        try:
            return socket.if_nametoindex(self._interface)
        except OSError as error:
            raise PlatformError(
                f"Network interface {self._interface} not found: it may have been deleted by another program"
            ) from error

    def needs(self, state: HostState) -> object:
        return state.ipv4, state.ipv6

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        """
        Raises: PlatformError, if the interface does not exist, can't be set up, or no address can be added.
        """
        wanted = [host for host in (state.ipv4, state.ipv6) if host is not None]
        if not wanted:
            self.families = Families(ipv4=False, ipv6=False)
            return []
        index = self.index()
        link = self._netlink.get("link", tolerated=_NO_LINK, index=index)
        if link is None:
            raise PlatformError(f"Network interface {self._interface} was deleted by another program")
        changes = self._set_up(link)
        present = self._addresses(index)
        for host in [host for host in present if host not in wanted]:
            self._netlink.request("addr", "del", tolerated=GONE, **present[host])
            changes.append(Change(f"{self._interface} without the address {host}"))
        for host in [host for host in wanted if host not in present]:
            changes += self._add_address(index, host)
        self.families = Families(*(host is not None and host not in self._refused for host in (state.ipv4, state.ipv6)))
        if not any(self.families):
            reasons = ", ".join(dict.fromkeys(self._refused.values()))
            raise PlatformError(
                f"Can't add the address {' or '.join(wanted)} to the network interface {self._interface} ({reasons}): "
                "check that the host supports IPv4 or IPv6"
            )
        return changes

    def remove(self) -> None:
        """The kernel deletes addresses together with the interface."""

    def _set_up(self, link: Any) -> list[Change]:
        index, is_up = link["index"], bool(link["flags"] & _IFF_UP)
        changes: list[Change] = []
        if not is_up:
            # Before the interface is up: otherwise the kernel adds a link-local address, which can't be removed while
            # duplicate address detection is running.
            self._netlink.request("link", "set", tolerated=NO_IPV6, index=index, IFLA_AF_SPEC=_NO_LINK_LOCAL)
        is_sized = link.get("IFLA_MTU") == self._mtu and link.get("IFLA_TXQLEN") == self._queue
        failure = None
        if not is_sized:
            failure = self._netlink.request("link", "set", index=index, mtu=self._mtu, txqlen=self._queue)
            changes.append(Change(f"the MTU {self._mtu} of {self._interface}"))
        if not is_up:
            failure = self._netlink.request("link", "set", index=index, state="up") or failure
            changes.append(Change(f"{self._interface} up"))
        if failure is not None:
            raise PlatformError(f"Can't bring up the network interface {self._interface}: {failure.strerror}")
        return changes

    def _addresses(self, index: int) -> dict[str, dict[str, Any]]:
        """The interface's addresses, with the arguments to delete each. One with another prefix isn't ours."""
        found: dict[str, dict[str, Any]] = {}
        for message in self._netlink.dump("addr", index=index):
            if message["index"] != index:  # kernels before 4.20 don't filter
                continue
            host = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            length = message["prefixlen"]
            key = host if length == _length(host) else f"{host}/{length}"
            found[key] = {"index": index, "address": host, "prefixlen": length, "family": message["family"]}
        return found

    def _add_address(self, index: int, host: str) -> list[Change]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        failure = self._netlink.request(
            *("addr", "add"),
            tolerated=EXISTS,
            index=index,
            address=host,
            prefixlen=_length(host),
            family=family,
            flags=_IFA_F_NODAD,
        )
        item = f"the address {host} of {self._interface}"
        if failure is None:
            self._refused.pop(host, None)
            self._accepted.add(host)
            return [Change(item)]
        reason = str(failure.strerror)
        if self._refused.get(host) != reason:
            self._refused[host] = reason
            log.info("netlink:address_failed", host=host, reason=reason)
        # A host may lack a family from the start. One that it has lost is a fault.
        return [Change(item, reason)] if host in self._accepted else []


_NO_LINK = frozenset({errno.ENODEV})
_IFF_UP = 0x1  # <linux/if.h>
_IFA_F_NODAD = 0x02  # <linux/if_addr.h>
_NO_LINK_LOCAL = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]}  # <linux/if_link.h>


def _length(host: str) -> int:
    return 128 if ":" in host else 32

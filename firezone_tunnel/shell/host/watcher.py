"""Watch the host's network configuration: links, addresses, routes, rules, settings and nftables.

The kernel's notifications only say that something may have changed. Whoever is called observes the kernel again.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.shell.host.netlink import Message, attributes, messages
from firezone_tunnel.shell.host.parts import EVERYTHING, Aspect
from firezone_tunnel.shell.host.tables import TABLES
from firezone_tunnel.shell.logs import events as log

Noticed = Callable[[Aspect, str | None], object]
"""Called with the aspects that may have changed, and the program that changed them, as far as it is known."""


class NetworkWatcher:
    """Calls `noticed` in the reactor's thread when this network namespace may have changed."""

    def __init__(
        self,
        reactor: IReactorFDSet,
        noticed: Noticed,
        *,
        own_link: str,
        own_ports: Callable[[], Container[int | None]] = tuple,
    ) -> None:
        """`own_ports` gives the netlink ports of our own changes, which are not reported.

        Raises: OSError.
        """
        try:
            own_index = socket.if_nametoindex(own_link)
        except OSError:
            own_index = 0

        def changed(message: Message) -> Change:
            return routing_change(message, own_index=own_index, own_ports=own_ports())

        self._sources = [_Source(reactor, _NETLINK_ROUTE, _ROUTE_GROUPS, changed, noticed)]
        try:
            self._sources.append(
                _Source(reactor, _NETLINK_NETFILTER, _NFTABLES_GROUP, nftables_change, noticed, Aspect.NFTABLES)
            )
        except OSError as error:  # without nftables in the kernel
            log.debug("network:nftables_not_watched", reason=error.strerror)

    def close(self) -> None:
        """May be called more than once."""
        for source in self._sources:
            source.close()


class Change(NamedTuple):
    aspect: Aspect
    program: str | None = None


@implementer(IReadDescriptor)
class _Source:
    """One netlink socket."""

    def __init__(
        self,
        reactor: IReactorFDSet,
        protocol: int,
        groups: int,
        parse: Callable[[Message], Change],
        noticed: Noticed,
        everything: Aspect = EVERYTHING & ~Aspect.NFTABLES,
    ) -> None:
        """`everything` may have changed when notifications are lost.

        Raises: OSError.
        """
        self._reactor = reactor
        self._parse = parse
        self._noticed = noticed
        self._everything = everything
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket: socket.socket | None = socket.socket(socket.AF_NETLINK, kind, protocol)
        try:
            self._socket.bind((0, groups))
        except OSError:
            self._socket.close()
            raise
        reactor.addReader(self)

    def close(self) -> None:
        if self._socket is None:
            return
        self._reactor.removeReader(self)
        self._socket.close()
        self._socket = None

    def doRead(self) -> None:
        aspects, program = Aspect(0), None
        for data in self._datagrams():
            if data is None:
                aspects |= self._everything
                continue
            for message in messages(data):
                change = self._parse(message)
                aspects |= change.aspect
                program = change.program or program
        if aspects:
            self._noticed(aspects, program)

    def _datagrams(self) -> Iterator[memoryview | None]:
        """What can be read now, up to a limit; None where notifications were lost."""
        for _ in range(_MAX_DATAGRAMS):
            if self._socket is None:
                return
            try:
                yield memoryview(self._socket.recv(_DATAGRAM_SIZE))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def logPrefix(self) -> str:
        return "NetworkWatcher"


def routing_change(message: Message, *, own_index: int, own_ports: Container[int | None]) -> Change:
    """The change that a message of rtnetlink(7) reports."""
    kind, port, body = message.kind, message.port, message.body
    if port and port in own_ports:
        return Change(Aspect(0))
    if kind in _LINK_MESSAGES or kind in _ADDRESS_MESSAGES:
        if len(body) < _INDEX.size:
            return Change(Aspect(0))
        (index,) = _INDEX.unpack_from(body)
        is_own = index == own_index
        return Change(Aspect.LINK if is_own else Aspect.UPLINKS, _program(port) if is_own else None)
    if kind in _SETTING_MESSAGES:
        return Change(Aspect.SETTINGS)
    if kind in _RULE_MESSAGES:
        return Change(Aspect.RULES | Aspect.UPLINKS, _program(port))
    if kind in _ROUTE_MESSAGES and len(body) >= _ROUTE.size:
        family, length, table, _ = _ROUTE.unpack_from(body)
        if table == _RT_TABLE_COMPAT and _table(body[_ROUTE.size :]) in _OWN_TABLES:
            return Change(Aspect.ROUTES, _program(port))
        # Longer prefixes don't decide how the host reaches the internet, and there may be 900,000 of them.
        if length <= _LONGEST_DEFAULT.get(family, 0):
            return Change(Aspect.UPLINKS)
    return Change(Aspect(0))


def nftables_change(message: Message) -> Change:
    """The change that a message of nfnetlink's nftables reports. Each transaction ends with the program's name."""
    if message.kind != _NFT_MSG_NEWGEN:
        return Change(Aspect.NFTABLES)
    for attribute, value in attributes(message.body[_NFGENMSG_SIZE:]):
        if attribute == _NFTA_GEN_PROC_NAME:
            return Change(Aspect.NFTABLES, bytes(value).rstrip(b"\0").decode(errors="replace"))
    return Change(Aspect.NFTABLES)


_NETLINK_ROUTE = 0  # <linux/netlink.h>
_NETLINK_NETFILTER = 12
_MAX_DATAGRAMS = 64  # per reactor turn
_DATAGRAM_SIZE = 16384

_INDEX = struct.Struct("=4xi")  # of ifinfomsg and of ifaddrmsg
_ROUTE = struct.Struct("=BBxxBxxBxxxx")  # of rtmsg: family, prefix length, table, type

# <linux/rtnetlink.h>
_LINK_MESSAGES = frozenset({16, 17})
_ADDRESS_MESSAGES = frozenset({20, 21})
_ROUTE_MESSAGES = frozenset({24, 25})
_RULE_MESSAGES = frozenset({32, 33})
_SETTING_MESSAGES = frozenset({80, 81})  # netconf
_RTA_TABLE = 15
_RT_TABLE_COMPAT = 252  # the table's number doesn't fit, and is in an attribute
_OWN_TABLES = frozenset(table.number for table in TABLES)
_LONGEST_DEFAULT = {socket.AF_INET: 8, socket.AF_INET6: 16}  # VPNs split the default route in halves
# Link; address, route and rule of each family; netconf of each family.
_ROUTE_GROUPS = sum(1 << number - 1 for number in (1, 5, 7, 8, 9, 11, 19, 24, 25))

_NFTABLES_GROUP = 1 << 7 - 1  # <linux/netfilter/nfnetlink.h>
_NFT_MSG_NEWGEN = 10 << 8 | 15  # <linux/netfilter/nf_tables.h>
_NFTA_GEN_PROC_NAME = 3
_NFGENMSG_SIZE = 4


def _table(data: memoryview) -> int | None:
    for kind, value in attributes(data):
        if kind == _RTA_TABLE and len(value) == 4:
            return int.from_bytes(value, sys.byteorder)
    return None


def _program(port: int) -> str | None:
    """The program that owns a netlink port: the first socket of a process has the process's id (netlink(7))."""
    try:
        return Path(f"/proc/{port}/comm").read_text().strip() if port else None
    except OSError:  # it has ended, or this is not its first socket
        return None

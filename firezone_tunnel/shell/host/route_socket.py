"""Read and change many routes of one table over rtnetlink(7). All calls block.

pyroute2 takes 270 us for a change and 40 us to read a route, and holds the interpreter's lock meanwhile: with 10,000
resources that is seconds in which the tunnel waits. A request of this module takes a few microseconds.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from itertools import count

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.netlink import attributes, encode_attribute, encode_message, messages
from firezone_tunnel.shell.host.rtnetlink import FAMILIES
from firezone_tunnel.shell.host.tables import ROUTE_PROTOCOL

Route = tuple[Network, int]
"""A network, and the index of the interface that it leads to."""


class RouteSocket:
    """One rtnetlink socket, opened by the first call. Must be used from one thread only."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._numbers = count(1)
        self.port_id: int | None = None
        """The socket's port (netlink(7)), by which the kernel names it in notifications of its changes."""

    def close(self) -> None:
        """The next call opens a new socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def read(self, table: int, *, only_own: bool = False) -> dict[Network, int]:
        """The unicast routes of a table, each with its interface. `only_own`: those that this program made.

        Raises: PlatformError.
        """
        for _ in range(_ATTEMPTS):
            routes: dict[Network, int] = {}
            if all(self._read(family, table, only_own, routes) for family in FAMILIES):
                return routes
        raise PlatformError(f"Can't read the routes: they changed during each of {_ATTEMPTS} attempts; try again")

    def add(self, routes: Sequence[Route], table: int) -> list[OSError | None]:
        """Add routes. Returns an error or None for each; a route that exists is not an error.

        Raises: PlatformError, if the kernel doesn't answer.
        """
        return self._change(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_EXCL, routes, table, errno.EEXIST)

    def delete(self, routes: Sequence[Route], table: int) -> list[OSError | None]:
        """Delete routes. Returns an error or None for each; a route that does not exist is not an error.

        Raises: PlatformError, if the kernel doesn't answer.
        """
        return self._change(_RTM_DELROUTE, 0, routes, table, errno.ESRCH)

    def _change(
        self, kind: int, flags: int, routes: Sequence[Route], table: int, tolerated: int
    ) -> list[OSError | None]:
        errors: list[OSError | None] = []
        for first in range(0, len(routes), _AT_ONCE):
            errors += self._change_some(kind, flags, routes[first : first + _AT_ONCE], table, tolerated)
        return errors

    def _change_some(
        self, kind: int, flags: int, routes: Sequence[Route], table: int, tolerated: int
    ) -> list[OSError | None]:
        netlink = self._open()
        numbers = [next(self._numbers) for _ in routes]
        requests = (
            encode_message(kind, flags | _NLM_F_REQUEST | _NLM_F_ACK, number, _route(network, oif, table, kind))
            for number, (network, oif) in zip(numbers, routes, strict=True)
        )
        self._send(netlink, b"".join(requests))
        codes: dict[int, int] = {}
        while len(codes) < len(numbers):
            for answer in messages(self._receive(netlink)):
                if answer.kind == _NLMSG_ERROR and answer.number >= numbers[0]:
                    codes[answer.number] = -_ERROR.unpack_from(answer.body)[0]
        return [
            None if codes[number] in {0, tolerated} else OSError(codes[number], os.strerror(codes[number]))
            for number in numbers
        ]

    def _read(self, family: int, table: int, only_own: bool, routes: dict[Network, int]) -> bool:
        """Returns whether the dump is consistent."""
        netlink = self._open()
        number = next(self._numbers)
        body = _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + encode_attribute(_RTA_TABLE, _UINT.pack(table))
        self._send(netlink, encode_message(_RTM_GETROUTE, _NLM_F_REQUEST | _NLM_F_DUMP, number, body))
        is_consistent = True
        while True:
            for kind, flags, answered, _, entry in messages(self._receive(netlink)):
                if answered != number:
                    continue
                is_consistent = is_consistent and not flags & _NLM_F_DUMP_INTR
                if kind in {_NLMSG_DONE, _NLMSG_ERROR}:
                    _check_dump(entry)
                    return is_consistent
                if kind == _RTM_NEWROUTE and (found := _parse(entry, table, only_own)) is not None:
                    routes[found[0]] = found[1]

    def _open(self) -> socket.socket:
        if self._socket is None:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
            netlink.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)  # errors don't repeat the request
            netlink.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)  # the kernel filters dumps by table
            netlink.settimeout(_TIMEOUT)
            netlink.bind((0, 0))
            self.port_id = netlink.getsockname()[0]
            self._socket = netlink
        return self._socket

    def _send(self, netlink: socket.socket, data: bytes) -> None:
        try:
            netlink.sendto(data, (0, 0))
        except OSError as error:
            self.close()
            raise PlatformError(f"Can't ask the kernel for routes: {error.strerror or error}") from error

    def _receive(self, netlink: socket.socket) -> memoryview:
        try:
            return memoryview(netlink.recv(_RECEIVE_SIZE))
        except OSError as error:
            self.close()  # a late answer must not be taken for one to a later request
            raise PlatformError(f"The kernel does not answer about routes: {error.strerror or error}") from error


_ATTEMPTS = 5
_AT_ONCE = 64  # requests; their answers have room in the socket
_TIMEOUT = 10.0
_RECEIVE_SIZE = 65536

_ERROR = struct.Struct("=i")
_UINT = struct.Struct("=I")
_INT = struct.Struct("=i")
_RTMSG = struct.Struct("=BBBBBBBBI")
"""Family, prefix length, source length, TOS, table, protocol, scope, type, flags: <linux/rtnetlink.h>."""

_NETLINK_ROUTE = 0
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_GET_STRICT_CHK = 12
_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLM_F_DUMP_INTR = 0x10
_NLM_F_DUMP = 0x300
_NLM_F_EXCL = 0x200
_NLM_F_CREATE = 0x400
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_RTM_NEWROUTE = 24
_RTM_DELROUTE = 25
_RTM_GETROUTE = 26
_RTA_DST = 1
_RTA_OIF = 4
_RTA_TABLE = 15
_RTN_UNICAST = 1
_RT_SCOPE_UNIVERSE = 0
_RT_SCOPE_NOWHERE = 255  # in a deletion this matches any scope


def _route(network: Network, oif: int, table: int, kind: int) -> bytes:
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    is_new = kind == _RTM_NEWROUTE
    protocol, scope = (ROUTE_PROTOCOL, _RT_SCOPE_UNIVERSE) if is_new else (0, _RT_SCOPE_NOWHERE)
    return (
        _RTMSG.pack(family, network.prefixlen, 0, 0, 0, protocol, scope, _RTN_UNICAST, 0)
        + encode_attribute(_RTA_TABLE, _UINT.pack(table))
        + encode_attribute(_RTA_DST, network.network_address.packed)
        + encode_attribute(_RTA_OIF, _INT.pack(oif))
    )


def _check_dump(body: memoryview) -> None:
    """
    Raises: PlatformError, if the dump ended with an error.
    """
    code = -_ERROR.unpack_from(body)[0] if len(body) >= _ERROR.size else 0
    if code not in {0, errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT}:  # ENOENT: the table is empty
        raise PlatformError(f"Can't read the routes: {os.strerror(code)}")


def _parse(body: memoryview, table: int, only_own: bool) -> Route | None:
    """A unicast route of the table, or None."""
    family, length, _, _, _, protocol, _, kind, _ = _RTMSG.unpack_from(body)
    if kind != _RTN_UNICAST or (only_own and protocol != ROUTE_PROTOCOL):
        return None
    address, oif, found_table = b"", 0, 0
    for attribute, value in attributes(body[_RTMSG.size :]):
        if attribute == _RTA_DST:
            address = bytes(value)
        elif attribute == _RTA_OIF:
            (oif,) = _INT.unpack(value)
        elif attribute == _RTA_TABLE:
            (found_table,) = _UINT.unpack(value)
    if found_table != table:
        return None
    if family == socket.AF_INET:
        return ipaddress.IPv4Network((address or bytes(4), length)), oif
    return ipaddress.IPv6Network((address or bytes(16), length)), oif

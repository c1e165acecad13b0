"""UDP sockets as the tunnel needs them: options, offloads and control messages."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterable
from typing import TypeVar

import attrs

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import PlatformError

SEND_BUFFER = 1 << 20  # docs/protocol/data-plane.md, 7.4
RECEIVE_BUFFER = 10 << 20

Ancillary = tuple[int, int, bytes]
"""A control message: level, type, data."""
ANCILLARY_SPACE = 256
"""Bytes that hold every control message `configure` asks for."""


@attrs.frozen
class UdpFeatures:
    """The offloads and the buffer that the kernel gives a socket."""

    gso: bool
    gro: bool
    receive_buffer: int  # bytes, as the kernel counts them: twice what was asked for


@attrs.frozen
class Arrival:
    """The decoded control messages of a received batch."""

    host: str | None  # the address it was sent to
    segment_size: int  # 0: a datagram that came alone
    ecn: int
    overflows: int | None  # datagrams that the socket has lost since it was opened; None before the first


def bind(host: str, ports: Iterable[int], *, mark: int | None, reuse_port: bool = False) -> socket.socket:
    """A non-blocking socket of the family of `host`, bound to the first of the ports that is free.

    `reuse_port` lets further sockets of this user share the port, and this one share theirs.

    Raises: PlatformError.
    """
    failure: OSError | None = None
    for port in ports:
        try:
            return _bind(host, port, mark, reuse_port)
        except OSError as error:
            failure = failure or error
            address = SocketAddress(host, port)
    raise PlatformError(f"Cannot open a UDP socket on {address}: {failure.strerror if failure else 'no port given'}")


def set_mark(one: socket.socket, mark: int) -> None:
    """Mark the packets of this socket, so that the host's rules keep them out of the tunnel.

    Raises: PlatformError.
    """
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _INT.pack(mark))  # exceeds a signed int
    except PermissionError as error:
        raise PlatformError(
            "Can't mark a socket, which keeps it out of the tunnel: run as root or with CAP_NET_ADMIN"
        ) from error


def configure(udp: socket.socket, *, gso: bool, gro: bool) -> UdpFeatures:
    """Set every option that the transport relies on; `gso` and `gro` allow what the kernel may offer."""
    if udp.family == socket.AF_INET6:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        # Routers and we ourselves may fragment: nothing here discovers the path's MTU.
        udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 0)
    else:
        udp.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT)
    with contextlib.suppress(OSError):
        udp.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
    _enlarge(udp, _SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER)
    _enlarge(udp, _SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return UdpFeatures(
        gso=gso and _has_gso(udp),
        gro=gro and _enable_gro(udp),
        receive_buffer=udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
    )


def sending(*, is_ipv6: bool, source: str | None, segment_size: int, ecn: int) -> list[Ancillary]:
    """The control messages of one `sendmsg`: each only where it says something."""
    messages: list[Ancillary] = []
    if segment_size:
        messages.append((socket.IPPROTO_UDP, _UDP_SEGMENT, _U16.pack(segment_size)))
    if source is not None:
        address = ipaddress.ip_address(source).packed
        if is_ipv6:
            messages.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.pack(address, 0)))
        else:
            messages.append((socket.IPPROTO_IP, _IP_PKTINFO, _IN_PKTINFO.pack(0, address, bytes(4))))
    if ecn:
        level, kind = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if is_ipv6 else (socket.IPPROTO_IP, socket.IP_TOS)
        messages.append((level, kind, _INT.pack(ecn)))
    return messages


def received(messages: Iterable[Ancillary]) -> Arrival:
    """Decode the control messages of a batch."""
    host = overflows = None
    segment_size = ecn = 0
    # The types that `configure` asked for differ from each other whatever their level is.
    for _, kind, data in messages:
        if kind == _IP_PKTINFO:
            host = socket.inet_ntop(socket.AF_INET, _IN_PKTINFO.unpack(data)[2])
        elif kind == socket.IPV6_PKTINFO:
            host = socket.inet_ntop(socket.AF_INET6, _IN6_PKTINFO.unpack(data)[0])
        elif kind == _UDP_GRO:
            segment_size = _INT.unpack(data)[0]
        elif kind == socket.IP_TOS:
            ecn = data[0] & 3
        elif kind == socket.IPV6_TCLASS:
            ecn = _INT.unpack(data)[0] & 3
        elif kind == _SO_RXQ_OVFL:
            overflows = _INT.unpack(data)[0]
    return Arrival(host, segment_size, ecn, overflows)


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Keep a value, within a bound: remote hosts choose most of these keys."""
    if len(known) >= _MAX_REMEMBERED:
        known.clear()
    known[key] = value


_MAX_REMEMBERED = 1024
_IP_PKTINFO = 8  # <linux/in.h>
_IP_MTU_DISCOVER = 10
_PMTUDISC_DONT = 0
_IPV6_MTU_DISCOVER = 23  # <linux/in6.h>
_UDP_SEGMENT = 103  # <linux/udp.h>
_UDP_GRO = 104
_SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>
_SO_RCVBUFFORCE = 33
_SO_RXQ_OVFL = 40

_U16 = struct.Struct("=H")
_INT = struct.Struct("=I")
_IN_PKTINFO = struct.Struct("=I4s4s")
"""interface index, the address to send from, the address in the received header: ip(7)."""
_IN6_PKTINFO = struct.Struct("=16sI")
"""address, interface index: RFC 3542, section 6."""


def _bind(host: str, port: int, mark: int | None, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if mark is not None:
            set_mark(udp, mark)
        if reuse_port:
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        udp.bind((host, port))
    except BaseException:
        udp.close()
        raise
    return udp


def _enlarge(udp: socket.socket, force: int, ordinary: int, size: int) -> None:
    try:
        udp.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:  # without CAP_NET_ADMIN: as much as the host's limit allows
        udp.setsockopt(socket.SOL_SOCKET, ordinary, size)


def _has_gso(udp: socket.socket) -> bool:
    try:
        udp.getsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT)
    except OSError:
        return False
    return True


def _enable_gro(udp: socket.socket) -> bool:
    try:
        udp.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        return False
    return True

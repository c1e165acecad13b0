"""The sockets of allocations. There may be ten thousand, most of them idle: nothing is kept for each but what it is."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import attrs
from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.core.datagrams import DatagramBatch
from firezone_tunnel.core.relay.outputs import RelayTransmit
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import FAMILY_IPV6
from firezone_tunnel.shell.reactor.clock import boottime
from firezone_tunnel.shell.udp.segmented import SegmentedSender, SendCounters
from firezone_tunnel.shell.udp.sockets import ANCILLARY_SPACE, Ancillary, Arrival, configure, received, remember

RESERVED_DESCRIPTORS = 64
"""Not for allocations: listening sockets, portal, health checks, logs."""

_SOCKET_BUFFER = 1 << 20
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class PortTaken(Exception):
    """Another process has the port, or (`exhausted`) this one may have no more sockets."""

    def __init__(self, *, exhausted: bool) -> None:
        super().__init__()
        self.exhausted = exhausted


@attrs.define
class PortCounters(SendCounters):
    """Of all allocations together."""

    receive_errors: int = 0
    blocked: int = 0
    """Transmits dropped, wholly or in part, because the socket had no room."""


class AllocationPorts:
    """Opens, finds and closes the sockets of allocations, which share a buffer and what they remember."""

    def __init__(
        self,
        reactor: IReactorFDSet,
        hosts: dict[int, str],
        buffer: memoryview,
        received: Callable[[int, DatagramBatch], object],
        failed: Callable[[Failure], object],
    ) -> None:
        """`hosts` are what to bind, by family; `received(port, batch)` is called for what arrives.

        `failed(failure)` is called when that raises; the port is closed then.
        """
        self.counters = PortCounters()
        self.reactor = reactor
        self.buffer = buffer
        self.received = received
        self.failed = failed
        self._hosts = hosts
        self._ports: dict[tuple[int, bool], AllocationPort] = {}
        self._arrivals: dict[tuple[Ancillary, ...], Arrival] = {}
        self._senders = {
            is_ipv6: SegmentedSender(is_ipv6=is_ipv6, gso=True, counters=self.counters, clock=boottime)
            for is_ipv6 in (False, True)
        }
        self._limit = _raise_descriptor_limit() - RESERVED_DESCRIPTORS

    def __len__(self) -> int:
        """How many sockets are open."""
        return len(self._ports)

    @property
    def limit(self) -> int:
        """How many may be open."""
        return self._limit

    def open(self, port: int, families: Iterable[int]) -> None:
        """Open sockets of these families, all or none.

        Raises: PortTaken.
        """
        opened: list[socket.socket] = []
        try:
            for family in families:
                if len(self._ports) + len(opened) >= self._limit:
                    raise PortTaken(exhausted=True)
                opened.append(_bind(self._hosts[family], port))
        except PortTaken:
            for one in opened:
                one.close()
            raise
        for one in opened:
            is_ipv6 = one.family == socket.AF_INET6
            self._ports[port, is_ipv6] = AllocationPort(self, one, port, is_ipv6=is_ipv6)

    def close(self, port: int, families: Iterable[int]) -> None:
        for family in families:
            found = self._ports.get((port, family == FAMILY_IPV6))
            if found is not None:
                found.close()

    def close_all(self) -> None:
        for port in list(self._ports.values()):
            port.close()

    def send(self, transmit: RelayTransmit) -> None:
        """Send from the allocation's socket, or give up: a relay queues no more than a router does."""
        is_ipv6 = transmit.destination.is_ipv6
        port = self._ports.get((transmit.port, is_ipv6))
        if port is not None and port.send(transmit, self._senders[is_ipv6]) is not None:
            self.counters.blocked += 1
        transmit.release()

    def forget(self, port: int, *, is_ipv6: bool) -> None:
        self._ports.pop((port, is_ipv6), None)

    def arrival(self, ancillary: tuple[Ancillary, ...]) -> Arrival:
        """The decoded control messages. Looking up earlier ones is cheaper than decoding."""
        arrival = self._arrivals.get(ancillary)
        if arrival is None:
            arrival = received(ancillary)
            remember(self._arrivals, ancillary, arrival)
        return arrival


@implementer(IReadDescriptor)
class AllocationPort:
    """One family's socket of one allocation."""

    MAX_BATCHES = 16
    MAX_TURN = 0.001

    __slots__ = ("_is_ipv6", "_owner", "_port", "_socket")

    def __init__(self, owner: AllocationPorts, udp: socket.socket, port: int, *, is_ipv6: bool) -> None:
        self._owner = owner
        self._socket: socket.socket | None = udp
        self._port = port
        self._is_ipv6 = is_ipv6
        owner.reactor.addReader(self)

    def send(self, transmit: RelayTransmit, sender: SegmentedSender) -> int | None:
        """Returns the byte at which the socket blocked; None if it did not."""
        udp = self._socket
        if udp is None:
            return None
        if not transmit.dont_fragment:
            return sender.send(udp, transmit)
        with _dont_fragment(udp, is_ipv6=self._is_ipv6):
            return sender.send(udp, transmit)

    def close(self) -> None:
        udp, self._socket = self._socket, None
        if udp is not None:
            self._owner.reactor.removeReader(self)
            self._owner.forget(self._port, is_ipv6=self._is_ipv6)
            udp.close()

    def doRead(self) -> None:
        owner = self._owner
        buffer = owner.buffer
        into = (buffer,)
        deadline = perf_counter() + self.MAX_TURN
        for _ in range(self.MAX_BATCHES):
            udp = self._socket
            if udp is None:
                return
            try:
                length, ancillary, _, address = udp.recvmsg_into(into, ANCILLARY_SPACE)
            except BlockingIOError:
                return
            except OSError:  # such as an ICMP error for something sent before
                owner.counters.receive_errors += 1
                return
            if length:
                arrival = owner.arrival(tuple(ancillary))
                source = SocketAddress(address[0], address[1])
                local = SocketAddress(arrival.host or "", self._port)
                size = arrival.segment_size or length
                owner.received(self._port, DatagramBatch.received(buffer, length, size, source, local, arrival.ecn))
            if perf_counter() >= deadline:
                return

    def connectionLost(self, reason: Failure) -> None:
        """The reactor gives up on us because `doRead` raised."""
        self.close()
        self._owner.failed(reason)

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def logPrefix(self) -> str:
        return "AllocationPort"


def is_bindable(host: str) -> bool:
    """Whether an address is one of this host's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))
        return True
    return False


def _bind(host: str, port: int) -> socket.socket:
    """
    Raises: PortTaken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise PortTaken(exhausted=True) from error
    try:
        if family == socket.AF_INET6:
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        udp.bind((host, port))
        configure(udp, gso=True, gro=True)
        # A tunnel's socket may hold 10 MB; of these there are thousands, and strangers may fill them.
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
    except OSError as error:
        udp.close()
        raise PortTaken(exhausted=error.errno in _EXHAUSTED) from error
    return udp


@contextlib.contextmanager
def _dont_fragment(udp: socket.socket, *, is_ipv6: bool) -> Any:
    """Set the DF bit for what is sent inside (RFC 8656, section 14.8); a rare wish."""
    level, option = (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER) if is_ipv6 else (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
    udp.setsockopt(level, option, _PMTUDISC_DO)
    try:
        yield
    finally:
        udp.setsockopt(level, option, _PMTUDISC_DONT)


_IP_MTU_DISCOVER = 10  # <linux/in.h>
_IPV6_MTU_DISCOVER = 23  # <linux/in6.h>
_PMTUDISC_DONT = 0
_PMTUDISC_DO = 2


def _raise_descriptor_limit() -> int:
    """Take what the process may have at most, and return it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

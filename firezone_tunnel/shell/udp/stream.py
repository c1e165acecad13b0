"""The one way for a stream connection to leave the host: marked, so that it stays out of the tunnel."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from twisted.internet import error
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, call_later
from firezone_tunnel.shell.udp.sockets import set_mark

CONNECT_TIMEOUT = 30.0
STAGGER = 0.25  # RFC 8305, section 8: Connection Attempt Delay


@implementer(IStreamClientEndpoint)
class MarkedEndpoint:
    """Connects to an IP address from a socket that carries a firewall mark, if one is given.

    Of the factory only `buildProtocol` is called. A failed connection is a `ConnectError` with the address in it.
    """

    def __init__(
        self, reactor: Any, host: str, port: int, mark: int | None, *, timeout: float | None = CONNECT_TIMEOUT
    ) -> None:
        """`host` is a numeric address, with a scope where it needs one; `timeout` is in seconds.

        Raises: ValueError, if it is a name.
        """
        try:
            info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except OSError:
            raise ValueError(f"not an IP address: {host!r}") from None
        self._family: int = info[0][0]
        self._sockaddr: Any = info[0][4]
        self._address = SocketAddress(host, port)
        self._reactor = reactor
        self._mark = mark
        self._timeout = timeout

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Fails with PlatformError, if the socket can't be made or marked, or with a ConnectError."""
        try:
            stream = _open(self._family, self._mark)
        except PlatformError:
            return fail()
        connecting = _Connecting(self._reactor, stream, self._address, protocolFactory)
        connecting.start(self._sockaddr, self._timeout)
        return connecting.done

    def __repr__(self) -> str:
        return f"<MarkedEndpoint {self._address}>"


@implementer(IStreamClientEndpoint)
class RacingEndpoint:
    """Tries several endpoints, each a moment after the one before or when that fails; the first to connect wins."""

    def __init__(self, reactor: Any, endpoints: Sequence[IStreamClientEndpoint], *, stagger: float = STAGGER) -> None:
        if not endpoints:
            raise ValueError("a race takes at least one endpoint")
        self._reactor = reactor
        self._endpoints = tuple(endpoints)
        self._stagger = stagger

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Fails with PlatformError, or with a ConnectError that has the reason for each address."""
        race = _Race(self._reactor, self._endpoints, self._stagger, protocolFactory)
        race.start_next()
        return race.done


def _open(family: int, mark: int | None) -> socket.socket:
    """A non-blocking socket with its options set."""
    try:
        stream = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as problem:
        raise PlatformError(f"Cannot open a TCP socket: {problem.strerror}") from problem
    try:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if mark is not None:
            set_mark(stream, mark)
    except OSError as problem:
        stream.close()
        raise PlatformError(f"Cannot set up a TCP socket: {problem.strerror}") from problem
    except PlatformError:
        stream.close()
        raise
    return stream


@implementer(IWriteDescriptor)
class _Connecting:
    """A socket that is connecting. The reactor reports the outcome by calling it writable."""

    def __init__(self, reactor: Any, stream: socket.socket, address: SocketAddress, factory: IProtocolFactory) -> None:
        self.done: Deferred[IProtocol] = Deferred(self._cancelled)
        self._reactor = reactor
        self._socket = stream
        self._address = address
        self._factory = factory
        self._timer: BoottimeTimer | None = None

    def start(self, sockaddr: Any, timeout: float | None) -> None:
        number = self._socket.connect_ex(sockaddr)
        if number not in {0, errno.EINPROGRESS}:
            self._fail(number)
            return
        if timeout is not None:
            try:
                self._timer = call_later(self._reactor, timeout, lambda: self._fail(errno.ETIMEDOUT))
            except OSError as problem:  # out of descriptors
                self._fail(problem.errno or errno.EMFILE)
                return
        self._reactor.addWriter(self)

    def doWrite(self) -> None:
        number = self._outcome()
        if number:
            self._fail(number)
            return
        self._reactor.removeWriter(self)
        try:
            # The transport gets a copy of the descriptor, ours is closed below.
            transport = self._reactor.adoptStreamConnection(self.fileno(), self._socket.family, self._factory)
        except OSError as problem:  # the peer may be gone again already
            self._fail(problem.errno or errno.ECONNRESET)
            return
        self._close()
        if transport is None:
            self.done.errback(error.NoProtocol())
            return
        self.done.callback(transport.protocol)

    def fileno(self) -> int:
        return self._socket.fileno()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor calls this when the descriptor hangs up, as it does after a failed connection."""
        if self.fileno() != -1:
            self._fail(self._outcome() or errno.ECONNABORTED)

    def logPrefix(self) -> str:
        return "MarkedEndpoint"

    def _outcome(self) -> int:
        """0, or why it failed."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def _fail(self, number: int) -> None:
        self._close()
        reason = (number, f"{os.strerror(number)} ({self._address})")
        self.done.errback(error.getConnectError(reason))

    def _cancelled(self, deferred: Deferred[IProtocol]) -> None:
        self._close()
        cancelled = error.ConnectingCancelledError(self._address)
        deferred.errback(cancelled)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.close()
        if self.fileno() != -1:
            self._reactor.removeWriter(self)
            self._socket.close()


class _Race:
    """Who is running, who still waits, and what went wrong so far."""

    def __init__(
        self,
        reactor: Any,
        endpoints: Sequence[IStreamClientEndpoint],
        stagger: float,
        factory: IProtocolFactory,
    ) -> None:
        self.done: Deferred[IProtocol] = Deferred(lambda _: self._stop())
        self._reactor = reactor
        self._waiting = deque(endpoints)
        self._stagger = stagger
        self._factory = factory
        self._running: list[Deferred[IProtocol]] = []
        self._failures: list[Failure] = []
        self._timer: BoottimeTimer | None = None

    def start_next(self) -> None:
        self._stop_timer()
        running = self._waiting.popleft().connect(self._factory)
        self._running.append(running)
        if self._waiting:
            with contextlib.suppress(OSError):  # out of descriptors: the next starts when this one fails
                self._timer = call_later(self._reactor, self._stagger, self.start_next)
        running.addCallbacks(self._won, self._lost, callbackArgs=(running,), errbackArgs=(running,))

    def _won(self, protocol: IProtocol, winner: Deferred[IProtocol]) -> None:
        self._running.remove(winner)
        self._stop()
        self.done.callback(protocol)

    def _lost(self, failure: Failure, loser: Deferred[IProtocol]) -> None:
        if loser not in self._running:  # cancelled by us
            return
        self._running.remove(loser)
        self._failures.append(failure)
        if self._waiting:
            self.start_next()
        elif not self._running:
            self.done.errback(self._summary())

    def _summary(self) -> Failure:
        """A failure that any address would meet, the only one, or all of them in one line."""
        for failure in self._failures:
            if len(self._failures) == 1 or isinstance(failure.value, PlatformError):
                return failure
        reasons = "; ".join(str(failure.value) for failure in self._failures)
        return Failure(error.ConnectError(string=reasons))

    def _stop(self) -> None:
        self._stop_timer()
        self._waiting.clear()
        running, self._running = self._running, []
        for deferred in running:
            deferred.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
        self._timer = None

"""The portal connection as a service of its own: the core's `Channel`, given sockets, a timer and a log.

It is joined to the tunnel service by two bounded queues: `send` puts into the channel's own, and what the tunnel
service is to know is put into `events`: `Joined`, `PushReceived`, `Lost` and `Fatal` of `phoenix.channel`.
"""

from __future__ import annotations

import ipaddress
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from OpenSSL import crypto
from twisted.internet import error, ssl
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.endpoints import wrapClientTLS
from twisted.python.failure import Failure

from firezone_tunnel.core.phoenix.channel import (
    Channel,
    ChannelCounters,
    ChannelLost,
    ChannelState,
    Dial,
    Event,
    Fatal,
    HangUp,
    IdentityShared,
    Joined,
    Lost,
    PushReceived,
    Stalled,
    UpgradeRefused,
)
from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.errors import ConfigurationError, FirezoneError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.logs.limiter import Limiter
from firezone_tunnel.shell.portal_link.failures import explain
from firezone_tunnel.shell.portal_link.protocol import PortalLinkFactory, PortalLinkProtocol
from firezone_tunnel.shell.portal_link.resolver import HostResolver
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, call_later, utc
from firezone_tunnel.shell.reactor.service import Service
from firezone_tunnel.shell.udp.stream import MarkedEndpoint, RacingEndpoint

TCP_TIMEOUT = 5.0  # docs/protocol/portal-protocol.md, 1.7
CLOSE_TIMEOUT = 1.0
RETRY_PUT_INTERVAL = 0.01

Notice = Joined | PushReceived | Lost | Fatal
"""Events for the tunnel service."""
Resolver = Callable[[str], "Deferred[list[str]]"]
"""Resolves a host name to its addresses, best first."""


class EventQueue(Protocol):
    """The queue towards the tunnel service: `firezone_tunnel.shell.reactor.queues.BoundedQueue`."""

    def put(self, item: Any, /) -> bool: ...


class Timer(Protocol):
    """`firezone_tunnel.shell.reactor.clock.BoottimeTimer`, or a test's."""

    def set(self, deadline: float | None) -> None: ...

    def close(self) -> None: ...


class PortalLink(Service):
    """Keeps one role joined to its portal, from the first `connect` until it is stopped or refused for good.

    While `events` is full nothing is read from the portal.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        url: LoginUrl,
        topic: str,
        events: EventQueue,
        join_payload: object = None,
        mark: int | None = None,
        trust: Any = None,
        max_partition_time: float | None = None,
        entropy: Entropy = os.urandom,
        resolve: Resolver | None = None,
        clock: Callable[[], float] = boottime,
        utc_clock: Callable[[], float] = utc,
        make_timer: Callable[[Callable[[], object]], Timer] | None = None,
    ) -> None:
        """
        :param mark: firewall mark of the sockets; None where nothing of ours leads into a tunnel.
        :param trust: whom to trust with the portal's certificate (`trust_from_file`); None: whom the host trusts.
        :param max_partition_time: give up when the delays between attempts sum up to more seconds; None: never.
        :param resolve: in place of the host's name resolver.
        :param clock: `now`, and :param utc_clock: unix time, both in seconds; :param make_timer: runs on `clock`.
        """
        self.events = events
        self._reactor = reactor
        self._url = url
        self._mark = mark
        self._trust = trust
        self._resolve = resolve or HostResolver(reactor).resolve
        self._clock = clock
        self._utc_clock = utc_clock
        self._make_timer = make_timer or (lambda callback: BoottimeTimer(reactor, callback))
        self._channel = Channel(
            topic=topic, join_payload=join_payload, entropy=entropy, max_partition_time=max_partition_time
        )
        self._public_key: bytes | None = None
        self._is_wanted = False
        self._tls: Any = None
        self._timer: Timer | None = None
        self._attempt: _DialAttempt | None = None
        self._advice = ""  # of the last attempt
        self._limiter = Limiter(clock=clock)
        self._held: deque[Notice] = deque()
        self._retry_put: BoottimeTimer | None = None

    @property
    def state(self) -> ChannelState:
        return self._channel.state

    @property
    def counters(self) -> ChannelCounters:
        return self._channel.counters

    def startService(self) -> None:
        """
        Raises: ConfigurationError, where no certificate could ever be for the portal's host name.
        """
        super().startService()
        if self._url.is_secure and self._tls is None:
            self._tls = _tls_options(self._url.host, self._trust)
        self._timer = self._make_timer(self._timed_out)
        self._retry_put = BoottimeTimer(self._reactor, self._deliver)
        if self._is_wanted:
            self._connect()

    def stopService(self) -> Deferred[None]:
        """Close the WebSocket in good order, or, after a second, without."""
        super().stopService()
        self._is_wanted = False
        self._channel.close()
        self._pump()
        log.debug("portal:closed", portal=str(self._url), **log.nonzero(self.counters))
        self._held.clear()
        if self._retry_put is not None:
            self._retry_put.close()
            self._retry_put = None
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        attempt, self._attempt = self._attempt, None
        return succeed(None) if attempt is None else attempt.close()

    def connect(self, public_key: bytes | None = None) -> None:
        """Connect at once with this tunnel key (a relay has none), aborting the connection there is.

        Before the service is started it is only remembered.
        """
        self._public_key = public_key
        self._is_wanted = True
        if self.running:
            self._connect()

    def probe(self) -> None:
        """The host was suspended for a moment: find out at once whether the portal is still there."""
        if self.running:
            self._channel.probe(self._clock())
            self._pump()

    def send(self, event: str, payload: object) -> bool:
        """Send a message to the portal, at once or when the join is through; see `Channel.send`.

        False, and counted, without a connection to wait for or with a full queue.
        """
        if not self._channel.send(event, payload):
            return False
        self._pump()
        return True

    def _connect(self) -> None:
        self._channel.connect(self._clock())
        self._pump()

    def _timed_out(self) -> None:
        self._channel.handle_timeout(self._clock())
        self._pump()

    def _pump(self) -> None:
        """Execute the channel's events and transmits."""
        for event in self._channel.events():
            self._handle(event)
        attempt = self._attempt
        if attempt is not None and attempt.is_writable:
            for text in self._channel.transmits():
                attempt.send(text)
                if not attempt.is_writable:
                    break
        timeout = self._channel.next_timeout()
        if self._timer is not None:
            self._timer.set(None if timeout is None else timeout.at)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Dial):
            self._dial(event)
        elif isinstance(event, HangUp):
            self._hang_up()
        elif isinstance(event, Stalled):
            self._limiter.warning("portal:connection_stalled", portal=str(self._url), missing=event.missing)
        elif isinstance(event, IdentityShared):
            self._warn_of_twin("the portal has refused another host with the identity of this device")
        elif isinstance(event, ChannelLost):
            log.info("portal:channel_lost", portal=str(self._url), reason=event.reason)
        else:
            self._log(event)
            self._put(event)

    def _dial(self, event: Dial) -> None:
        log.debug("portal:dialed", portal=str(self._url), attempt=event.attempt, user_agent=self._url.user_agent)
        self._attempt = attempt = _DialAttempt(self._reactor, self._channel, self._pump, self._clock, self._utc_clock)
        attempt.start(self._url, self._public_key, resolve=self._resolve, tls=self._tls, mark=self._mark)

    def _hang_up(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._advice = attempt.advice
            attempt.abort()

    def _log(self, event: Notice) -> None:
        portal = str(self._url)
        if isinstance(event, Joined):
            log.info("portal:joined", portal=portal)
        elif isinstance(event, Lost) and event.was_joined:
            delay = round(event.delay, 3)
            log.info("portal:connection_lost", portal=portal, reason=event.reason, delay=delay)
            if event.is_identity_shared:
                self._warn_of_twin(event.reason)
        elif isinstance(event, Lost):
            if event.is_identity_shared:
                self._warn_of_twin(event.reason)
            advice: dict[str, Any] = {"advice": self._advice} if self._advice else {}
            self._limiter.warning(
                "portal:retry_scheduled",
                portal=portal,
                reason=event.reason,
                attempt=event.attempt + 1,
                delay=round(event.delay, 3),
                meanwhile="existing connections go on",
                **advice,
            )

    def _warn_of_twin(self, reason: str) -> None:
        advice = "give each host its own identity: its own --firezone-id, or a state directory of its own"
        self._limiter.warning("portal:identity_shared", portal=str(self._url), reason=reason, advice=advice)

    def _put(self, event: Notice) -> None:
        if isinstance(event, Lost | Fatal):  # undelivered events of a lost connection are obsolete
            self._held.clear()
        self._held.append(event)
        self._deliver()

    def _deliver(self) -> None:
        """Move held events into the queue while it has room; resume reading when none are left."""
        while self._held and self.events.put(self._held[0]):
            self._held.popleft()
        if self._held and self._retry_put is not None and self._retry_put.deadline is None:
            self._retry_put.set(boottime() + RETRY_PUT_INTERVAL)
        if self._attempt is not None:
            self._attempt.pause_reading(paused=bool(self._held))


def trust_from_file(path: Path) -> Any:
    """The certificates of a PEM file as the only ones to trust: for portals with a private CA.

    Raises: ConfigurationError.
    """
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise ConfigurationError(f"Cannot read CA certificates in {path}: {problem}") from problem
    trusted = [ssl.Certificate(crypto.X509.from_cryptography(one)) for one in certificates]
    return ssl.trustRootFromCertificates(trusted)


class _DialAttempt:
    """One WebSocket from name resolution to its end. It reports its progress to the channel."""

    def __init__(
        self,
        reactor: Any,
        channel: Channel,
        pump: Callable[[], None],
        clock: Callable[[], float],
        utc_clock: Callable[[], float],
    ) -> None:
        self._reactor = reactor
        self._channel = channel
        self._pump = pump
        self._clock = clock
        self._utc_clock = utc_clock
        self.advice = ""
        """What the operator can do if it has failed; empty if nothing is known."""
        self._connecting: Deferred[None] | None = None
        self._protocol: PortalLinkProtocol | None = None
        self._missing = ""
        self._is_paused = False
        self._closing: Deferred[None] | None = None
        self._close_timer: BoottimeTimer | None = None

    @property
    def is_writable(self) -> bool:
        return self._protocol is not None and self._protocol.is_writable

    def start(self, url: LoginUrl, public_key: bytes | None, *, resolve: Resolver, tls: Any, mark: int | None) -> None:
        factory = PortalLinkFactory(
            self._reactor,
            target=url.target(public_key),
            headers=url.headers,
            listener=self,
            utc_clock=self._utc_clock,
        )
        self._connecting = Deferred.fromCoroutine(self._connect(url, factory, resolve, tls, mark))
        self._connecting.addErrback(self._failed)

    def send(self, text: bytes) -> None:
        assert self._protocol is not None
        self._protocol.sendMessage(text)

    def pause_reading(self, *, paused: bool) -> None:
        if self._protocol is None or paused == self._is_paused:
            return
        self._is_paused = paused
        if paused:
            self._protocol.transport.pauseProducing()
        else:
            self._protocol.transport.resumeProducing()

    def abort(self) -> None:
        """Close the socket without notifying the channel."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._protocol is not None:
            self._protocol.abort()
        self._closed()

    def close(self) -> Deferred[None]:
        """Fires when the WebSocket is closed, or aborted because that took too long."""
        if self._protocol is None or not self._protocol.is_upgraded:
            self.abort()
            return succeed(None)
        closing: Deferred[None] = Deferred()
        self._closing = closing
        self._close_timer = call_later(self._reactor, CLOSE_TIMEOUT, self.abort)
        self.pause_reading(paused=False)
        self._protocol.close()
        return closing

    def secured(self) -> None:
        self._wait_for("the answer to the WebSocket upgrade")

    def opened(self) -> None:
        self._channel.handle_open(self._clock())
        self._pump()

    def text_received(self, text: bytes) -> None:
        self._channel.handle_text(text, self._clock())
        self._pump()

    def writable(self) -> None:
        self._pump()

    def refused(self, refusal: UpgradeRefused) -> None:
        self._channel.handle_refused(refusal, self._clock())
        self._pump()

    def closed(self, reason: str | None, advice: str = "") -> None:
        self.advice = advice
        dropped = f"the portal dropped the connection: {self._missing} is missing"
        self._channel.handle_lost(dropped if reason is None else reason, self._clock())
        self._pump()
        self._closed()

    async def _connect(
        self, url: LoginUrl, factory: PortalLinkFactory, resolve: Resolver, tls: Any, mark: int | None
    ) -> None:
        self._wait_for(f"the address of {url.host}")
        hosts = [url.host] if _is_ip(url.host) else await resolve(url.host)
        if not hosts:
            raise error.DNSLookupError(f"no address is known for {url.host}")
        log.debug("portal:resolved", portal=str(url), addresses=hosts)
        self._wait_for(f"a TCP connection to {url}")
        endpoint: Any = RacingEndpoint(
            self._reactor,
            [MarkedEndpoint(self._reactor, host, url.port, mark, timeout=TCP_TIMEOUT) for host in dict.fromkeys(hosts)],
        )
        if tls is not None:
            endpoint = wrapClientTLS(tls, endpoint)
        self._protocol = await endpoint.connect(factory)
        if tls is not None:
            self._wait_for("the TLS handshake")
        else:
            self.secured()

    def _wait_for(self, missing: str) -> None:
        self._missing = missing
        self._channel.handle_progress(missing)

    def _failed(self, failure: Failure) -> None:
        problem: Any = failure.value
        if isinstance(problem, CancelledError):
            return
        if not isinstance(problem, FirezoneError | OSError | error.ConnectError | error.DNSLookupError):
            log.error("portal:attempt_crashed", traceback=failure.getTraceback())
        self.closed(*explain(problem))

    def _closed(self) -> None:
        if self._close_timer is not None:
            self._close_timer.close()
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.callback(None)


def _tls_options(host: str, trust: Any) -> Any:
    try:
        return ssl.optionsForClientTLS(host, trustRoot=trust)
    except (UnicodeError, ValueError) as problem:
        raise ConfigurationError(f"No certificate can match the portal's host {host!r}: {problem}") from problem


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

"""The relay as a service: its engine, in this process or in workers, and its portal link if it has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel import __version__
from firezone_tunnel.apps.relay.config import DRAIN_TIME, EngineConfig, Secrets
from firezone_tunnel.apps.relay.engine import Engine
from firezone_tunnel.apps.relay.listening import bind_listening
from firezone_tunnel.apps.relay.worker_group import WorkerGroup
from firezone_tunnel.core.messages import relay as messages
from firezone_tunnel.core.phoenix.channel import Fatal, Joined
from firezone_tunnel.core.relay.allocator import RelayConfig
from firezone_tunnel.core.stun.message import FIREZONE_REALM
from firezone_tunnel.errors import ConfigurationError, FirezoneError
from firezone_tunnel.shell.host.snapshot import read_hosts
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link.service import Notice, PortalLink, trust_from_file
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, call_later
from firezone_tunnel.shell.reactor.pause import PauseDetector
from firezone_tunnel.shell.reactor.queues import BoundedQueue
from firezone_tunnel.shell.reactor.service import Service

_PORTAL_EVENTS = 16


class RelayService(Service):
    """A relay.

    `ready` fires with None once it serves and the portal knows of it; `failed` with the FirezoneError that ended it.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        public_ipv4: str | None = None,
        public_ipv6: str | None = None,
        url: str | None = None,
        token: str | None = None,
        name: str | None = None,
        ca_file: str | Path | None = None,
        max_partition_time: float | None = None,
        users: Mapping[str, str] | None = None,
        realm: str = FIREZONE_REALM,
        bind_ipv4: str = "0.0.0.0",
        bind_ipv6: str = "::",
        listen_port: int = 3478,
        lowest_port: int = 49152,
        highest_port: int = 65535,
        allow_peers: Iterable[str] = (),
        max_allocations: int = 0,
        max_allocations_per_user: int = 0,
        workers: int = 1,
        drain_time: float = DRAIN_TIME,
    ) -> None:
        """Either `url` and `token` or `users` are required, and at least one public address.

        :param public_ipv4: the address at which clients reach the relay; the same for `public_ipv6`.
        :param url: the portal's URL; :param token: a relay token.
        :param name: the relay's name in the portal.
        :param ca_file: PEM file with the only CAs to trust for the portal. Default: the host's.
        :param max_partition_time: seconds without a portal after which the relay fails. Default: never.
        :param users: passwords by user name, for a TURN server without a portal; `realm` is theirs.
        :param bind_ipv4: the address to listen on; the same for `bind_ipv6`.
        :param lowest_port: the first port for allocations; `highest_port` is the last.
        :param allow_peers: special-purpose networks, such as "10.0.0.0/8", to which the relay relays nevertheless.
        :param max_allocations: 0 for no limit; the same for `max_allocations_per_user`.
        :param workers: the number of processes that share `listen_port`.
        :param drain_time: seconds for which `stopService` goes on serving present clients.

        Raises: ConfigurationError.
        """
        self.ready: Deferred[None] = Deferred()
        self.failed: Deferred[FirezoneError] = Deferred()
        self._reactor = reactor
        relaying = RelayConfig(
            public_ipv4=public_ipv4,
            public_ipv6=public_ipv6,
            lowest_port=lowest_port,
            highest_port=highest_port,
            max_allocations=max_allocations,
            max_allocations_per_user=max_allocations_per_user,
            workers=workers,
            same_user_only=users is not None,
        )
        self._engine = EngineConfig(
            relaying,
            bind_ipv4=bind_ipv4,
            bind_ipv6=bind_ipv6,
            own_hosts=read_hosts(),
            allow_peers=tuple(allow_peers),
            drain_time=drain_time,
        )
        self._listen_port = listen_port
        self._secrets = Secrets.new(users, realm)
        _check(self._engine, listen_port, self._secrets)
        self._relaying: Engine | WorkerGroup | None = None
        self._skips_drain = False
        self._stopped: Deferred[None] | None = None
        self._portal_events: BoundedQueue[Notice] = BoundedQueue(reactor, _PORTAL_EVENTS, self._handle_notice)
        self._portal: PortalLink | None = None
        self._url: LoginUrl | None = None
        self._pauses = PauseDetector(reactor, self._paused)
        if url is not None and token is not None:
            self._url = LoginUrl.relay(url, token, ipv4=public_ipv4, ipv6=public_ipv6, port=listen_port, name=name)
            self._portal = PortalLink(
                reactor,
                url=self._url,
                topic=messages.TOPIC,
                events=self._portal_events,
                join_payload={"stamp_secret": self._secrets.stamp_secret},
                trust=None if ca_file is None else trust_from_file(Path(ca_file)),
                max_partition_time=max_partition_time,
                make_timer=lambda callback: BoottimeTimer(reactor, callback, observe=self._pauses.fired),
            )
        if (self._portal is None) is (users is None):
            raise ConfigurationError("A relay needs either a portal's URL and a token, or users")

    @property
    def is_ready(self) -> bool:
        """Whether the portal knows the relay, and all of its workers serve."""
        return not self.obstacles()

    def obstacles(self) -> list[str]:
        """Why clients can't be served at the moment; empty if they can."""
        if not self.running or not self.ready.called:
            return ["the relay has not started, or the portal has not admitted it yet"]
        if self._relaying is None or not self._relaying.is_serving:
            return ["a worker is being restarted"]
        return []

    def startService(self) -> None:
        """
        Raises: PlatformError, ConfigurationError.
        """
        super().startService()
        log.info(
            "service:started",
            role="relay",
            version=__version__,
            portal=None if self._url is None else str(self._url),
            public=list(self._engine.relaying.hosts.values()),
            port=self._listen_port,
            workers=self._engine.relaying.workers,
        )
        sockets = bind_listening(self._engine, self._listen_port)
        if len(sockets) == 1:
            self._relaying = Engine(self._reactor, self._engine, self._secrets, sockets[0], self._fail)
        else:
            self._relaying = WorkerGroup(self._reactor, self._engine, self._secrets, sockets, self._fail)
        self._pauses.start()
        if self._portal is not None:
            self._portal.startService()
        serving = self._relaying.start()
        # In a later turn, once the reactor runs and handles signals.
        serving.addCallback(lambda _: call_later(self._reactor, 0, self._announce))

    def stopService(self) -> Deferred[None]:
        """Leave the portal, so that no new clients come, and serve present clients until they have moved elsewhere.

        Fires then, or after the drain time. May be called more than once.
        """
        if self._stopped is None:
            super().stopService()
            self._stopped = Deferred.fromCoroutine(self._stop()).addErrback(self._not_stopped)
        done: Deferred[None] = Deferred()
        self._stopped.addBoth(lambda _: done.callback(None))
        return done

    def stop_draining(self) -> None:
        """Drain no longer, or not at all."""
        self._skips_drain = True
        if self._relaying is not None:
            self._relaying.stop_draining()

    async def _stop(self) -> None:
        self._pauses.close()
        if self._portal is not None and self._portal.running:
            await self._portal.stopService()
        self._portal_events.close()
        if self._relaying is not None:
            if self._skips_drain:
                self._relaying.stop_draining()
            await self._relaying.stop()

    def _paused(self, seconds: float) -> None:
        log.info("process:resumed", paused=round(seconds, 1))
        if self._portal is not None:
            self._portal.probe()

    def _not_stopped(self, failure: Failure) -> None:
        """A service's boundary: it counts as stopped even if stopping fails."""
        log.error("relay:crashed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())

    def _announce(self) -> None:
        """It serves: announce that to the portal or, without a portal, through `ready`."""
        if not self.running:
            return
        if self._portal is None:
            self._ready()
        else:
            self._portal.connect()

    def _handle_notice(self, notice: Notice) -> None:
        if isinstance(notice, Joined):
            self._ready()
        elif isinstance(notice, Fatal):
            self._fail(notice.error)

    def _ready(self) -> None:
        if self.running and not self.ready.called:
            log.info("relay:ready")
            self.ready.callback(None)

    def _fail(self, error: FirezoneError) -> None:
        if not self.failed.called:
            self.failed.callback(error)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return (
            f"<{type(self).__name__}: {', '.join(self._engine.relaying.hosts.values())}, {self._listen_port}, {state}>"
        )


def _check(engine: EngineConfig, listen_port: int, secrets: Secrets) -> None:
    """
    Raises: ConfigurationError.
    """
    relaying = engine.relaying
    if not relaying.hosts:
        raise ConfigurationError("A relay needs --public-ip4-addr or --public-ip6-addr, or both")
    if relaying.lowest_port > relaying.highest_port:
        raise ConfigurationError("--lowest-port is greater than --highest-port, which leaves no port for allocations")
    if relaying.lowest_port <= listen_port <= relaying.highest_port:
        raise ConfigurationError(
            "--listen-port must lie outside the range from --lowest-port to --highest-port, which allocations use"
        )
    if relaying.workers > relaying.highest_port - relaying.lowest_port + 1:
        raise ConfigurationError("--workers is greater than the number of ports from --lowest-port to --highest-port")
    try:
        engine.policy()
    except ValueError as error:
        raise ConfigurationError(f"An address of the relay is invalid: {error}") from None
    try:
        secrets.credentials()
    except ValueError as error:
        raise ConfigurationError(f"--realm: {error}") from None

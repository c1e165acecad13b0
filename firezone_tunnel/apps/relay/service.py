"""The relay as a service: its engine, in this process or in workers, and its portal link if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.apps.relay.config import EngineConfig, Secrets
from firezone_tunnel.apps.relay.engine import Engine
from firezone_tunnel.apps.relay.listening import bind_listening
from firezone_tunnel.apps.relay.worker_group import WorkerGroup
from firezone_tunnel.core.messages import relay as messages
from firezone_tunnel.core.phoenix.channel import Fatal, Joined
from firezone_tunnel.core.stun.message import FIREZONE_REALM
from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link.service import Notice, PortalLink
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.reactor.queues import BoundedQueue
from firezone_tunnel.shell.reactor.service import Service

_PORTAL_EVENTS = 16


@attrs.frozen
class PortalConfig:
    """The portal to which a relay announces itself and the secret behind its credentials."""

    url: LoginUrl
    trust: Any = None  # `portal_link.service.trust_from_file`; None: whom the host trusts
    max_partition_time: float | None = None  # seconds without a portal; None: without end


@attrs.frozen
class RelayOptions:
    """The options of a relay. Exactly one of `portal` and `users` (passwords by name) is given."""

    engine: EngineConfig
    listen_port: int = 3478
    portal: PortalConfig | None = None
    users: Mapping[str, str] | None = attrs.field(default=None, repr=False)
    realm: str = FIREZONE_REALM


class RelayService(Service):
    """A relay.

    `ready` fires with None once it serves and the portal knows of it; `failed` with the FirezoneError that ended it.
    """

    def __init__(self, reactor: Any, options: RelayOptions) -> None:
        self.ready: Deferred[None] = Deferred()
        self.failed: Deferred[FirezoneError] = Deferred()
        self._reactor = reactor
        self._options = options
        self._secrets = Secrets.new(options.users, options.realm)
        self._relaying: Engine | WorkerGroup | None = None
        self._skips_drain = False
        self._stopped: Deferred[None] | None = None
        self._portal_events: BoundedQueue[Notice] = BoundedQueue(reactor, _PORTAL_EVENTS, self._handle_notice)
        self._portal = self._make_portal(options.portal)

    @property
    def is_ready(self) -> bool:
        """Whether the portal knows the relay, and all of its workers serve."""
        is_serving = self._relaying is not None and self._relaying.is_serving
        return bool(self.running and self.ready.called and is_serving)

    def startService(self) -> None:
        """
        Raises: PlatformError, ConfigurationError.
        """
        super().startService()
        engine = self._options.engine
        sockets = bind_listening(engine, self._options.listen_port)
        if len(sockets) == 1:
            self._relaying = Engine(self._reactor, engine, self._secrets, sockets[0], self._fail)
        else:
            self._relaying = WorkerGroup(self._reactor, engine, self._secrets, sockets, self._fail)
        if self._portal is not None:
            self._portal.startService()
        serving = self._relaying.start()
        # In a later turn, once the reactor runs and handles signals.
        serving.addCallback(lambda _: self._reactor.callLater(0, self._announce))

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
        if self._portal is not None and self._portal.running:
            await self._portal.stopService()
        self._portal_events.close()
        if self._relaying is not None:
            if self._skips_drain:
                self._relaying.stop_draining()
            await self._relaying.stop()

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

    def _make_portal(self, config: PortalConfig | None) -> PortalLink | None:
        if config is None:
            return None
        return PortalLink(
            self._reactor,
            url=config.url,
            topic=messages.TOPIC,
            events=self._portal_events,
            join_payload={"stamp_secret": self._secrets.stamp_secret},
            trust=config.trust,
            max_partition_time=config.max_partition_time,
        )

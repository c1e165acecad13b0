"""The portal as a service: the seed file, the database, the listening port and the timer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from OpenSSL import SSL, crypto
from twisted.internet.defer import Deferred, DeferredLock, maybeDeferred
from twisted.internet.endpoints import SSL4ServerEndpoint, TCP4ServerEndpoint, TCP6ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.ssl import CertificateOptions
from twisted.python.failure import Failure

from firezone_tunnel.apps.portal.hub import Hub
from firezone_tunnel.apps.portal.state import PortalState
from firezone_tunnel.apps.portal.store import Store
from firezone_tunnel.apps.portal.web import PortalFactory
from firezone_tunnel.core.portal.account import Account
from firezone_tunnel.core.portal.flows import FlowAuthorizer
from firezone_tunnel.core.sansio import Entropy, SocketAddress
from firezone_tunnel.errors import ConfigurationError, InUseError, PlatformError, one_line
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.process.seed_file import load_seed
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime, utc
from firezone_tunnel.shell.reactor.service import Service

_LOGGED_WARNINGS = 20
_PEM_BEGIN = "-----BEGIN CERTIFICATE-----"


class PortalService(Service):
    """Serves the configuration in `seed_path` on `listen`; `reload()` rereads the file.

    `ready` fires with the listening port, or fails with a FirezoneError in one sentence.
    """

    name = "portal"

    def __init__(
        self,
        reactor: Any,
        *,
        listen: tuple[str, int],
        seed_path: str | Path,
        database: str | Path,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        entropy: Entropy = os.urandom,
        now: Callable[[], float] = boottime,
        utc_now: Callable[[], float] = utc,
    ) -> None:
        """
        :param listen: IP address and port; port 0 for any free port.
        :param seed_path: TOML file with everything that the portal serves.
        :param database: SQLite file for state that must survive a restart.
        :param tls_cert: PEM file with the certificate and its chain; `tls_key` has the private key. Default: no TLS.
        :param entropy: random bytes; `now` and `utc_now` are the clocks in seconds. Only tests replace these.
        """
        self.ready: Deferred[IListeningPort] = Deferred()
        self.hub: Hub | None = None
        self._reactor = reactor
        self._listen = SocketAddress(*listen)
        self._seed_path = str(seed_path)
        self._tls = (tls_cert, tls_key)
        self._store = Store(reactor, str(database), entropy)
        self._entropy = entropy
        self._clocks = (now, utc_now)
        self._lock = DeferredLock()  # a stop waits for a start in progress
        self._port: IListeningPort | None = None
        self._timer: BoottimeTimer | None = None

    def startService(self) -> None:
        super().startService()
        started = self._lock.run(lambda: Deferred.fromCoroutine(self._start()))
        started.addCallbacks(self.ready.callback, self.ready.errback)

    def stopService(self) -> Deferred[None]:
        super().stopService()
        return self._lock.run(lambda: Deferred.fromCoroutine(self._stop()))

    def reload(self) -> Deferred[bool]:
        """Reread the seed file and push the changes to the peers. False: it is invalid, and nothing has changed."""
        return Deferred.fromCoroutine(self._reload())

    async def _start(self) -> IListeningPort:
        """Raises: FirezoneError."""
        account = self._load_seed()
        endpoint = self._endpoint()
        await self._store.open()
        now, utc_now = self._clocks
        flows = FlowAuthorizer(
            reference_key=await self._store.secret("reference"),
            ingest_key=await self._store.secret("ingest"),
            entropy=self._entropy,
        )
        state = PortalState(account, self._store, flows, self._entropy, now, utc_now)
        self._timer = BoottimeTimer(self._reactor, self.handle_timeout)
        self.hub = Hub(state, self._set_timer)
        await self.hub.review_flows()
        self._port = await _listen(endpoint, PortalFactory(self._reactor, self.hub), self._listen)
        self._set_timer()
        address: Any = self._port.getHost()
        log.info("portal:listening", host=address.host, port=address.port, tls=self._tls[0] is not None)
        return self._port

    def _load_seed(self) -> Account:
        """Raises: ConfigurationError."""
        account, warnings = load_seed(self._seed_path)
        for what in warnings[:_LOGGED_WARNINGS]:
            log.warning("portal:seed_incomplete", path=self._seed_path, reason=what)
        if len(warnings) > _LOGGED_WARNINGS:
            more = f"{len(warnings) - _LOGGED_WARNINGS} more: firezone-tunnel portal check prints them"
            log.warning("portal:seed_incomplete", path=self._seed_path, reason=more)
        return account

    async def _stop(self) -> None:
        if self._timer is not None:
            self._timer.close()
        if self._port is not None:
            await maybeDeferred(self._port.stopListening)
        if self.hub is not None:
            self.hub.close_all()
        await self._store.close()

    async def _reload(self) -> bool:
        assert self.hub is not None
        try:
            account = self._load_seed()
        except ConfigurationError as error:
            log.error("portal:seed_rejected", path=self._seed_path, reason=one_line(error))
            return False
        try:
            await self.hub.apply(account)
        except PlatformError as error:  # peers know already; the next start reviews the store again
            log.error("portal:store_failed", reason=one_line(error))
            return False
        log.info("portal:seed_reloaded", path=self._seed_path)
        return True

    def handle_timeout(self) -> None:
        """A deadline has passed. Called by the timer, and by tests that move the clock."""
        assert self.hub is not None
        work = Deferred.fromCoroutine(self.hub.handle_timeout(self._clocks[0]()))
        work.addErrback(self._log_failure).addCallback(lambda _: self._set_timer())

    def _log_failure(self, failure: Failure) -> None:
        """A service's boundary: a failure must not stop later deadlines."""
        log.error("portal:timeout_failed", reason=failure.getErrorMessage(), traceback=failure.getTraceback())

    def _set_timer(self) -> None:
        if self._timer is not None and self.hub is not None and self.running:
            self._timer.set(self.hub.next_timeout().at)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<{type(self).__name__}: {self._seed_path}, {self._listen}, {state}>"

    def _endpoint(self) -> IStreamServerEndpoint:
        """Raises: ConfigurationError."""
        host, port = self._listen
        cert, key = self._tls
        if (cert is None) is not (key is None):
            raise ConfigurationError("TLS needs both --tls-cert and --tls-key, but only one is given")
        if cert is not None and key is not None:
            options = _certificate_options(cert, key)
            return SSL4ServerEndpoint(self._reactor, port, options, interface=host)
        endpoint = TCP6ServerEndpoint if self._listen.is_ipv6 else TCP4ServerEndpoint
        return endpoint(self._reactor, port, interface=host)


async def _listen(endpoint: IStreamServerEndpoint, factory: PortalFactory, address: SocketAddress) -> IListeningPort:
    try:
        return await endpoint.listen(factory)
    except CannotListenError as error:
        reason = error.socketError
        what = f"can't listen on {address}: {getattr(reason, 'strerror', None) or reason}"
        kind = InUseError if getattr(reason, "errno", None) == errno.EADDRINUSE else PlatformError
        raise kind(f"{what}; choose another --listen") from error


def _pem_certificates(text: str) -> list[crypto.X509]:
    """The certificates of a PEM file, the server's own first, as chains are written."""
    blocks = text.split(_PEM_BEGIN)[1:]
    return [crypto.load_certificate(crypto.FILETYPE_PEM, (_PEM_BEGIN + block).encode()) for block in blocks]


def _certificate_options(cert: str | Path, key: str | Path) -> CertificateOptions:
    """Raises: ConfigurationError."""
    try:
        chain = _pem_certificates(Path(cert).read_text())
        private = crypto.load_privatekey(crypto.FILETYPE_PEM, Path(key).read_bytes())
        if not chain:
            raise ConfigurationError(f"{cert} contains no certificate in PEM format")
        options = CertificateOptions(privateKey=private, certificate=chain[0], extraCertChain=chain[1:])
        options.getContext()
    except OSError as error:
        raise ConfigurationError(f"can't read {error.filename}: {error.strerror}") from error
    except (SSL.Error, crypto.Error, ValueError) as error:
        raise ConfigurationError(f"{cert} and {key} are not a certificate and its private key in PEM format") from error
    return options

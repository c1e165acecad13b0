"""`twistd firezone-portal`."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from firezone_tunnel.portal.service import PortalService
from firezone_tunnel.runtime.process import ApplicationService, Process
from firezone_tunnel.runtime.settings import LOG_SETTINGS, Setting
from firezone_tunnel.runtime.settings import Options as CommonOptions
from firezone_tunnel.sansio import SocketAddress


class Options(CommonOptions):
    """The seed file says who may reach what; SIGHUP re-reads it."""

    settings = (
        Setting(
            "listen",
            "address and port to listen on",
            variables=("FIREZONE_PORTAL_LISTEN",),
            default="127.0.0.1:8081",
            parse=SocketAddress.parse,
        ),
        Setting("seed", "TOML file that says what is served", variables=("FIREZONE_PORTAL_SEED",), is_required=True),
        Setting(
            "database",
            "SQLite file for what must survive a restart",
            variables=("FIREZONE_PORTAL_DATABASE",),
            default="firezone-portal.sqlite3",
        ),
        Setting("tls-cert", "PEM file: the certificate, then its chain", variables=("FIREZONE_PORTAL_TLS_CERT",)),
        Setting("tls-key", "PEM file: its private key", variables=("FIREZONE_PORTAL_TLS_KEY",)),
        *LOG_SETTINGS,
    )


class Application(ApplicationService):
    """A portal for as long as the process lives."""

    def __init__(self, reactor: Any, options: Options) -> None:
        process = Process(reactor, "firezone-portal")
        super().__init__(
            process,
            log_level=options["log-level"],
            log_format=options["log-format"],
            log_directory=options["log-dir"],
        )
        self._portal = PortalService(
            reactor,
            listen=options["listen"],
            seed_path=options["seed"],
            database=options["database"],
            tls_cert=options["tls-cert"],
            tls_key=options["tls-key"],
        )
        process.on_hangup(self._portal.reload)

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self._portal.ready.addCallbacks(lambda _: self.process.ready(), self._failed)
        self._portal.startService()

    def stopService(self) -> Deferred[Any]:
        super().stopService()  # type: ignore[no-untyped-call]
        return self._portal.stopService()

    def _failed(self, failure: Failure) -> None:
        error: Any = failure.value
        self.process.fail(error)


def make_service(reactor: Any, options: Options) -> Application:
    return Application(reactor, options)

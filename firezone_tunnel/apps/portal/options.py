"""`twistd firezone-portal`."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.apps.portal.service import PortalService
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.shell.process.application import ApplicationService
from firezone_tunnel.shell.process.settings import LOG_SETTINGS, Setting
from firezone_tunnel.shell.process.settings import Options as CommonOptions


class Options(CommonOptions):
    """The seed file defines who may reach what; SIGHUP reloads it."""

    settings = (
        Setting(
            "listen",
            "address and port to listen on",
            variables=("FIREZONE_PORTAL_LISTEN",),
            default="127.0.0.1:8081",
            parse=SocketAddress.parse,
        ),
        Setting(
            "seed",
            "TOML file that defines sites, tokens, resources and policies",
            variables=("FIREZONE_PORTAL_SEED",),
            is_required=True,
        ),
        Setting(
            "database",
            "SQLite file for state that survives restarts",
            variables=("FIREZONE_PORTAL_DATABASE",),
            default="firezone-portal.sqlite3",
        ),
        Setting(
            "tls-cert",
            "PEM file with the TLS certificate, followed by its chain",
            variables=("FIREZONE_PORTAL_TLS_CERT",),
        ),
        Setting("tls-key", "PEM file with the certificate's private key", variables=("FIREZONE_PORTAL_TLS_KEY",)),
        *LOG_SETTINGS,
    )


class Application(ApplicationService):
    """A portal that runs until the process ends."""

    def __init__(self, reactor: Any, options: Options) -> None:
        self._portal = PortalService(
            reactor,
            listen=options["listen"],
            seed_path=options["seed"],
            database=options["database"],
            tls_cert=options["tls-cert"],
            tls_key=options["tls-key"],
        )
        super().__init__(reactor, "firezone-portal", options, self._portal)
        self.process.on_hangup(self._portal.reload)

    async def watch(self) -> None:
        await self._portal.ready
        self.process.ready()


def make_service(reactor: Any, options: Options) -> Application:
    return Application(reactor, options)

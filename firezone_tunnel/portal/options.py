"""The portal's command line: `twistd firezone-portal` (environment variables stand in for what is not given)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from twisted.python.usage import Options, UsageError

from firezone_tunnel.logs.events import LEVELS
from firezone_tunnel.portal.service import PortalService
from firezone_tunnel.sansio import SocketAddress

_DEFAULTS = {
    "listen": "127.0.0.1:8081",
    "seed": None,
    "database": "firezone-portal.sqlite3",
    "tls-cert": None,
    "tls-key": None,
    "log-format": "human",
    "log-level": "info",
}
_LOG_FORMATS = ("human", "json")


class PortalOptions(Options):
    """`environment` replaces the process's own in tests."""

    optParameters: ClassVar = [
        ["listen", None, None, "address and port to listen on [default: 127.0.0.1:8081]"],
        ["seed", None, None, "TOML file that says what is served; SIGHUP re-reads it"],
        ["database", None, None, "SQLite file [default: ./firezone-portal.sqlite3]"],
        ["tls-cert", None, None, "PEM file: the certificate, then its chain"],
        ["tls-key", None, None, "PEM file: its private key"],
        ["log-format", None, None, "human or json [default: human]"],
        ["log-level", None, None, "debug, info, warn or error [default: info]"],
    ]

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._environment = environment

    def postOptions(self) -> None:
        """Raises: UsageError."""
        for name, default in _DEFAULTS.items():
            if self[name] is None:
                variable = f"FIREZONE_PORTAL_{name.upper().replace('-', '_')}"
                self[name] = self._environment.get(variable, default)
        if self["seed"] is None:
            raise UsageError("--seed (or FIREZONE_PORTAL_SEED) must name the TOML file that says what is served")
        if self["log-format"] not in _LOG_FORMATS:
            raise UsageError(f"--log-format is one of {', '.join(_LOG_FORMATS)}")
        if self["log-level"] not in LEVELS:
            raise UsageError(f"--log-level is one of {', '.join(LEVELS)}")
        try:
            self["listen"] = SocketAddress.parse(self["listen"])
        except ValueError as error:
            raise UsageError(f"--listen: {error}") from error


def make_service(reactor: Any, options: PortalOptions) -> PortalService:
    return PortalService(
        reactor,
        listen=options["listen"],
        seed_path=options["seed"],
        database=options["database"],
        tls_cert=options["tls-cert"],
        tls_key=options["tls-key"],
    )

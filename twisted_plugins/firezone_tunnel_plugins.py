"""What `twistd --help` lists. Twisted reads this file whatever it is asked for: nothing is imported before its use."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from twisted.application.service import IService, IServiceMaker
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IServiceMaker)
class _Application:
    """One application, whose package has `options.Options` and `options.make_service`."""

    def __init__(self, role: str, description: str) -> None:
        self.tapname = f"firezone-{role}"
        self.description = description
        self._module = f"firezone_tunnel.apps.{role}.options"

    @property
    def options(self) -> Any:
        return self._load().Options

    def makeService(self, options: Any) -> IService:
        from twisted.internet import reactor

        from firezone_tunnel.errors import FirezoneError

        try:
            service: IService = self._load().make_service(reactor, options)
        except FirezoneError as error:
            print(f"{self.tapname}: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        return service

    def _load(self) -> ModuleType:
        """Import the application, at least cost.

        What an import makes remains, so garbage collections would find next to nothing. And numpy would start a thread
        for each processor, but none of our arrays takes part in linear algebra.
        """
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        gc.disable()
        try:
            return import_module(self._module)
        finally:
            gc.enable()


client = _Application("client", "Reaches a company's resources through Firezone gateways.")
gateway = _Application("gateway", "Lets authorized clients reach the resources of a site.")
relay = _Application("relay", "Carries datagrams between clients and gateways that no direct path joins.")
portal = _Application("portal", "Says who may reach what, and introduces clients to gateways.")

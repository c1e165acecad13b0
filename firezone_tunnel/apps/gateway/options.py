"""`twistd firezone-gateway`."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.apps.gateway.service import GatewayService
from firezone_tunnel.shell.portal_link.service import trust_from_file
from firezone_tunnel.shell.portal_link.url import LoginUrl, default_name
from firezone_tunnel.shell.process.application import ApplicationService
from firezone_tunnel.shell.process.health import HealthServer
from firezone_tunnel.shell.process.identity import load_identity
from firezone_tunnel.shell.process.settings import (
    HEALTH_CHECK_ADDR,
    LOG_SETTINGS,
    MAX_PARTITION_TIME,
    device_settings,
    read_token,
)
from firezone_tunnel.shell.process.settings import Options as CommonOptions
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig
from firezone_tunnel.shell.tun.device import DEFAULT_NAME

_IDENTITY_FILE = "gateway_id"


class Options(CommonOptions):
    """The token comes from FIREZONE_TOKEN, a systemd credential or a file, never from the command line."""

    settings = (
        *device_settings(
            interface=DEFAULT_NAME, token="/etc/firezone/gateway-token", state_directory="/var/lib/firezone"
        ),
        HEALTH_CHECK_ADDR,
        MAX_PARTITION_TIME,
        *LOG_SETTINGS,
    )


class Application(ApplicationService):
    """A gateway that runs until the process ends."""

    def __init__(self, reactor: Any, options: Options, config: EndpointConfig) -> None:
        self._gateway = GatewayService(reactor, config)
        health = HealthServer(reactor, options["health-check-addr"], lambda: self._gateway.is_ready)
        super().__init__(reactor, "firezone-gateway", options, health, self._gateway)

    async def watch(self) -> None:
        self._gateway.ready.addCallback(lambda _: self.process.ready())
        raise await self._gateway.failed


def make_service(reactor: Any, options: Options) -> Application:
    """
    Raises: ConfigurationError.
    """
    ca_file = options["ca-file"]
    config = EndpointConfig(
        url=LoginUrl.gateway(
            options["api-url"],
            read_token(options.environment, options["token-path"]),
            device_id=options["firezone-id"] or load_identity(options["state-dir"] / _IDENTITY_FILE),
            name=options["firezone-name"] or default_name(),
        ),
        state_directory=options["state-dir"],
        interface=options["interface"],
        trust=None if ca_file is None else trust_from_file(ca_file),
        max_partition_time=options["max-partition-time"],
    )
    return Application(reactor, options, config)

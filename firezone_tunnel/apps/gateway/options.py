"""`twistd firezone-gateway`."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.apps.gateway.service import DEFAULT_STATE_DIRECTORY, GatewayService
from firezone_tunnel.shell.process.application import ApplicationService
from firezone_tunnel.shell.process.health import HealthServer
from firezone_tunnel.shell.process.settings import (
    HEALTH_CHECK_ADDR,
    LOG_SETTINGS,
    MAX_PARTITION_TIME,
    device_settings,
    read_token,
)
from firezone_tunnel.shell.process.settings import Options as CommonOptions
from firezone_tunnel.shell.tun.device import DEFAULT_NAME


class Options(CommonOptions):
    """The token comes from FIREZONE_TOKEN, a systemd credential or a file, never from the command line."""

    settings = (
        *device_settings(
            interface=DEFAULT_NAME, token="/etc/firezone/gateway-token", state_directory=str(DEFAULT_STATE_DIRECTORY)
        ),
        HEALTH_CHECK_ADDR,
        MAX_PARTITION_TIME,
        *LOG_SETTINGS,
    )


class Application(ApplicationService):
    """A gateway that runs until the process ends."""

    def __init__(self, reactor: Any, options: Options, gateway: GatewayService) -> None:
        self._gateway = gateway
        health = HealthServer(reactor, options["health-check-addr"], gateway.obstacles)
        super().__init__(reactor, "firezone-gateway", options, health, self._gateway)
        self.process.on_forced_end(gateway.free_host)

    async def watch(self) -> None:
        self._gateway.ready.addCallback(lambda _: self.process.ready())
        raise await self._gateway.failed


def make_service(reactor: Any, options: Options) -> Application:
    """
    Raises: ConfigurationError.
    """
    gateway = GatewayService(
        reactor,
        url=options["api-url"],
        token=read_token(options.environment, options["token-path"]),
        device_id=options["firezone-id"],
        name=options["firezone-name"],
        state_directory=options["state-dir"],
        interface=options["interface"],
        ca_file=options["ca-file"],
        max_partition_time=options["max-partition-time"],
    )
    return Application(reactor, options, gateway)

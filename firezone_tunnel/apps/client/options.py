"""`twistd firezone-client`: the headless client."""

from __future__ import annotations

from typing import Any

import attrs

from firezone_tunnel.apps.client.events import Disconnected, EventStream, TunInterfaceUpdated
from firezone_tunnel.apps.client.service import ClientService
from firezone_tunnel.apps.client.session import DEFAULT_STATE_DIRECTORY, IDENTITY_FILE, Session
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.portal_link.service import trust_from_file
from firezone_tunnel.shell.portal_link.url import LoginUrl, default_name
from firezone_tunnel.shell.process.application import ApplicationService
from firezone_tunnel.shell.process.identity import load_identity
from firezone_tunnel.shell.process.settings import (
    LOG_SETTINGS,
    MAX_PARTITION_TIME,
    Setting,
    device_settings,
    read_token,
)
from firezone_tunnel.shell.process.settings import Options as CommonOptions
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig
from firezone_tunnel.shell.tun.device import DEFAULT_NAME


def parse_dns_control(text: str) -> str:
    """
    Raises: ValueError.
    """
    if text != "disabled":
        raise ValueError(f"{text!r} is not supported yet: only disabled is")
    return text


class Options(CommonOptions):
    """The token comes from FIREZONE_TOKEN, a systemd credential or a file, never from the command line."""

    settings = (
        *device_settings(
            interface=DEFAULT_NAME,
            token="/etc/dev.firezone.client/token",
            state_directory=str(DEFAULT_STATE_DIRECTORY),
        ),
        Setting(
            "dns-control",
            "how to configure the host's DNS; only disabled is supported",
            variables=("FIREZONE_DNS_CONTROL",),
            default="disabled",
            parse=parse_dns_control,
        ),
        attrs.evolve(
            MAX_PARTITION_TIME,
            help="exit after this long without the portal, such as 1h or 30d [default: never]",
            variables=("MAX_PARTITION_TIME",),
            default=None,
        ),
        Setting("check", "check the configuration and exit", is_flag=True),
        Setting("exit", "exit as soon as the tunnel is up", is_flag=True),
        *LOG_SETTINGS,
    )


class Application(ApplicationService):
    """A session that lasts until the process ends."""

    def __init__(self, reactor: Any, options: Options, config: EndpointConfig) -> None:
        client = ClientService(reactor, config)
        super().__init__(reactor, "firezone-client", options, client)
        self.process.on_forced_end(client.free_host)
        self.process.on_hangup(lambda: Session(client).reset("SIGHUP"))
        self._events = EventStream(client.events)
        self._exit_when_ready = options["exit"]

    async def watch(self) -> None:
        is_ready = False
        async for event in self._events:
            match event:
                case TunInterfaceUpdated() if not is_ready:
                    is_ready = True
                    log.info("client:tunnel_ready", ipv4=str(event.ipv4), ipv6=str(event.ipv6))
                    self.process.ready()
                    if self._exit_when_ready:
                        self.process.stop()
                case Disconnected(error):
                    raise error


def make_service(reactor: Any, options: Options) -> Application:
    """
    Raises: ConfigurationError; SystemExit with 0 after `--check`.
    """
    ca_file = options["ca-file"]
    config = EndpointConfig(
        url=LoginUrl.client(
            options["api-url"],
            read_token(options.environment, options["token-path"]),
            device_id=options["firezone-id"] or load_identity(options["state-dir"] / IDENTITY_FILE),
            name=options["firezone-name"] or default_name(),
        ),
        state_directory=options["state-dir"],
        interface=options["interface"],
        trust=None if ca_file is None else trust_from_file(ca_file),
        max_partition_time=options["max-partition-time"],
    )
    if options["check"]:
        print("check passed")
        raise SystemExit(0)
    return Application(reactor, options, config)

"""`twistd firezone-relay`."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from firezone_tunnel.apps.relay.service import RelayService
from firezone_tunnel.core.relay.peer_policy import PRIVATE, Network
from firezone_tunnel.core.stun.message import FIREZONE_REALM
from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.process.application import ApplicationService
from firezone_tunnel.shell.process.health import HealthServer
from firezone_tunnel.shell.process.settings import (
    API_URL,
    CA_FILE,
    FIREZONE_NAME,
    HEALTH_CHECK_ADDR,
    LOG_SETTINGS,
    MAX_PARTITION_TIME,
    Setting,
    check_private,
    parse_duration,
    read_token,
    token_path,
)
from firezone_tunnel.shell.process.settings import Options as CommonOptions

MAX_WORKERS = 64


def parse_port(text: str) -> int:
    """
    Raises: ValueError.
    """
    if not text.isdecimal() or not 0 < int(text) <= 0xFFFF:
        raise ValueError(f"{text!r} is not a valid port")
    return int(text)


def parse_limit(text: str) -> int:
    """Parse a limit; 0 means no limit.

    Raises: ValueError.
    """
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a number")
    return int(text)


def parse_workers(text: str) -> int:
    """
    Raises: ValueError.
    """
    if not text.isdecimal() or not 0 < int(text) <= MAX_WORKERS:
        raise ValueError(f"{text!r} is not a number from 1 to {MAX_WORKERS}")
    return int(text)


def parse_ipv4(text: str) -> str:
    """
    Raises: ValueError.
    """
    return str(ipaddress.IPv4Address(text))


def parse_ipv6(text: str) -> str:
    """
    Raises: ValueError.
    """
    return str(ipaddress.IPv6Address(text))


def parse_networks(text: str) -> tuple[Network, ...]:
    """Parse comma-separated networks; "private" stands for all private networks.

    Raises: ValueError.
    """
    networks: list[Network] = []
    for name in text.replace(",", " ").split():
        networks += PRIVATE if name == "private" else [ipaddress.ip_network(name)]
    return tuple(networks)


class Options(CommonOptions):
    """A relay of a Firezone portal or, with --users-file, a TURN server for the users in that file.

    The token comes by FIREZONE_TOKEN, by a file, or as a systemd credential: never on the command line.
    """

    settings = (
        Setting("public-ip4-addr", "public IPv4 address of this relay", ("PUBLIC_IP4_ADDR",), parse=parse_ipv4),
        Setting("public-ip6-addr", "public IPv6 address of this relay", ("PUBLIC_IP6_ADDR",), parse=parse_ipv6),
        Setting("bind-ip4-addr", "IPv4 address to listen on", ("BIND_IP4_ADDR",), "0.0.0.0", parse=parse_ipv4),
        Setting("bind-ip6-addr", "IPv6 address to listen on", ("BIND_IP6_ADDR",), "::", parse=parse_ipv6),
        Setting(
            "listen-port",
            "port to listen on; Firezone's peers require 3478",
            ("LISTEN_PORT",),
            "3478",
            parse=parse_port,
        ),
        Setting("lowest-port", "lowest port for allocations", ("LOWEST_PORT",), "49152", parse=parse_port),
        Setting("highest-port", "highest port for allocations", ("HIGHEST_PORT",), "65535", parse=parse_port),
        API_URL,
        token_path("/etc/firezone/relay-token"),
        attrs.evolve(FIREZONE_NAME, help="name of this relay in the portal"),
        CA_FILE,
        attrs.evolve(MAX_PARTITION_TIME, short=None),
        Setting(
            "users-file",
            "serve the users in this file, readable only by its owner, instead of a portal; each line is name:password",
            variables=("FIREZONE_RELAY_USERS_FILE",),
            parse=Path,
        ),
        Setting("realm", "realm for the users in the file", ("FIREZONE_RELAY_REALM",), FIREZONE_REALM),
        Setting(
            "allow-peers",
            "special-purpose networks to relay to, such as 10.1.0.0/16, or private for all private networks",
            variables=("FIREZONE_RELAY_ALLOW_PEERS",),
            parse=parse_networks,
        ),
        Setting(
            "max-allocations",
            "maximum number of allocations; 0 for no limit",
            ("FIREZONE_RELAY_MAX_ALLOCATIONS",),
            "0",
            parse_limit,
        ),
        Setting(
            "max-allocations-per-user",
            "maximum number of allocations for each user; 0 for no limit",
            ("FIREZONE_RELAY_MAX_ALLOCATIONS_PER_USER",),
            "0",
            parse_limit,
        ),
        Setting(
            "workers",
            "number of processes that share the port; each client stays with one process",
            ("FIREZONE_RELAY_WORKERS",),
            "1",
            parse_workers,
        ),
        Setting(
            "drain-time",
            "how long to serve existing clients after SIGTERM; a second SIGTERM ends the relay immediately",
            variables=("FIREZONE_RELAY_DRAIN_TIME",),
            default="30s",
            parse=parse_duration,
        ),
        HEALTH_CHECK_ADDR,
        *LOG_SETTINGS,
    )


class Application(ApplicationService):
    """A relay that runs until the process ends."""

    def __init__(self, reactor: Any, options: Options, relay: RelayService) -> None:
        self._relay = relay
        health = HealthServer(reactor, options["health-check-addr"], self._relay.obstacles)
        super().__init__(reactor, "firezone-relay", options, health, self._relay)
        self.process.on_second_signal(self._relay.stop_draining)
        self._drain_time = options["drain-time"]

    def stopService(self) -> Deferred[Any] | None:
        self.process.prolong_end(self._drain_time)
        return super().stopService()

    async def watch(self) -> None:
        self._relay.ready.addCallback(lambda _: self.process.ready())
        error = await self._relay.failed
        self._relay.stopService()
        self._relay.stop_draining()  # after a failure or a refusal of the portal, clients can't be served any longer
        raise error


def make_service(reactor: Any, options: Options) -> Application:
    """
    Raises: ConfigurationError.
    """
    users_file = options["users-file"]
    relay = RelayService(
        reactor,
        public_ipv4=options["public-ip4-addr"],
        public_ipv6=options["public-ip6-addr"],
        url=options["api-url"],
        token=None if users_file is not None else read_token(options.environment, options["token-path"]),
        name=options["firezone-name"],
        ca_file=options["ca-file"],
        max_partition_time=options["max-partition-time"],
        users=None if users_file is None else _read_users(users_file),
        realm=options["realm"],
        bind_ipv4=options["bind-ip4-addr"],
        bind_ipv6=options["bind-ip6-addr"],
        listen_port=options["listen-port"],
        lowest_port=options["lowest-port"],
        highest_port=options["highest-port"],
        allow_peers=map(str, options["allow-peers"] or ()),
        max_allocations=options["max-allocations"],
        max_allocations_per_user=options["max-allocations-per-user"],
        workers=options["workers"],
        drain_time=options["drain-time"],
    )
    return Application(reactor, options, relay)


def _read_users(path: Path) -> Mapping[str, str]:
    check_private(path, "users file")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Can't read the users file {path}: {error}") from None
    users: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, colon, password = line.strip().partition(":")
        if not name or not colon:
            if line.strip() and not line.startswith("#"):
                raise ConfigurationError(f"{path}, line {number}: expected name:password")
            continue
        users[name] = password
    if not users:
        raise ConfigurationError(f"{path} lists no users: write one name:password per line")
    return users

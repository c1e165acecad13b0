"""Our own programs on the demo's network, started by twistd."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.system.hosts import Host
from tests.system.network import PORTAL, PRIVATE_NETWORK, PRIVATE_NETWORK_IPV6, RELAYS, Network
from tests.system.programs import Program

PORTAL_PORT = 8081
_PATH_EVENTS = ("tunnel:connection_established", "tunnel:path_changed")
_TWISTD = Path(sys.executable).with_name("twistd")


class Product:
    """The portal, the relays, the gateway and the client, each on its own host of the demo's network."""

    def __init__(self, network: Network, *, relays: Sequence[str] = (), log_level: str = "debug") -> None:
        """`relays` are the relays to start, by their names in `network.RELAYS`."""
        self.network = network
        self._relays = tuple(relays)
        self._log_level = log_level
        self._programs: dict[str, Program] = {}

    @property
    def portal(self) -> Program:
        return self._programs["portal"]

    @property
    def gateway(self) -> Program:
        return self._programs["gateway"]

    @property
    def client(self) -> Program:
        return self._programs["client"]

    def relay(self, name: str = "relay") -> Program:
        return self._programs[name]

    def start(self) -> None:
        """Start the portal, and when it is ready, all other programs at the same time.

        Raises: NotReady.
        """
        self.start_portal()
        for program in [*map(self.spawn_relay, self._relays), self.spawn_gateway(), self.spawn_client()]:
            program.wait_ready()

    def start_sites(self) -> None:
        """Start the gateway and the client at the same time.

        Raises: NotReady.
        """
        for program in (self.spawn_gateway(), self.spawn_client()):
            program.wait_ready()

    def stop_sites(self) -> None:
        """Stop the gateway and the client at the same time."""
        sites = [name for name in ("client", "gateway") if name in self._programs]
        for name in sites:
            self._programs[name].terminate()
        for name in sites:
            self._stop(name)

    def starts(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """The functions that start the programs, by name and in order."""
        relays = ((name, partial(self.start_relay, name)) for name in self._relays)
        return (
            ("portal", self.start_portal),
            *relays,
            ("gateway", self.start_gateway),
            ("client", self.start_client),
        )

    def start_portal(self) -> None:
        host = self.network.portal
        seed = host.directory / "portal.toml"
        seed.write_text(SEED)
        database = str(host.state_directory / "portal.sqlite3")
        address = "[::]" if "v6" in self.network.nat else PORTAL
        arguments = ("--listen", f"{address}:{PORTAL_PORT}", "--seed", str(seed), "--database", database)
        self._spawn(host, "portal", *arguments).wait_ready()

    def start_relay(self, name: str = "relay") -> None:
        self.spawn_relay(name).wait_ready()

    def spawn_relay(self, name: str = "relay") -> Program:
        """Start a relay without waiting for it."""
        ipv4, ipv6 = RELAYS[name]
        environment = {
            "FIREZONE_TOKEN": RELAY_TOKEN,
            "PUBLIC_IP4_ADDR": ipv4,
            "PUBLIC_IP6_ADDR": ipv6,
            "FIREZONE_RELAY_DRAIN_TIME": "2s",  # the allocations of killed clients remain
        }
        return self._spawn(self.network.relay(name), name, application="relay", environment=environment)

    def start_gateway(self) -> None:
        self.spawn_gateway().wait_ready()

    def spawn_gateway(self) -> Program:
        """Start the gateway without waiting for it."""
        host = self.network.gateway
        return self._spawn(host, "gateway", *_own_paths(host), environment={"FIREZONE_TOKEN": GATEWAY_TOKEN})

    def start_client(self, **environment: str) -> None:
        self.spawn_client(**environment).wait_ready()

    def spawn_client(self, **environment: str) -> Program:
        """Start the client without waiting for it."""
        host = self.network.client
        arguments = (*_own_paths(host), "--dns-control", "disabled")
        return self._spawn(host, "client", *arguments, environment={"FIREZONE_TOKEN": CLIENT_TOKEN, **environment})

    def restart_gateway(self) -> None:
        """Restart the gateway, without connections and keys. Returns when it is ready."""
        self._stop("gateway")
        self.start_gateway()

    def restart_client(self) -> None:
        """Restart the client, without connections and keys. Returns when it is ready."""
        self._stop("client")
        self.start_client()

    def connection(self) -> Mapping[str, Any]:
        """The client's log message on its newest connection to a gateway: path, local and remote address."""
        self.client.wait_for("tunnel:connection_established")
        return list(self.client.events("tunnel:connection_established"))[-1]

    def path(self) -> Mapping[str, Any]:
        """The client's log message on its current path: "direct" or "relayed", local and remote address."""
        self.client.wait_for("tunnel:connection_established")
        return [event for event in self.client.events() if event.get("message_type") in _PATH_EVENTS][-1]

    def wait_settled(self, seconds: float = 2.5, timeout: float = 15.0) -> None:
        """Wait until the client has used one path for so many seconds. A better path is usually found quickly.

        Raises: NotReady.
        """
        self.client.wait_until(
            lambda: time.time() - self.path()["timestamp"] >= seconds, f"keeping to one path for {seconds:g} s", timeout
        )

    def wait_path(self, path: str, timeout: float = 10.0) -> None:
        """Wait until the client uses a path of this kind, "direct" or "relayed".

        Raises: NotReady.
        """
        self.client.wait_until(lambda: self.path()["path"] == path, f"using a {path} path", timeout)

    def wait_rejoined(self, timeout: float) -> None:
        """Wait until all programs have joined the portal a second time.

        Raises: NotReady.
        """
        for name, program in self._programs.items():
            if name != "portal":
                program.wait_until(partial(_has_rejoined, program), "joining the portal again", timeout)

    def stop(self) -> dict[str, int]:
        """Stop the client, the gateway, the relays and the portal, in this order. Returns their exit codes."""
        order = ("client", "gateway", *RELAYS, "portal")
        return {name: self._stop(name) for name in order if name in self._programs}

    def _spawn(
        self,
        host: Host,
        name: str,
        *arguments: str,
        application: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        common = {
            "FIREZONE_API_URL": f"ws://{self.network.portal_host(host)}:{PORTAL_PORT}",
            "FIREZONE_NAME": name,
            "FIREZONE_LOG_FORMAT": "json",
            "FIREZONE_LOG_LEVEL": self._log_level,
        }
        command = (str(_TWISTD), "-n", "--pidfile=", f"firezone-{application or name}", *arguments)
        program = host.spawn(name, *command, environment=common | dict(environment or {}))
        self._programs[name] = program
        return program

    def _stop(self, name: str) -> int:
        program = self._programs.pop(name)
        for host in self.network.lab.hosts.values():
            if program in host.programs:
                host.programs.remove(program)
        return program.stop()


def _has_rejoined(program: Program) -> bool:
    return len(list(program.events("portal:joined"))) >= 2


def _own_paths(host: Host) -> tuple[str, ...]:
    """Options for the host's own state directory, which is not shared with the machine or other hosts."""
    return ("--state-dir", str(host.state_directory))


REFUSED_PORT = 5202  # no process listens on it, and the resource's filters do not allow it
CLIENT_TOKEN = "n.client"
GATEWAY_TOKEN = "n.gateway"
RELAY_TOKEN = "n.relay"
SEED = f"""
[account]
name = "Demo"
slug = "demo"

[[sites]]
name = "HQ"

[[groups]]
name = "Everyone"

[[actors]]
name = "Demo User"
groups = ["Everyone"]

[[tokens]]
kind = "client"
actor = "Demo User"
token = "{CLIENT_TOKEN}"

[[tokens]]
kind = "gateway"
site = "HQ"
token = "{GATEWAY_TOKEN}"

[[tokens]]
kind = "relay"
token = "{RELAY_TOKEN}"

[[resources]]
name = "Private network"
type = "cidr"
address = "{PRIVATE_NETWORK}"
site = "HQ"
filters = ["tcp/80", "tcp/5201", "udp/5201", "icmp"]

[[resources]]
name = "Private network, IPv6"
type = "cidr"
address = "{PRIVATE_NETWORK_IPV6}"
site = "HQ"
filters = ["tcp/80", "tcp/5201", "udp/5201", "icmp"]

[[policies]]
group = "Everyone"
resource = "Private network"

[[policies]]
group = "Everyone"
resource = "Private network, IPv6"
"""

"""The competitors: no tunnel, two builds of wireguard-go, and ours, on the same hosts and the same CPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.system.hosts import Host
from tests.system.network import GATEWAY, PRIVATE_NETWORK, Network
from tests.system.product import Product
from tests.system.programs import Program

TUNNEL_MTU = 1280  # the MTU of Firezone's clients and gateways
_WIREGUARD_PORT = 51820
_NEWEST = "golang.zx2c4.com/wireguard"

# The nftables rules for competitors that don't install their own: masquerade packets from the tunnel.
_MASQUERADE = """
table inet benchmark {
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "eth1" masquerade
    }
}
"""


class Ends(NamedTuple):
    """The two processes of a running tunnel."""

    client: Program
    gateway: Program


class Competitor(Protocol):
    """One way to connect the client to the private network."""

    name: str

    def start(self, network: Network) -> None: ...

    def ends(self) -> Ends | None:
        """The tunnel's processes, or None if there is no tunnel."""

    def renew(self) -> None:
        """Restart the tunnel, so that it has no connections and no session keys."""

    def stop(self) -> None: ...


class NoTunnel:
    """Plain forwarding and masquerading, as the reference for the hosts' own performance."""

    name = "no-tunnel"

    def start(self, network: Network) -> None:
        self._network = network
        _forward(network.gateway)
        network.client.ip("route", "add", PRIVATE_NETWORK, "via", GATEWAY)

    def ends(self) -> None:
        return None

    def renew(self) -> None:
        """This competitor keeps no state."""

    def stop(self) -> None:
        self._network.client.ip("route", "del", PRIVATE_NETWORK)
        _stop_forwarding(self._network.gateway)


class WireGuardGo:
    """wireguard-go on both ends, configured by `wg`."""

    def __init__(self, name: str, binary: str) -> None:
        self.name = name
        self.binary = binary
        self._client: Program | None = None
        self._gateway: Program | None = None

    def start(self, network: Network) -> None:
        self._network = network
        self._keys = {host.name: _key_pair(host) for host in (network.client, network.gateway)}
        _forward(network.gateway)
        self._gateway = self._start_end(network.gateway, network.client, "100.64.0.1/11")
        self._start_client()

    def ends(self) -> Ends | None:
        return Ends(self._client, self._gateway) if self._client and self._gateway else None

    def renew(self) -> None:
        self._stop_end(self._network.client, self._client)
        self._start_client()

    def stop(self) -> None:
        self._stop_end(self._network.client, self._client)
        self._stop_end(self._network.gateway, self._gateway)
        _stop_forwarding(self._network.gateway)

    def _start_client(self) -> None:
        network = self._network
        self._client = self._start_end(network.client, network.gateway, "100.64.0.2/11", endpoint=GATEWAY)
        network.client.ip("route", "add", PRIVATE_NETWORK, "dev", _interface(network.client))

    def _start_end(self, host: Host, peer: Host, address: str, endpoint: str | None = None) -> Program:
        interface = _interface(host)
        program = host.spawn("wireguard-go", self.binary, "--foreground", interface, environment={"LOG_LEVEL": "error"})
        program.wait_until(_control_socket(interface).exists, "creating its control socket")
        reach = ["endpoint", f"{endpoint}:{_WIREGUARD_PORT}"] if endpoint else []
        host.run(
            *("wg", "set", interface, "private-key", str(self._keys[host.name].private_file)),
            *("listen-port", str(_WIREGUARD_PORT)),
            *("peer", self._keys[peer.name].public, "allowed-ips", "100.64.0.0/11,10.0.0.0/8", *reach),
        )
        host.add_address(interface, address)
        host.ip("link", "set", interface, "mtu", str(TUNNEL_MTU), "up")
        return program

    def _stop_end(self, host: Host, program: Program | None) -> None:
        if program is not None:
            program.stop()
            host.programs.remove(program)
        with suppress(FileNotFoundError):
            _control_socket(_interface(host)).unlink()


class Ours:
    """The whole product, with portal, policies and filters, and a direct path from client to gateway."""

    name = "ours"

    def start(self, network: Network) -> None:
        self._product = Product(network)
        self._product.start()

    def ends(self) -> Ends:
        return Ends(self._product.client, self._product.gateway)

    def renew(self) -> None:
        self._product.restart_client()

    def stop(self) -> None:
        self._product.stop()


def find_competitors(cache: Path) -> Iterator[Competitor]:
    """The competitors available on this machine, the reference first. Prints why one is missing."""
    yield NoTunnel()
    if (debian := shutil.which("wireguard-go")) is not None:
        yield WireGuardGo("wireguard-go-debian", debian)
    if (newest := _build_newest(cache)) is not None:
        yield WireGuardGo("wireguard-go-newest", str(newest))
    yield Ours()


def version_of(competitor: Competitor) -> str | None:
    """The version of a wireguard-go, from its build information or its output."""
    if not isinstance(competitor, WireGuardGo):
        return None
    if (go := shutil.which("go")) is not None:
        for line in _output(go, "version", "-m", competitor.binary).splitlines():
            words = line.split()
            if words[:2] == ["mod", _NEWEST] and words[2] != "(devel)":
                return words[2]
    first_line = _output(competitor.binary, "--version").splitlines()[:1]
    return first_line[0].split()[-1] if first_line else None


def _build_newest(cache: Path) -> Path | None:
    """Build the newest release of the Go module with the installed toolchain. Returns None if that is not possible."""
    go = shutil.which("go")
    if go is None:
        return None
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "GOBIN": str(cache)}
    built = subprocess.run(
        [go, "install", f"{_NEWEST}@latest"], env=environment, capture_output=True, text=True, check=False
    )
    binary = cache / "wireguard"
    if built.returncode != 0 and not binary.exists():
        print(f"wireguard-go-newest is skipped because it can't be built: {' '.join(built.stderr.split())}")
        return None
    return binary


class _KeyPair(NamedTuple):
    private_file: Path
    public: str


def _key_pair(host: Host) -> _KeyPair:
    private = host.run("wg", "genkey").stdout
    path = host.state_directory / "wireguard-key"
    path.touch(mode=0o600)
    path.write_text(private)
    return _KeyPair(path, host.run("wg", "pubkey", stdin=private).stdout.strip())


def _interface(host: Host) -> str:
    """An interface name that is unique on this machine, because all hosts share one directory of control sockets."""
    return f"fz{os.getpid()}{host.name[0]}"


def _control_socket(interface: str) -> Path:
    return Path("/var/run/wireguard") / f"{interface}.sock"


def _forward(gateway: Host) -> None:
    gateway.sysctl("net.ipv4.ip_forward", "1")
    gateway.run("nft", "-f", "-", stdin=_MASQUERADE)


def _stop_forwarding(gateway: Host) -> None:
    gateway.run("nft", "delete", "table", "inet", "benchmark")
    gateway.sysctl("net.ipv4.ip_forward", "0")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@contextmanager
def running(competitor: Competitor, network: Network) -> Iterator[Competitor]:
    """Start the competitor, and stop it on exit."""
    competitor.start(network)
    try:
        yield competitor
    finally:
        competitor.stop()

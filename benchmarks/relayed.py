"""Benchmarks through a relay, ours and coturn, between our client and gateway, which can't connect directly."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import load
from benchmarks.cases import COTURN, OURS, RELAYED_CASES, Figures, names
from benchmarks.experiment import Wanted, network
from benchmarks.load import LoadFailed
from tests.system.network import GATEWAY, GATEWAY_IPV6, RELAYS, Network
from tests.system.product import Product
from tests.system.programs import Program


class Relayed:
    """Throughput through a relay, and the relay's CPU time."""

    cases = names(RELAYED_CASES)

    def __init__(self, competitor: str) -> None:
        """`competitor` is "ours" or "coturn"."""
        self.competitor = competitor
        self.title = f"relayed by {competitor}"

    def run(self, wanted: Wanted) -> Figures:
        with network() as hosts:
            hosts.client.run("nft", "-f", "-", stdin=_NOT_DIRECTLY)
            with (_ours if self.competitor == OURS else _coturn)(hosts) as relayed:
                return relayed.measure(hosts, wanted)


def is_coturn_present() -> bool:
    return shutil.which("turnserver") is not None


class _Running:
    """A running product; `relay` is the relay's process."""

    def __init__(self, product: Product, relay: Program) -> None:
        self._product = product
        self._relay = relay

    def measure(self, hosts: Network, wanted: Wanted) -> Figures:
        load.first_byte_ms(hosts.client)
        self._check_path()
        figures: Figures = {}
        before, volume = self._relay.cpu_seconds(), 0.0
        for case, reverse in (("relayed-tcp-1-up", False), ("relayed-tcp-1-down", True)):
            if wanted.any_of(case, "relayed-cpu-s-per-gb"):
                transfer = load.tcp(hosts.client, seconds=wanted.seconds, reverse=reverse)
                figures[case] = [transfer.gbit_per_second]
                volume += transfer.gigabytes
        figures["relayed-cpu-s-per-gb"] = [(self._relay.cpu_seconds() - before) / volume]
        self._check_path()
        return {case: values for case, values in figures.items() if case in wanted.cases}

    def _check_path(self) -> None:
        if (path := self._product.path()["path"]) != "relayed":
            raise LoadFailed(f"the path is {path} and does not use the relay")


@contextmanager
def _ours(hosts: Network) -> Iterator[_Running]:
    product = Product(hosts, relays=("relay",))
    product.start()
    yield _Running(product, product.relay())
    product.stop()


@contextmanager
def _coturn(hosts: Network) -> Iterator[_Running]:
    """coturn with one user, announced by our portal to client and gateway. None of our relays is running."""
    ipv4, ipv6 = RELAYS["relay"]
    addresses = (ipv4, ipv6)
    options = ["--lt-cred-mech", f"--user={_USER}:{_PASSWORD}", "--realm=benchmark"]
    options += ["--listening-port=3478", "--min-port=49152", "--max-port=65535"]
    options += [f"--{kind}-ip={address}" for kind in ("listening", "relay") for address in addresses]
    options += [f"--allowed-peer-ip={peers}" for peers in ("203.0.113.0-203.0.113.255", ipv6)]
    options += ["--no-tls", "--no-dtls", "--no-cli", "--no-tcp", "--no-tcp-relay"]
    options += ["--log-file=stdout", "--simple-log", f"--pidfile={hosts.relay().directory}/turnserver.pid"]
    database = hosts.relay().directory / "turndb"
    relay = hosts.relay().spawn("turnserver", "turnserver", "-n", f"--db={database}", *options)
    product = Product(hosts)
    product.start_portal()
    _name_turn_server(hosts, product)
    product.start_gateway()
    product.start_client()
    for end in (product.gateway, product.client):
        end.wait_for("tunnel:relay_allocated")
    yield _Running(product, relay)
    product.stop()


def _name_turn_server(hosts: Network, product: Product) -> None:
    """Add coturn to the portal's seed file and reload it."""
    seed = hosts.portal.directory / "portal.toml"
    seed.write_text(seed.read_text() + _TURN_SERVER)
    product.portal.send_signal(signal.SIGHUP)
    product.portal.wait_for("portal:seed_reloaded")


_USER, _PASSWORD = "benchmark", "benchmark"
_TURN_SERVER = f"""
[[turn_servers]]
name = "{COTURN}"
addresses = ["{RELAYS["relay"][0]}:3478", "[{RELAYS["relay"][1]}]:3478"]
username = "{_USER}"
password = "{_PASSWORD}"
"""
_NOT_DIRECTLY = f"""
table inet benchmark {{
    chain output {{
        type filter hook output priority filter
        meta l4proto udp ip daddr {GATEWAY} drop
        meta l4proto udp ip6 daddr {GATEWAY_IPV6} drop
    }}
}}
"""

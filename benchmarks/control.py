"""The round trip while the control plane or the host's routing is busy."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import load
from benchmarks.cases import CONTROL_CASES, OURS, Figures, names
from benchmarks.changing_portal import READY
from benchmarks.experiment import Wanted, network
from tests.system.network import PORTAL, Network
from tests.system.product import PORTAL_PORT, Product

RESOURCES = 10_000
CHANGES_PER_SECOND = 1_000
ROUTES = 20_000
_PING_INTERVAL = 0.01
_LONGEST_START = 60.0  # seconds
_ROOT = Path(__file__).parents[1]


class Control:
    """Pings during changes of resources, and beside a large routing table in which a route flaps."""

    title = "control plane"
    competitor = OURS
    cases = names(CONTROL_CASES)

    def run(self, wanted: Wanted) -> Figures:
        figures: Figures = {}
        if wanted.any_of("resources-quiet-ping-p99", "resources-changing-ping-p99"):
            for case, changes in (("quiet", 0), ("changing", CHANGES_PER_SECOND)):
                figures[f"resources-{case}-ping-p99"] = [_ping_with_resources(changes, wanted.seconds)]
        if wanted.any_of("routes-quiet-ping-p99", "routes-flapping-ping-p99"):
            figures |= _ping_beside_routes(wanted.seconds)
        return figures


def _ping_with_resources(changes_per_second: int, seconds: float) -> float:
    with network() as hosts:
        command = (sys.executable, "-m", "benchmarks.changing_portal", PORTAL, str(PORTAL_PORT))
        numbers = (str(RESOURCES), str(changes_per_second))
        portal = hosts.portal.spawn("portal", *command, *numbers, environment={"PYTHONPATH": str(_ROOT)})
        portal.wait_until(lambda: READY in portal.output(), "being ready", _LONGEST_START)
        product = Product(hosts)
        product.start_gateway()
        product.spawn_client()
        product.client.wait_until(
            lambda: any(True for _ in product.client.events("client:tunnel_ready")), "being ready", _LONGEST_START
        )
        p99 = _ping(hosts, seconds)
        product.stop()
        return p99


def _ping_beside_routes(seconds: float) -> Figures:
    with network() as hosts:
        lines = (f"route add blackhole 20.0.{number >> 8}.{number & 255}/32\n" for number in range(ROUTES))
        hosts.client.run("ip", "-batch", "-", stdin="".join(lines), timeout=120)
        product = Product(hosts)
        product.start()
        figures = {"routes-quiet-ping-p99": [_ping(hosts, seconds)]}
        flap = "while true; do ip route add blackhole 21.0.0.1; sleep 0.1; ip route del blackhole 21.0.0.1; done"
        flapping = hosts.client.spawn("flapping", "sh", "-c", flap)
        figures["routes-flapping-ping-p99"] = [_ping(hosts, seconds)]
        flapping.stop()
        product.stop()
        return figures


def _ping(hosts: Network, seconds: float) -> float:
    """In ms. The first pings set up the connection, and are not counted."""
    load.Pings(hosts.client, 20, interval=_PING_INTERVAL).round_trips_ms()
    pings = load.Pings(hosts.client, round(seconds / _PING_INTERVAL), interval=_PING_INTERVAL)
    return load.percentile(pings.round_trips_ms(), 99)

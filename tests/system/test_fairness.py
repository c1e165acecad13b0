"""Neither a saturated tunnel nor garbage collection delays other work, and idle programs sleep."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.hosts import Host, Lab
from tests.system.network import IPERF_PORT, SERVER, Network
from tests.system.processes import start
from tests.system.product import Product
from tests.system.programs import Program
from tests.system.test_demo_path import download

pytestmark = pytest.mark.namespaces

_LATE_P999_MS = 100
_HEARTBEAT_INTERVAL = 10.0  # firezone_tunnel.core.phoenix.channel
_IDLE_SECONDS = 10
_WAKES_A_SECOND = 1.5  # with health checks, twisted.web wakes up once per second

# Simulates the garbage collections of a long-running process: a thread runs five full collections per second, each with
# the interpreter lock held throughout.
_COLLECTOR = """
import gc, os, threading, time

def collect():
    longest, count = 0.0, 0
    while True:
        time.sleep(0.2)
        began = time.perf_counter()
        gc.collect()
        longest, count = max(longest, time.perf_counter() - began), count + 1
        with open(os.environ["COLLECTED"], "w") as report:
            report.write(f"{count} {longest}")

threading.Thread(target=collect, daemon=True).start()
"""


@pytest.fixture
def network(lab: Lab) -> Network:
    network = Network(lab)
    network.start_servers()
    return network


@pytest.fixture
def product(network: Network) -> Iterator[Product]:
    product = Product(network)
    product.start()
    yield product
    product.stop()


@pytest.mark.serial
def test_under_full_load_timers_and_heartbeats_are_on_time(network: Network, product: Product) -> None:
    programs = (product.client, product.gateway)

    received = load(network.client, seconds=int(_HEARTBEAT_INTERVAL) + 2)
    product.stop()

    assert received > 50_000_000, "the load was too low"
    for program in programs:
        [lag] = program.events("tunnel:loop_measured")
        assert lag["late_p999_ms"] <= _LATE_P999_MS, lag
        [portal] = program.events("portal:closed")
        assert portal["heartbeats"] >= 1
        assert portal["heartbeat_late_max"] <= _LATE_P999_MS / 1000
        assert list(program.events("portal:connection_lost")) == []
        assert list(program.events("tunnel:connection_failed")) == []


@pytest.mark.serial
def test_full_collections_of_garbage_under_load_hold_nobody_up(network: Network) -> None:
    product = Product(network)
    product.start_portal()
    programs = [collecting(network.gateway, "gateway"), collecting(network.client, "client")]
    for program in programs:
        program.wait_ready()

    received = load(network.client, seconds=5)
    for program in reversed(programs):
        assert program.stop() == 0
    product.stop()

    assert received > 20_000_000, "the load was too low"
    for program, host in zip(programs, (network.gateway, network.client), strict=True):
        count, longest = (host.directory / "collected").read_text().split()
        assert int(count) >= 10
        assert float(longest) * 1000 <= _LATE_P999_MS
        [lag] = program.events("tunnel:loop_measured")
        assert lag["late_p999_ms"] <= _LATE_P999_MS, lag


def test_an_idle_client_and_gateway_sleep(network: Network, product: Product) -> None:
    """Both are connected to the portal but not to each other, so only heartbeats are due."""
    time.sleep(5)  # until the lag measurement and the notifications of new interfaces are over

    assert max(wakes_a_second(product.client, product.gateway)) <= _WAKES_A_SECOND


def test_a_connection_without_traffic_lets_both_sides_sleep(network: Network, product: Product) -> None:
    assert download(network, 1) == 1
    time.sleep(25)  # IDLE_AFTER, and the end of the TCP connection

    assert max(wakes_a_second(product.client, product.gateway)) <= _WAKES_A_SECOND


def load(host: Host, *, seconds: int) -> int:
    """Run eight TCP streams in each direction at full speed. Returns the bytes received."""
    command = ("iperf3", "--client", SERVER, "--port", str(IPERF_PORT), "--parallel", "8", "--bidir", "--json")
    done = host.run(*command, "--time", str(seconds), timeout=seconds + 30)
    end = json.loads(done.stdout)["end"]
    return int(end["sum_received"]["bytes"] + end["sum_received_bidir_reverse"]["bytes"])


def collecting(host: Host, role: str) -> Program:
    """Start one of our programs with permanent garbage collections."""
    directory = host.directory / "collector"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(_COLLECTOR)
    return start(host, role, PYTHONPATH=str(directory), COLLECTED=str(host.directory / "collected"))


def wakes_a_second(*programs: Program) -> list[float]:
    """The wake-ups per second of each process, in all its threads."""
    before = [_wakes(program) for program in programs]
    time.sleep(_IDLE_SECONDS)
    return [(_wakes(program) - first) / _IDLE_SECONDS for program, first in zip(programs, before, strict=True)]


def _wakes(program: Program) -> int:
    statuses = [path.read_text() for path in Path(f"/proc/{program.pid}/task").glob("*/status")]
    lines = [line for status in statuses for line in status.splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

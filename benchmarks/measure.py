"""What is measured, and how: each function loads a running tunnel and returns figures by case."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.competitors import Competitor, Ends
from tests.system.network import IPERF_PORT, SERVER, WEB_PORT, Network

Figures = dict[str, list[float]]
"""Values of one round by case; cases that repeat quickly give several."""


class Case(NamedTuple):
    """One line of the table."""

    name: str
    unit: str
    more_is_better: bool

    def ratio(self, ours: float, peer: float) -> float:
        """How many times better ours is."""
        return ours / peer if self.more_is_better else peer / ours


CASES = (
    Case("tcp-1-up", "Gbit/s", more_is_better=True),
    Case("tcp-1-down", "Gbit/s", more_is_better=True),
    Case("tcp-8-up", "Gbit/s", more_is_better=True),
    Case("tcp-8-down", "Gbit/s", more_is_better=True),
    Case("udp-1200-up", "Gbit/s", more_is_better=True),
    Case("ping-idle", "ms", more_is_better=False),
    Case("ping-load-p99", "ms", more_is_better=False),
    Case("first-byte", "ms", more_is_better=False),
    Case("cpu-s-per-gb", "s", more_is_better=False),
    Case("rss-client", "MB", more_is_better=False),
    Case("rss-gateway", "MB", more_is_better=False),
)

_UDP_OFFERED = "1G"  # bits a second: more than any user-space tunnel here delivers in datagrams of 1200 bytes
_IDLE_PINGS = 200
_FIRST_BYTES = 3  # fresh tunnels a round
_WARM_UP = 1.0  # seconds of load before anything counts: handshake, slow start

# Runs on the client; prints the milliseconds from connect() to the first byte of the answer.
_FETCH_FIRST_BYTE = f"""
import socket, time
start = time.perf_counter()
with socket.create_connection(({SERVER!r}, {WEB_PORT}), timeout=15) as connection:
    connection.sendall(b"GET /bytes?num=1 HTTP/1.0\\r\\n\\r\\n")
    connection.recv(1)
    print((time.perf_counter() - start) * 1000)
"""


class Bench:
    """Measures one started competitor."""

    def __init__(self, network: Network, competitor: Competitor, *, seconds: float, cases: frozenset[str]) -> None:
        self._network = network
        self._competitor = competitor
        self._seconds = seconds
        self._cases = cases

    def measure(self) -> Figures:
        """Every wanted case, cheapest first; memory last, after the load."""
        figures: Figures = {}
        if self._wants("first-byte"):
            figures["first-byte"] = [self._first_byte() for _ in range(_FIRST_BYTES)]
        self._first_byte(renew=False)
        if self._wants("ping-idle"):
            figures["ping-idle"] = [statistics.median(self._finish_ping(self._start_ping(_IDLE_PINGS, interval=0.01)))]
        if self._wants("tcp-1-up", "cpu-s-per-gb"):
            figures |= self._single_stream_up()
        if self._wants("tcp-1-down"):
            figures["tcp-1-down"] = [self._tcp(streams=1, reverse=True)]
        if self._wants("tcp-8-up", "ping-load-p99"):
            figures |= self._eight_streams_up_with_ping()
        if self._wants("tcp-8-down"):
            figures["tcp-8-down"] = [self._tcp(streams=8, reverse=True)]
        if self._wants("udp-1200-up"):
            figures["udp-1200-up"] = [self._udp()]
        if (ends := self._competitor.ends()) is not None:
            figures |= _memory(ends)
        return {case: values for case, values in figures.items() if case in self._cases}

    def _wants(self, *cases: str) -> bool:
        return not self._cases.isdisjoint(cases)

    def _first_byte(self, *, renew: bool = True) -> float:
        """Milliseconds from connect() to the first byte; through a tunnel that has to be set up first (`renew`)."""
        if renew:
            self._competitor.renew()
        return float(self._network.client.run(sys.executable, "-c", _FETCH_FIRST_BYTE).stdout)

    def _single_stream_up(self) -> Figures:
        """Throughput, and the processor time that both ends of the tunnel spend on a gigabyte of it."""
        ends = self._competitor.ends()
        before = _cpu_seconds(ends)
        received = self._iperf("--congestion", "cubic")
        spent = _cpu_seconds(ends) - before
        figures = {"tcp-1-up": [received["bits_per_second"] / 1e9]}
        if ends is not None:
            # The warm-up's bytes are in `spent` too, so they are in the volume.
            volume = received["bytes"] * (1 + _WARM_UP / self._seconds) / 1e9
            figures["cpu-s-per-gb"] = [spent / volume]
        return figures

    def _eight_streams_up_with_ping(self) -> Figures:
        count = int(self._seconds / 0.01)
        ping = self._start_ping(count, interval=0.01)
        throughput = self._tcp(streams=8)
        return {"tcp-8-up": [throughput], "ping-load-p99": [_percentile(self._finish_ping(ping), 99)]}

    def _tcp(self, *, streams: int, reverse: bool = False) -> float:
        """Gbit/s that arrive; cubic on either side, so that the machine's default says nothing."""
        direction = ["--reverse"] if reverse else []
        received = self._iperf("--congestion", "cubic", "--parallel", str(streams), *direction)
        return float(received["bits_per_second"]) / 1e9

    def _udp(self) -> float:
        received = self._iperf("--udp", "--bandwidth", _UDP_OFFERED, "--length", "1200")
        return float(received["bits_per_second"]) / 1e9

    def _iperf(self, *arguments: str) -> dict[str, Any]:
        """What the receiver of an iperf3 run counted: bytes and bits_per_second."""
        duration = ("--time", f"{self._seconds:g}", "--omit", f"{_WARM_UP:g}")
        client = ("iperf3", "--client", SERVER, "--port", str(IPERF_PORT), "--json", *duration, *arguments)
        done = self._network.client.run(*client, check=False, timeout=self._seconds * 3 + 30)
        report = json.loads(done.stdout)
        if "error" in report:
            raise RuntimeError(f"{self._competitor.name}: iperf3 {' '.join(arguments)}: {report['error']}")
        received: dict[str, Any] = report["end"]["sum_received"]
        return received

    def _start_ping(self, count: int, *, interval: float) -> subprocess.Popen[str]:
        command = ("ping", "-n", "-c", str(count), "-i", f"{interval:g}", "-W", "2", SERVER)
        return subprocess.Popen(
            self._network.client.command(*command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def _finish_ping(self, ping: subprocess.Popen[str]) -> list[float]:
        """The round trips, in milliseconds."""
        output, _ = ping.communicate(timeout=60)
        times = [float(value) for value in re.findall(r"time=([\d.]+) ms", output)]
        if not times:
            raise RuntimeError(f"{self._competitor.name}: no ping was answered")
        return times


def _cpu_seconds(ends: Ends | None) -> float:
    return ends.client.cpu_seconds() + ends.gateway.cpu_seconds() if ends is not None else 0.0


def _memory(ends: Ends) -> Figures:
    return {"rss-client": [ends.client.resident_bytes() / 1e6], "rss-gateway": [ends.gateway.resident_bytes() / 1e6]}


def _percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all don't exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]

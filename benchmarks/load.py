"""Loads between the client and the private network's server, and their results."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tests.system.hosts import Host
from tests.system.network import IPERF_PORT, SERVER, WEB_PORT

WARM_UP = 1.0  # seconds of load that are not counted: handshake, slow start

_UDP_OFFERED = "1G"  # bits per second: more than any competitor delivers in datagrams of 1200 bytes

# Runs on the client; prints the milliseconds from connect() to the first byte of the answer.
_FETCH_FIRST_BYTE = """
import socket, sys, time
start = time.perf_counter()
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=15) as connection:
    connection.sendall(b"GET /bytes?num=1 HTTP/1.0\\r\\n\\r\\n")
    connection.recv(1)
    print((time.perf_counter() - start) * 1000)
"""


class LoadFailed(Exception):
    """A load failed; the message names the load and the reason."""


class Transfer(NamedTuple):
    """The result of one transfer."""

    gbit_per_second: float
    """The throughput after the warm-up."""
    gigabytes: float
    """The estimated volume including the warm-up, since CPU time is measured from its beginning."""


def tcp(client: Host, *, seconds: float, streams: int = 1, reverse: bool = False) -> Transfer:
    """TCP with cubic on both sides, independent of the machine's default.

    Raises: LoadFailed.
    """
    direction = ["--reverse"] if reverse else []
    return _iperf(client, seconds, "--congestion", "cubic", "--parallel", str(streams), *direction)


def udp(client: Host, *, seconds: float) -> Transfer:
    """Datagrams of 1200 bytes.

    Raises: LoadFailed.
    """
    return _iperf(client, seconds, "--udp", "--bandwidth", _UDP_OFFERED, "--length", "1200")


def first_byte_ms(client: Host) -> float:
    """Milliseconds from connect() to the first byte of the server's answer.

    Raises: LoadFailed.
    """
    done = client.run(sys.executable, "-c", _FETCH_FIRST_BYTE, SERVER, str(WEB_PORT), check=False)
    if done.returncode != 0:
        raise LoadFailed(f"the first byte did not arrive: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


class Pings:
    """Pings running in the background, one every `interval` seconds."""

    def __init__(self, client: Host, count: int, *, interval: float = 0.01) -> None:
        command = ("ping", "-n", "-c", str(count), "-i", f"{interval:g}", "-W", "2", SERVER)
        self._process = subprocess.Popen(
            client.command(*command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def round_trips_ms(self) -> list[float]:
        """Wait for the last ping.

        Raises: LoadFailed, if no ping was answered.
        """
        output, _ = self._process.communicate(timeout=60)
        times = [float(value) for value in re.findall(r"time=([\d.]+) ms", output)]
        if not times:
            raise LoadFailed("no ping was answered")
        return times


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not exceeded by `percent` of the values."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _iperf(client: Host, seconds: float, *arguments: str) -> Transfer:
    duration = ("--time", f"{seconds:g}", "--omit", f"{WARM_UP:g}")
    command = ("iperf3", "--client", SERVER, "--port", str(IPERF_PORT), "--json", *duration, *arguments)
    try:
        done = client.run(*command, check=False, timeout=seconds * 3 + 30)
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise LoadFailed(f"iperf3 {' '.join(arguments)}: {error}") from error
    if "error" in report:
        raise LoadFailed(f"iperf3 {' '.join(arguments)}: {report['error']}")
    received = report["end"]["sum_received"]
    volume = received["bytes"] * (1 + WARM_UP / seconds) / 1e9
    return Transfer(received["bits_per_second"] / 1e9, volume)

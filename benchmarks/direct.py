"""Benchmarks without a relay: two versions of wireguard-go, ours, and no tunnel."""

from __future__ import annotations

import statistics

from benchmarks import load
from benchmarks.cases import DIRECT_CASES, PING_INTERVALS, Figures, names
from benchmarks.competitors import Competitor, Ends, running
from benchmarks.experiment import Wanted, network
from tests.system.network import Network

_IDLE_SECONDS = 2.0  # for each interval between pings
_MIN_PINGS = 6
_FIRST_BYTES = 5  # new tunnels per round


class Direct:
    """One competitor under every load."""

    cases = names(DIRECT_CASES)

    def __init__(self, competitor: Competitor) -> None:
        self.title = self.competitor = competitor.name
        self._tunnel = competitor

    def run(self, wanted: Wanted) -> Figures:
        with network() as hosts:
            with running(self._tunnel, hosts):
                figures = self._measure(hosts, wanted)
                ends = self._tunnel.ends()
            if wanted.any_of("loop-lag-p999") and ends is not None:
                figures |= _loop_lag(ends)  # the processes log it when they exit
        return {case: values for case, values in figures.items() if case in wanted.cases}

    def _measure(self, hosts: Network, wanted: Wanted) -> Figures:
        """Light loads first; memory last, after all loads."""
        client, seconds = hosts.client, wanted.seconds
        figures: Figures = {}
        if wanted.any_of("first-byte"):
            figures["first-byte"] = [self._fresh_first_byte(hosts) for _ in range(_FIRST_BYTES)]
        load.first_byte_ms(client)
        for name, interval in PING_INTERVALS.items():
            if wanted.any_of(case := f"ping-idle-{name}"):
                pings = load.Pings(client, max(_MIN_PINGS, int(_IDLE_SECONDS / interval)), interval=interval)
                figures[case] = [statistics.median(pings.round_trips_ms())]
        if wanted.any_of("tcp-1-up", "cpu-s-per-gb"):
            figures |= self._single_stream_up(hosts, seconds)
        if wanted.any_of("tcp-1-down"):
            figures["tcp-1-down"] = [load.tcp(client, seconds=seconds, reverse=True).gbit_per_second]
        if wanted.any_of("tcp-8-up", "ping-load-p99", "loop-lag-p999"):
            pings = load.Pings(client, int(seconds / 0.01))
            figures["tcp-8-up"] = [load.tcp(client, seconds=seconds, streams=8).gbit_per_second]
            figures["ping-load-p99"] = [load.percentile(pings.round_trips_ms(), 99)]
        if wanted.any_of("tcp-8-down", "loop-lag-p999"):
            figures["tcp-8-down"] = [load.tcp(client, seconds=seconds, streams=8, reverse=True).gbit_per_second]
        if wanted.any_of("udp-1200-up"):
            figures["udp-1200-up"] = [load.udp(client, seconds=seconds).gbit_per_second]
        if (ends := self._tunnel.ends()) is not None:
            figures["rss-client"] = [ends.client.resident_bytes() / 1e6]
            figures["rss-gateway"] = [ends.gateway.resident_bytes() / 1e6]
        return figures

    def _fresh_first_byte(self, hosts: Network) -> float:
        """The time to the first byte, including the time to set up the tunnel."""
        self._tunnel.renew()
        return load.first_byte_ms(hosts.client)

    def _single_stream_up(self, hosts: Network, seconds: float) -> Figures:
        """Throughput, and the CPU time per gigabyte of both tunnel processes."""
        ends = self._tunnel.ends()
        before = _cpu_seconds(ends)
        transfer = load.tcp(hosts.client, seconds=seconds)
        spent = _cpu_seconds(ends) - before
        figures = {"tcp-1-up": [transfer.gbit_per_second]}
        if ends is not None:
            figures["cpu-s-per-gb"] = [spent / transfer.gigabytes]
        return figures


def _cpu_seconds(ends: Ends | None) -> float:
    return ends.client.cpu_seconds() + ends.gateway.cpu_seconds() if ends is not None else 0.0


def _loop_lag(ends: Ends) -> Figures:
    """The 99.9th percentile of timer delays under all loads, of the worse of the two event loops."""
    measured = [event["late_p999_ms"] for end in ends for event in end.events("tunnel:loop_measured")]
    late = [float(value) for value in measured if value is not None]
    return {"loop-lag-p999": [max(late)]} if late else {}

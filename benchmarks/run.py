"""Compare ours with wireguard-go: `python -m benchmarks.run`, or `make bench`.

Everybody runs on the same hosts, pinned to the same two CPUs; the iperf3 server stands in the gateway's private
network, behind forwarding and masquerade. Rounds alternate between the competitors, so that a machine that slows down
slows everybody down; what counts are ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.competitors import TUNNEL_MTU, Competitor, find_competitors, running, version_of
from benchmarks.measure import CASES, Bench, Figures
from tests.system.hosts import Lab, MissingCapability, enter_user_namespace, require_capabilities
from tests.system.network import Network

_RESULTS = Path(__file__).parent / "results"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firezone-tunnel" / "peers"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    competitors = [one for one in find_competitors(_CACHE) if not options.only or one.name in options.only]
    try:
        if os.geteuid() != 0:
            os.environ["GOPROXY"] = "off"  # in there is no network; the newest wireguard-go is built by now
            enter_user_namespace([sys.executable, "-m", "benchmarks.run", *(arguments or sys.argv[1:])])
        require_capabilities()
    except MissingCapability as missing:
        print(missing, file=sys.stderr)
        return 1
    cpus = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cpus)

    rounds = _run_rounds(competitors, options, console)

    machine = _describe_machine(cpus, competitors, options)
    results = report.medians(rounds)
    report.print_table(console, machine, results)
    report.write_json(_RESULTS / "latest.json", machine, results)
    report.write_plot(_RESULTS / "latest.svg", machine, results)
    console.print(f"written: {_RESULTS / 'latest.json'}, {_RESULTS / 'latest.svg'}", soft_wrap=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these cases")
    parser.add_argument("--only", nargs="+", metavar="COMPETITOR", help="only these, e.g. ours wireguard-go-debian")
    return parser.parse_args(arguments)


def _run_rounds(
    competitors: Sequence[Competitor], options: argparse.Namespace, console: Console
) -> dict[str, list[Figures]]:
    """All figures by competitor, one entry a round; every second round in reverse order."""
    cases = frozenset(options.cases or [case.name for case in CASES])
    rounds: dict[str, list[Figures]] = {competitor.name: [] for competitor in competitors}
    with Lab() as lab:
        network = Network(lab)
        network.start_servers()
        for number in range(options.rounds):
            for competitor in competitors if number % 2 == 0 else reversed(competitors):
                started = time.monotonic()
                with running(competitor, network):
                    figures = Bench(network, competitor, seconds=options.seconds, cases=cases).measure()
                rounds[competitor.name].append(figures)
                console.print(
                    f"round {number + 1} of {options.rounds}, {competitor.name}, {time.monotonic() - started:.0f} s:",
                    _summary(figures),
                    soft_wrap=True,
                )
    return rounds


def _summary(figures: Figures) -> str:
    return ", ".join(f"{case} {sum(values) / len(values):.3g}" for case, values in figures.items())


def _describe_machine(
    cpus: list[int], competitors: Sequence[Competitor], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "pinned_to": cpus,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "congestion_control": "cubic",
        "tunnel_mtu": TUNNEL_MTU,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "peers": {one.name: version for one in competitors if (version := version_of(one)) is not None},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())

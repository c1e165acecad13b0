"""Compare ours with its peers: `python -m benchmarks.run`, or `make bench`.

All competitors run on the same hosts, pinned to the same two CPUs. The iperf3 server is in the gateway's private
network, behind forwarding and masquerading. Each round runs all experiments, so that changes in the machine's speed
affect all competitors; the ratios are what matters. A failed experiment is reported and does not affect the others.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES, COTURN, NATS, OURS, RECOVERY_CASES, REFERENCE, WIREGUARDS, Figures
from benchmarks.competitors import TUNNEL_MTU, Competitor, find_competitors, version_of
from benchmarks.control import Control
from benchmarks.direct import Direct
from benchmarks.experiment import Experiment, Wanted
from benchmarks.nats import FirstByte
from benchmarks.recovery import Recovery
from benchmarks.relayed import Relayed, is_coturn_present
from tests.system.hosts import MissingCapability, enter_user_namespace, require_capabilities

_RESULTS = Path(__file__).parent / "results"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firezone-tunnel" / "peers"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    found = find_competitors(_CACHE)
    competitors = [competitor for competitor in found if not options.only or competitor.name in options.only]
    try:
        if os.geteuid() != 0:
            os.environ["GOPROXY"] = "off"  # the namespace has no network; the newest wireguard-go is already built
            enter_user_namespace([sys.executable, "-m", "benchmarks.run", *(arguments or sys.argv[1:])])
        require_capabilities()
    except MissingCapability as missing:
        print(missing, file=sys.stderr)
        return 1
    cpus = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cpus)

    runs = _Runs(console)
    for number in range(options.rounds):
        experiments = _experiments(competitors, options)
        for experiment in experiments if number % 2 == 0 else reversed(experiments):
            runs.run(experiment, _wanted(experiment, options), f"round {number + 1} of {options.rounds}")

    machine = _describe_machine(cpus, competitors, options)
    results = report.medians(runs.figures)
    report.print_table(console, machine, results)
    report.write_json(_RESULTS / "latest.json", machine, results, runs.failures)
    report.write_plot(_RESULTS / "latest.svg", machine, results)
    console.print(f"written: {_RESULTS / 'latest.json'}, {_RESULTS / 'latest.svg'}", soft_wrap=True)
    for failure in runs.failures:
        console.print(f"FAILED: {failure}", soft_wrap=True, markup=False)
    return 1 if runs.failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=(__doc__ or "").splitlines()[0])
    names = (REFERENCE, *WIREGUARDS, COTURN, OURS)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these cases")
    only = f"only these competitors, of {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, metavar="COMPETITOR", help=only)
    return parser.parse_args(arguments)


class _Runs:
    """All figures by competitor, with one entry per experiment and round, and all failures."""

    def __init__(self, console: Console) -> None:
        self.figures: dict[str, list[Figures]] = {}
        self.failures: list[str] = []
        self._console = console

    def run(self, experiment: Experiment, wanted: Wanted, round_name: str) -> None:
        started = time.monotonic()
        try:
            figures = experiment.run(wanted)
        except Exception as error:  # noqa: BLE001  # the other experiments' figures are still useful
            self.failures.append(f"{round_name}, {experiment.title}: {_describe(error)}")
            self._console.print(f"FAILED: {self.failures[-1]}", soft_wrap=True, markup=False)
            return
        self.figures.setdefault(experiment.competitor, []).append(figures)
        took = f"{time.monotonic() - started:.0f} s"
        self._console.print(f"{round_name}, {experiment.title}, {took}:", _summary(figures), soft_wrap=True)


def _experiments(competitors: Sequence[Competitor], options: argparse.Namespace) -> list[Experiment]:
    """The experiments of a round. Experiments to compare follow each other."""
    relays = [OURS, COTURN] if is_coturn_present() else [OURS]
    every: list[Experiment] = [
        *map(Direct, competitors),
        *map(Relayed, relays),
        *map(FirstByte, NATS),
        *(Recovery(case.name) for case in RECOVERY_CASES),
        Control(),
    ]
    return [
        experiment for experiment in every if _is_selected(experiment, options) and _wanted(experiment, options).cases
    ]


def _is_selected(experiment: Experiment, options: argparse.Namespace) -> bool:
    return not options.only or experiment.competitor in options.only


def _wanted(experiment: Experiment, options: argparse.Namespace) -> Wanted:
    """The requested cases; for ours, including the direct cases that relayed cases are compared with."""
    cases = set(options.cases or [case.name for case in CASES])
    if experiment.competitor == OURS:
        cases |= {case.direct for case in CASES if case.direct is not None and case.name in cases}
    return Wanted(experiment.cases & cases, options.seconds)


def _summary(figures: Figures) -> str:
    return ", ".join(f"{case} {sum(values) / len(values):.3g}" for case, values in figures.items())


def _describe(error: Exception) -> str:
    """The error on one line, with the stderr of a failed command."""
    stderr = error.stderr or "" if isinstance(error, subprocess.CalledProcessError) else ""
    return " ".join(f"{type(error).__name__}: {error} {stderr}".split())[:2000]


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
        "peers": {peer.name: version for peer in competitors if (version := version_of(peer)) is not None},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())

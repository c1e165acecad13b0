"""Which experiments a command line asks for, and what becomes of one that fails."""

from __future__ import annotations

import io

from rich.console import Console

from benchmarks import run
from benchmarks.cases import CASES, Figures
from benchmarks.competitors import Competitor, NoTunnel, Ours, WireGuardGo
from benchmarks.experiment import Experiment, Wanted

COMPETITORS: list[Competitor] = [NoTunnel(), WireGuardGo("wireguard-go-debian", "wireguard-go"), Ours()]


def test_by_default_there_is_an_experiment_for_every_case() -> None:
    assert set().union(*(cases for _, cases in _selected())) == {case.name for case in CASES}


def test_a_case_is_measured_of_those_only_who_have_it() -> None:
    assert _selected("--cases", "recover-roaming") == [("recover-roaming", {"recover-roaming"})]


def test_of_a_competitor_only_its_own_experiments_run() -> None:
    assert {title for title, _ in _selected("--only", "wireguard-go-debian")} == {"wireguard-go-debian"}


def test_a_relayed_case_brings_the_direct_one_of_ours_for_comparison() -> None:
    selected = dict(_selected("--cases", "relayed-tcp-1-down"))

    assert selected["ours"] == {"tcp-1-down"}
    assert selected["relayed by ours"] == {"relayed-tcp-1-down"}
    assert "wireguard-go-debian" not in selected


def test_an_experiment_that_fails_is_reported_and_the_others_figures_stay() -> None:
    output = io.StringIO()
    runs = run._Runs(Console(file=output, width=200))
    wanted = Wanted(frozenset(), 1.0)

    for experiment in (_Scripted("good", {"tcp-1-up": [1.0]}), _Scripted("bad", None), _Scripted("later", {})):
        runs.run(experiment, wanted, "round 1 of 1")

    assert runs.figures == {"good": [{"tcp-1-up": [1.0]}], "later": [{}]}
    assert runs.failures == ["round 1 of 1, bad: OSError: no such device"]
    assert "FAILED: round 1 of 1, bad: OSError: no such device" in output.getvalue()


class _Scripted:
    """Gives these figures, or fails if there are none."""

    cases = frozenset[str]()

    def __init__(self, name: str, figures: Figures | None) -> None:
        self.title = self.competitor = name
        self._figures = figures

    def run(self, wanted: Wanted) -> Figures:
        if self._figures is None:
            raise OSError("no such device")
        return self._figures


def _selected(*arguments: str) -> list[tuple[str, set[str]]]:
    options = run._parse(arguments)
    experiments: list[Experiment] = run._experiments(COMPETITORS, options)
    return [(one.title, set(run._wanted(one, options).cases)) for one in experiments]

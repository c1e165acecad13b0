"""What becomes of the figures: medians, ratios, and what other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.cases import CASES, COTURN, OURS, OURS_DIRECT, Figures

ROUNDS: dict[str, list[Figures]] = {
    "wireguard-go-debian": [{"tcp-1-up": [0.5], "ping-idle-10ms": [0.6]}],
    COTURN: [{"relayed-tcp-1-up": [0.4], "relayed-cpu-s-per-gb": [8.0]}],
    OURS: [
        {"tcp-1-up": [2.0], "ping-idle-10ms": [0.3]},
        {"relayed-tcp-1-up": [1.0], "relayed-cpu-s-per-gb": [2.0]},
        {"recover-portal-restart": [0.0]},
        {"nat-first-byte-cone": [30.0, 10.0]},
        {"nat-first-byte-cone": [20.0]},
    ],
}


def test_the_median_is_over_the_values_of_all_rounds() -> None:
    assert report.medians(ROUNDS)[OURS]["nat-first-byte-cone"] == 20.0


def test_a_case_that_nobody_measured_has_no_median() -> None:
    assert "tcp-8-up" not in report.medians(ROUNDS)[OURS]


def test_relayed_throughput_is_compared_with_coturn_and_with_our_direct_path() -> None:
    assert [one | {"case": None, "unit": None} for one in _of("relayed-tcp-1-up")] == [
        {"case": None, "unit": None, "ours": 1.0, "peer": 0.4, "peer_name": COTURN, "ratio": 2.5},
        {"case": None, "unit": None, "ours": 1.0, "peer": 2.0, "peer_name": OURS_DIRECT, "ratio": 0.5},
    ]


def test_without_a_direct_figure_the_relayed_one_is_compared_with_coturn_only() -> None:
    rounds = ROUNDS | {OURS: [{"relayed-tcp-1-up": [1.0]}]}
    results = report.medians(rounds)

    compared = {one["peer_name"]: one["peer"] for one in report.entries(results) if one["case"] == "relayed-tcp-1-up"}
    assert compared == {COTURN: 0.4, OURS_DIRECT: None}


@pytest.mark.parametrize(("case", "ratio"), [("tcp-1-up", 4.0), ("ping-idle-10ms", 2.0), ("relayed-cpu-s-per-gb", 4.0)])
def test_the_ratio_says_how_many_times_better_ours_is(case: str, ratio: float) -> None:
    assert _of(case)[0]["ratio"] == ratio


def test_a_case_without_peers_has_one_entry_and_zero_is_a_figure() -> None:
    (entry,) = _of("recover-portal-restart")

    assert entry == {
        "case": "recover-portal-restart",
        "unit": "s",
        "ours": 0.0,
        "peer": None,
        "peer_name": None,
        "ratio": None,
    }


def test_latest_json_has_every_case_and_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    report.write_json(path, {"cpu": "some"}, report.medians(ROUNDS), ["round 1, coturn: it broke"])

    document = json.loads(path.read_text())
    assert {one["case"] for one in document["cases"]} == {case.name for case in CASES}
    assert document["failures"] == ["round 1, coturn: it broke"]
    assert document["machine"]["cpu"] == "some"


def test_a_plot_can_be_drawn_of_figures_that_are_all_zero(tmp_path: Path) -> None:
    path = tmp_path / "latest.svg"
    report.write_plot(path, {}, {OURS: {"recover-portal-restart": 0.0}})

    assert "recover-portal-restart" in "".join(ElementTree.parse(path).getroot().itertext())


def _of(case: str) -> list[dict[str, object]]:
    return [one for one in report.entries(report.medians(ROUNDS)) if one["case"] == case]

"""Reports of the results: a table, a plot, and latest.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, COTURN, OURS, OURS_DIRECT, REFERENCE, WIREGUARDS, Case, Figures

Medians = dict[str, dict[str, float]]
"""Medians over all rounds: competitor -> case -> value."""

_COLOURS = {
    REFERENCE: "#c8ccd2",
    "wireguard-go-debian": "#8fb3d9",
    "wireguard-go-newest": "#3f74b5",
    COTURN: "#7fae72",
    OURS_DIRECT: "#f3c3a8",
    OURS: "#e8743b",
}
_COLUMNS = tuple(_COLOURS)
_BAR, _GAP, _LABEL, _WIDTH = 14, 18, 170, 900


def medians(rounds: Mapping[str, Sequence[Figures]]) -> Medians:
    """The median of all values of each case, by competitor. "ours-direct" has our direct results for relayed cases."""
    results = {
        name: {
            case.name: statistics.median(value for figures in several for value in figures.get(case.name, ()))
            for case in CASES
            if any(figures.get(case.name) for figures in several)
        }
        for name, several in rounds.items()
    }
    ours = results.get(OURS, {})
    direct = {case.name: ours[case.direct] for case in CASES if case.direct in ours and case.name in ours}
    return results | ({OURS_DIRECT: direct} if direct else {})


def entries(results: Medians) -> list[dict[str, Any]]:
    """One entry per case and peer: our value, the peer's value, and the factor by which ours is better.

    A case without peers has one entry with the peer None.
    """
    return [_entry(case, results, peer) for case in CASES for peer in case.peers or (None,)]


def write_json(path: Path, machine: Mapping[str, Any], results: Medians, failures: Sequence[str] = ()) -> None:
    """`{"machine": …, "failures": […], "cases": [{"case", "unit", "ours", "peer", "peer_name", "ratio"}]}`"""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {**machine, REFERENCE: results.get(REFERENCE, {})}
    document = {"machine": described, "failures": list(failures), "cases": entries(results)}
    path.write_text(json.dumps(document, indent=2) + "\n")


def print_table(console: Console, machine: Mapping[str, Any], results: Medians) -> None:
    """Print all results. One column has the peers of a case, another the ratios to them, in the same order."""
    table = Table(title="medians over all rounds; ratio: factor by which ours is better", title_justify="left")
    for heading in ("case", "unit"):
        table.add_column(heading)
    for heading in (REFERENCE, "peers", OURS, "ratios"):
        table.add_column(heading, justify="right")
    for case in CASES:
        if not any(case.name in values for values in results.values()):
            continue
        compared = [_entry(case, results, peer) for peer in case.peers]
        measured = [entry for entry in compared if entry["peer"] is not None]
        peers = [f"{_short(entry['peer_name'])} {_text(entry['peer'])}" for entry in measured]
        ratios = [_text(entry["ratio"]) for entry in measured]
        reference, ours = (_text(results.get(name, {}).get(case.name)) for name in (REFERENCE, OURS))
        table.add_row(case.name, case.unit, reference, ", ".join(peers), ours, ", ".join(ratios))
    console.print(", ".join(f"{name}: {value}" for name, value in machine.items() if not isinstance(value, dict)))
    console.print(table)


def write_plot(path: Path, machine: Mapping[str, Any], results: Medians) -> None:
    """Draw horizontal bars as SVG, one group per case, each with its own scale."""
    names = [name for name in _COLUMNS if name in results]
    groups, top = [], 70
    for case in CASES:
        present = {name: results[name][case.name] for name in names if case.name in results[name]}
        if present:
            groups.append(_group(case, present, top))
            top += max(_BAR * len(present), 26) + _GAP
    legend = "".join(
        f'<rect x="{20 + 145 * place}" y="40" width="12" height="12" fill="{_COLOURS[name]}"/>'
        f'<text x="{38 + 145 * place}" y="50">{name}</text>'
        for place, name in enumerate(names)
    )
    title = f"{machine.get('cpu', '')}, {machine.get('cpus', '')} CPUs, Linux {machine.get('kernel', '')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}"'
        ' font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="20" y="24" font-size="14">{escape(title)}</text>'
        f"{legend}{''.join(groups)}</svg>\n"
    )


def _entry(case: Case, results: Medians, peer: str | None) -> dict[str, Any]:
    ours = results.get(OURS, {}).get(case.name)
    theirs = None if peer is None else results.get(peer, {}).get(case.name)
    ratio = case.ratio(ours, theirs) if ours and theirs else None
    return {"case": case.name, "unit": case.unit, "ours": ours, "peer": theirs, "peer_name": peer, "ratio": ratio}


def _group(case: Case, values: Mapping[str, float], top: int) -> str:
    """The bars of one case. The longest bar of a tunnel has the full width; the bar without a tunnel may be cut."""
    room = _WIDTH - _LABEL - 110
    longest = max([value for name, value in values.items() if name != REFERENCE] or list(values.values()))
    scale = room / longest if longest else 0.0
    better = "more" if case.more_is_better else "less"
    parts = [
        f'<text x="{_LABEL - 10}" y="{top + 11}" text-anchor="end">{case.name}</text>',
        f'<text x="{_LABEL - 10}" y="{top + 24}" text-anchor="end" font-size="10">{better} is better</text>',
    ]
    for place, (name, value) in enumerate(values.items()):
        y, width = top + place * _BAR, min(max(value * scale, 1.0), room)
        label = f"{_text(value)} {case.unit}{' (cut)' if value * scale > room + 1 else ''}"
        parts.append(f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{_COLOURS[name]}"/>')
        parts.append(f'<text x="{_LABEL + width + 5:.1f}" y="{y + 10}" font-size="10">{label}</text>')
    return "".join(parts)


def _short(name: str) -> str:
    return name.rpartition("-")[2] if name in WIREGUARDS else name


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"

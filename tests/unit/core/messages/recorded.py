"""The recorded sessions of upstream's programs, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SESSIONS = sorted((Path(__file__).parents[3] / "data" / "vectors").glob("*.jsonl"))


class PortalFrame(NamedTuple):
    """`peer` is client, gateway or relay; `sent_by_portal`: it went to the peer."""

    peer: str
    sent_by_portal: bool
    event: str
    payload: Any


def rows(session: Path) -> Iterator[dict[str, Any]]:
    with session.open() as lines:
        for line in lines:
            yield json.loads(line)


def portal_frames(session: Path) -> Iterator[PortalFrame]:
    """Frames on the peers' own topics, without the frames of the `phoenix` topic."""
    for row in rows(session):
        if row["at"] != "portal" or "frame" not in row:
            continue
        frame = row["frame"]
        if frame["topic"] != "phoenix" and frame["event"] not in {"phx_reply", "phx_join"}:
            yield PortalFrame(row["peer"], row["dir"] == "out", frame["event"], frame["payload"])


def candidates(session: Path) -> list[str]:
    """Every distinct candidate that a program signalled."""
    lists = (frame.payload["candidates"] for frame in portal_frames(session) if frame.event.endswith("ice_candidates"))
    return list(dict.fromkeys(candidate for candidates in lists for candidate in candidates))

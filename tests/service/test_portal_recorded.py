"""Recorded programs of both upstream generations get the same answers from our portal as when they were recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from tests.service.portal_peers import (
    CLIENT_TOKEN,
    GATEWAY_TOKEN,
    RELAY_TOKEN,
    SEED,
    Peer,
    Portal,
    recorded,
    start_portal,
    stop_portal,
)

_VECTORS = Path(__file__).parents[1] / "data/vectors"
_SESSIONS = sorted(path.name for path in _VECTORS.glob("*.jsonl"))
_TOKENS = {"client": "cltok", "gateway": "gwtok", "relay": "relaytok"}


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    seed = SEED
    for ours, role in ((CLIENT_TOKEN, "client"), (GATEWAY_TOKEN, "gateway"), (RELAY_TOKEN, "relay")):
        seed = seed.replace(f'"{ours}"', f'"{_TOKENS[role]}"')
    portal = await start_portal(tmp_path, seed)
    yield portal
    await stop_portal(portal)


@pytest.mark.parametrize("session", _SESSIONS)
@pytest_twisted.ensureDeferred
async def test_a_recorded_session_goes_through(portal: Portal, session: str) -> None:
    peers: dict[str, Peer] = {}
    ours: dict[str, str] = {}  # ids and refs of the recording -> ids and refs of this portal
    answers = 0

    for row in recorded(_VECTORS / session):
        name = row["peer"]
        if "connect" in row:
            token = {} if "token=" in row["connect"] else {"X-Authorization": f"Bearer {_TOKENS[name]}"}
            peers[name] = await portal.connect(row["connect"], row["user_agent"], headers=token)
        elif row["dir"] == "in":
            frame = _translate(row["frame"], ours)
            peers[name].send_frame(frame)
        else:
            frame = await peers[name].receive_frame(row["frame"]["event"])
            assert (frame["topic"], frame["ref"]) == (row["frame"]["topic"], row["frame"]["ref"])
            _compare(row["frame"]["payload"], frame["payload"], ours, row["frame"]["event"])
            answers += 1

    assert answers >= 12  # joins, inits, one flow, candidates both ways, heartbeats
    assert [peer.frames for peer in peers.values()] == [[], [], []]


def test_there_are_sessions_of_both_generations() -> None:
    assert {name.partition("-")[0] for name in _SESSIONS} == {"v1", "v2"}


def _compare(then: Any, now: Any, ours: dict[str, str], where: str) -> None:
    """Check that `now` has every key of `then` with a value of the same type, and learn the current ids and refs."""
    if isinstance(then, dict):
        now_keys = {{"sites": "gateway_groups", "site_id": "gateway_group_id"}.get(key, key): key for key in now}
        for key, value in then.items():
            assert key in now_keys, f"{where} lacks {key}"
            _compare(value, now[now_keys[key]], ours, f"{where}.{key}")
    elif isinstance(then, list):
        if where.endswith(".resources"):
            now = [frame for frame in now if frame["id"] == then[0]["id"]]
        assert len(now) == len(then), where
        for number, value in enumerate(then):
            _compare(value, now[number], ours, f"{where}[{number}]")
    elif where.endswith((".id", ".gateway_id", ".client_id", ".ref")):
        assert ours.setdefault(then, now) == now, where
    elif where.endswith(".expires_at"):
        assert now is None or isinstance(now, int), where
    else:
        assert type(now) is type(then), where
        assert ".candidates" not in where or now == then


def _translate(value: Any, ours: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _translate(item, ours) for key, item in value.items()}
    if isinstance(value, list):
        return [_translate(item, ours) for item in value]
    return ours.get(value, value) if isinstance(value, str) else value

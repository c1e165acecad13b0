"""Floods of hostile datagrams: `python -m benchmarks.relay_flood` sends a million of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from benchmarks.relay_flood import QUIET, flood
from tests.service.relay_process import RelayProcess

pytestmark = pytest.mark.serial

_COUNT = 50_000


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("requests_only", [False, True], ids=["everything", "requests"])
def test_a_flood_neither_breaks_it_nor_grows_it_nor_is_returned_with_interest(
    tmp_path: Path, workers: int, requests_only: bool
) -> None:
    relay = RelayProcess(tmp_path, "--workers", str(workers), *QUIET)
    with contextlib.closing(relay):
        relay.wait_ready()

        outcome = flood(relay, _COUNT, seed=workers, requests_only=requests_only)

        assert outcome.datagrams == _COUNT
        assert outcome.answers > 1000
        assert outcome.bytes_out <= outcome.bytes_in
        assert outcome.grown < 4e6
        relay.signal()
        assert relay.wait(20) == 0
        assert "relay:worker_lost" not in relay.log.read_text()
        assert "Traceback" not in relay.log.read_text()

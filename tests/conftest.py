"""Fixtures for every test; and in CI a missing capability is a failure, not a skip."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from eliot import add_destinations, remove_destination

from firezone_tunnel.shell.logs import events as log
from tests.hypothesis_profiles import load_profile
from tests.system.hosts import Lab, MissingCapability, require_capabilities

load_profile()  # before the tests are imported: `examples` depends on it

_NEEDS_THE_MACHINE = {Path(__file__).parent / "interop", Path(__file__).parent / "system"}


def pytest_configure() -> None:
    """Make the process like one that a person started, and let no test see what was logged before it.

    A shell starts its background jobs with SIGINT ignored, and programs that tests start and interrupt inherit that.
    eliot keeps messages until it has a destination: the first test that adds one would get them all.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    add_destinations(lambda message: None)


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    """What is logged from now on. A test may set the threshold."""
    messages: list[dict[str, Any]] = []
    add_destinations(messages.append)
    yield messages
    remove_destination(messages.append)
    log.set_threshold(log.INFO)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Hosts made of network namespaces, of the test's own; nothing of them may be left behind."""
    yield from _lab()


@pytest.fixture(scope="session")
def shared_lab() -> Iterator[Lab]:
    """A lab whose hosts outlast a test."""
    yield from _lab()


def _lab() -> Iterator[Lab]:
    try:
        require_capabilities()
    except MissingCapability as missing:
        pytest.skip(str(missing))
    with Lab() as lab:
        yield lab
    assert lab.leftovers() == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI=true, turn the skip of a test that needs namespaces, a peer or a kernel feature into a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true" and _is_required(item):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be missing: {report.longrepr}"
    return report


def _is_required(item: pytest.Item) -> bool:
    if item.get_closest_marker("namespaces") is not None:
        return True
    return not _NEEDS_THE_MACHINE.isdisjoint(item.path.parents)

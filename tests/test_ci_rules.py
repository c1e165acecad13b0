"""In CI nothing may be missing: a skipped namespace test fails there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

_SKIPPING_TESTS = """
import pytest

@pytest.mark.namespaces
def test_with_hosts():
    pytest.skip("no root")

def test_without():
    pytest.skip("another platform")
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    tests = Path(__file__).parent
    pytester.makeconftest((tests / "conftest.py").read_text())
    pytester.makeini(f"[pytest]\nmarkers = namespaces\npythonpath = {tests.parent}")
    pytester.makepyfile(_SKIPPING_TESTS)
    return pytester


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_namespace_test_fails_in_ci(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("CI", "true")

    project.runpytest_subprocess(f"-n{workers}").assert_outcomes(failed=1, skipped=1)


def test_it_is_a_visible_skip_elsewhere(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)

    project.runpytest_subprocess().assert_outcomes(skipped=2)

"""References to the protocol reference and to the decisions lead to headings that exist.

They have one form: the page's path, then the numbers of its headings, such as `docs/decisions.md, 3` or
`docs/protocol/data-plane.md, 2.4.7 and 2.5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_TREES = ("benchmarks", "demo", "docker", "docs", "firezone_tunnel", "tests", "tools", "twisted_plugins")
_SUFFIXES = {"", ".cfg", ".conf", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}

_NUMBER = r"\d+(?:\.\d+)*"
_REFERENCE = re.compile(
    rf"(?<![\w/])(docs/[a-z/-]+\.md)(?:, ({_NUMBER}(?:(?:, | and | to |, and ){_NUMBER})*))?(?![\w/])"
)
_HEADING = re.compile(rf"^##+ ({_NUMBER})\.? ", re.MULTILINE)

# Forms that say a number, but not of which page.
_OTHER_FORMS = re.compile(
    r"""\b[Dd]ecisions?\ \d | \b[Ss]pec[,:]?\ \d | \bspec/\w   # "decision 3", "spec, 2.0"
    | (?<=\s)\(\d+(?:\.\d+)+(?:\ (?:and|to)\ \d+(?:\.\d+)+)*\)  # "(2.9)"
    """,
    re.VERBOSE,
)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text file of the repository but this one, by its path."""
    files = (path for path in _files() if path.is_file() and path.suffix in _SUFFIXES and path != Path(__file__))
    return {str(path.relative_to(_ROOT)): path.read_text(errors="replace") for path in sorted(files)}


def test_every_reference_leads_to_a_heading(texts: dict[str, str]) -> None:
    references = [(name, *found) for name, text in texts.items() for found in _references(text)]

    assert [f"{name}: {reference}" for name, reference, exists in references if not exists] == []
    # A pattern that matches nothing would let everything pass.
    assert {"docs/decisions.md, 3", "docs/protocol/data-plane.md, 2.5.1"} <= {
        reference for _, reference, _ in references
    }


def test_a_reference_may_be_broken_between_lines() -> None:
    text = "# See docs/decisions.md,\n    # 3 and\n    # 999. Also docs/nowhere.md."

    expected = [("docs/decisions.md, 3", True), ("docs/decisions.md, 999", False), ("docs/nowhere.md", False)]
    assert list(_references(text)) == expected


def test_no_reference_lacks_its_page(texts: dict[str, str]) -> None:
    """Pages link to each other, and refer to their own sections by number."""
    found = [
        f"{name}: {line.strip()}"
        for name, text in texts.items()
        if not name.startswith("docs/")
        for line in text.split("\n")
        if _OTHER_FORMS.search(line)
    ]

    assert found == []


@pytest.mark.parametrize("path", sorted((_ROOT / "docs/protocol").glob("*.md")), ids=lambda path: path.name)
def test_every_section_sign_in_a_page_leads_to_a_heading(path: Path) -> None:
    signs = re.findall(rf"(RFC \d+ )?(?:\[([a-z-]+\.md)\]\([^)]*\) )?§({_NUMBER})", path.read_text())
    named = [(path.parent / other if other else path, number) for rfc, other, number in signs if not rfc]

    assert [number for page, number in named if number not in _headings(page)] == []


@pytest.mark.parametrize(
    "path", [_ROOT / "docs/decisions.md", *sorted((_ROOT / "docs/protocol").glob("*.md"))], ids=lambda path: path.name
)
def test_every_number_stands_for_one_heading(path: Path) -> None:
    numbers = _HEADING.findall(path.read_text())

    assert len(numbers) == len(set(numbers)) > 0


def _references(text: str) -> Iterator[tuple[str, bool]]:
    """Every page and number that a text refers to, and whether it is there."""
    for page, numbers in _REFERENCE.findall(re.sub(r"\s+(?:#\s+)?", " ", text)):
        path = _ROOT / page
        if not numbers:
            yield page, path.exists()
        for number in re.findall(_NUMBER, numbers):
            yield f"{page}, {number}", path.exists() and number in _headings(path)


@cache
def _headings(page: Path) -> frozenset[str]:
    return frozenset(_HEADING.findall(page.read_text()))


def _files() -> Iterator[Path]:
    for tree in _TREES:
        yield from (path for path in (_ROOT / tree).rglob("*") if "__pycache__" not in path.parts)
    yield from _ROOT.iterdir()

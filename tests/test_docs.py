"""The documents say what is so, as far as that can be checked."""

from __future__ import annotations

import re
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from firezone_tunnel.core.portal.seed import SeedContext, parse_seed
from tools import state_diagrams
from tools.options_reference import page, roles

_ROOT = Path(__file__).parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_OPTIONS_PAGE = _ROOT / "docs/options.md"
# These also name what upstream's programs have.
_REFERENCE_PAGES = [*sorted((_ROOT / "docs/protocol").glob("*.md")), _ROOT / "tests/data/vectors/README.md"]

# Those of docker, curl, twistd and mypy; and the one that we refuse.
_OPTIONS_OF_OTHERS = {"build", "device", "fail", "help", "pidfile", "strict", "token", "wait"}


def test_the_options_page_is_what_the_declarations_say() -> None:
    """If not: make docs."""
    assert _OPTIONS_PAGE.read_text() == page()
    assert {"client", "gateway", "portal"} <= set(roles())


def test_the_page_of_state_machines_is_what_their_tables_say() -> None:
    """If not: make docs."""
    assert (_ROOT / "docs/state-machines.md").read_text() == state_diagrams.page()


@pytest.mark.parametrize("path", [*_PAGES, *_REFERENCE_PAGES], ids=lambda path: str(path.relative_to(_ROOT)))
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text())
    targets = [((path.parent / link if link else path), anchor) for link, anchor in links]

    assert [target for target, _ in targets if not target.exists()] == []
    assert [(target, anchor) for target, anchor in targets if anchor and anchor not in _anchors(target)] == []


@pytest.mark.parametrize("path", [path for path in _PAGES if path != _OPTIONS_PAGE], ids=lambda path: path.name)
def test_every_option_that_is_named_exists(path: Path) -> None:
    declared = set(re.findall(r"`--([a-z0-9-]+)`", page()))
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", path.read_text()))

    assert named - declared - _OPTIONS_OF_OTHERS == set()


@pytest.mark.parametrize("path", [path for path in _PAGES if path != _OPTIONS_PAGE], ids=lambda path: path.name)
def test_every_variable_that_is_named_exists(path: Path) -> None:
    declared = set(re.findall(r"`([A-Z_]+)`", page())) | {"FIREZONE_TOKEN"}

    assert set(re.findall(r"FIREZONE_[A-Z_]+", path.read_text())) - declared == set()


@pytest.mark.parametrize("path", [_ROOT / "docs/examples/portal.toml", _ROOT / "docker/portal.toml"], ids=str)
def test_a_portal_would_serve_the_seed_files(path: Path) -> None:
    account = parse_seed(path.read_text(), SeedContext(lambda name: (path.parent / name).read_text(), ZoneInfo)).account

    assert len(account.tokens) >= 2
    assert len(account.resources) >= 1
    assert len(account.policies) >= 1


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}

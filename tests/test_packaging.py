"""An ordinary `pip install .` gives the twistd plugins, the script, and nothing that isn't ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_SOURCES = ("firezone_tunnel", "twisted_plugins", "tests", "demo", "benchmarks")
_PLUGIN_FILE = _ROOT / "twisted_plugins/firezone_tunnel_plugins.py"
_PLUGINS = [f"firezone-{role}" for role in re.findall(r'_Application\("(\w+)"', _PLUGIN_FILE.read_text())]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clean virtual environment into which a copy of the sources was installed, dependencies and all."""
    directory = tmp_path_factory.mktemp("packaging")
    sources = directory / "sources"
    for name in _SOURCES:
        shutil.copytree(_ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, sources / name)
    venv.create(directory / "venv")
    # Neither a pip of its own nor bytecode of modules that no test imports: they take longer than the rest.
    pip = [sys.executable, "-m", "pip", "--python", directory / "venv/bin/python", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-compile", "."]
    done = subprocess.run(install, cwd=sources, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    yield directory / "venv"
    shutil.rmtree(directory)


@pytest.mark.parametrize("plugin", _PLUGINS)
def test_twistd_lists_the_plugin(environment: Path, tmp_path: Path, plugin: str) -> None:
    listing = _run(tmp_path, environment / "bin/twistd", "--help")

    assert plugin in listing.split()


@pytest.mark.parametrize("plugin", _PLUGINS)
def test_a_plugin_tells_its_options(environment: Path, tmp_path: Path, plugin: str) -> None:
    assert "--log-level" in _run(tmp_path, environment / "bin/twistd", plugin, "--help")


def test_client_gateway_and_portal_are_plugins() -> None:
    assert {"firezone-client", "firezone-gateway", "firezone-portal"} <= set(_PLUGINS)


def test_the_script_is_installed_and_tells_its_commands(environment: Path, tmp_path: Path) -> None:
    assert "Commands" in _run(tmp_path, environment / "bin/firezone-tunnel", "--help")


def test_nothing_but_our_own_package_is_installed(environment: Path) -> None:
    site_packages = environment / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    records = (next(site_packages.glob("firezone_tunnel-*.dist-info")) / "RECORD").read_text().splitlines()
    top = {record.split(",")[0].split("/")[0] for record in records}

    assert {name for name in top if not name.startswith("firezone_tunnel")} == {"..", "twisted"}  # "..": bin/
    assert [
        record for record in records if record.startswith("twisted/") and "firezone_tunnel_plugins" not in record
    ] == []


def test_type_information_and_migrations_are_installed(environment: Path) -> None:
    site_packages = environment / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    package = site_packages / "firezone_tunnel"
    in_sources = {path.relative_to(_ROOT) for path in (_ROOT / "firezone_tunnel").rglob("*") if _is_content(path)}
    installed = {path.relative_to(site_packages) for path in package.rglob("*") if _is_content(path)}

    assert (package / "py.typed").exists()
    assert in_sources - installed == set()


def _is_content(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def _run(directory: Path, *command: Path | str) -> str:
    """What the command prints; it runs where no source tree is in reach."""
    done = subprocess.run(
        [str(word) for word in command], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

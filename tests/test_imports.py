"""Importing anything of ours installs no reactor, and importing the package itself loads next to nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import firezone_tunnel

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "firezone_tunnel/__init__.py"
_LIST_LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"

_IMPORT_ALL_OF = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
"""


def test_importing_every_module_installs_no_reactor() -> None:
    loaded = _loaded_after(_IMPORT_ALL_OF, "firezone_tunnel")

    assert "firezone_tunnel.core.sansio" in loaded
    assert "twisted.internet.reactor" not in loaded


def test_importing_the_package_loads_neither_twisted_nor_an_application() -> None:
    loaded = _loaded_after("import firezone_tunnel")

    assert [name for name in loaded if name.split(".")[0] in {"twisted", "autobahn", "numpy", "cryptography"}] == []
    assert [name for name in loaded if name.startswith("firezone_tunnel.")] == []


def test_dir_shows_every_public_name_before_it_is_loaded() -> None:
    loaded = _loaded_after("import firezone_tunnel; assert set(firezone_tunnel.__all__) <= set(dir(firezone_tunnel))")

    assert [name for name in loaded if name.startswith("firezone_tunnel.")] == []


def test_a_name_resolves_to_what_a_type_checker_sees() -> None:
    seen = {name: module for module, name in _imports_for_type_checkers(_PACKAGE)}

    assert seen == firezone_tunnel._HOMES
    assert sorted([*seen, "__version__"]) == sorted(firezone_tunnel.__all__)
    for name, module in seen.items():
        assert getattr(firezone_tunnel, name) is getattr(import_module(module), name)


def test_other_modules_hide_no_import_of_another_package_from_the_import_contracts() -> None:
    """The contracts leave out what is imported for type checkers only."""
    hidden = [
        (".".join(path.relative_to(_ROOT).parent.parts), module)
        for path in _PACKAGE.parent.rglob("*.py")
        if path != _PACKAGE
        for module, _ in _imports_for_type_checkers(path)
    ]

    assert [(package, module) for package, module in hidden if not module.startswith(f"{package}.")] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = firezone_tunnel.no_such_name  # type: ignore[attr-defined]


def test_a_plugin_loads_its_application_without_starting_threads() -> None:
    script = """
import gc, os, sys
sys.path.append("twisted_plugins")
from firezone_tunnel_plugins import gateway
gateway.options
assert len(os.listdir("/proc/self/task")) == 1
assert gc.isenabled()
"""
    loaded = _loaded_after(script)

    assert {"firezone_tunnel.apps.gateway.options", "numpy"} <= set(loaded)


def test_client_and_gateway_load_none_of_the_portals_libraries() -> None:
    loaded = _loaded_after(_IMPORT_ALL_OF, "firezone_tunnel.apps.client", "firezone_tunnel.apps.gateway")

    assert [name for name in loaded if name.split(".")[0] in {"alembic", "klein", "sqlalchemy", "treq"}] == []


def _imports_for_type_checkers(path: Path) -> list[tuple[str, str]]:
    """Each module and name that is imported under `if TYPE_CHECKING`."""
    blocks = [it for it in ast.walk(ast.parse(path.read_text())) if isinstance(it, ast.If)]
    return [
        (node.module or "", alias.name)
        for block in blocks
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def _loaded_after(script: str, *arguments: str) -> list[str]:
    """The modules that a fresh interpreter has loaded when the script is through."""
    command = [sys.executable, "-c", f"{script}\n{_LIST_LOADED}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=_ROOT)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout)
    return loaded

"""Write the diagrams of all state machines from their tables: `python tools/state_diagrams.py FILE`."""

from __future__ import annotations

import enum
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import firezone_tunnel.core

Transitions = Mapping[enum.Enum, tuple[enum.Enum, ...]]

_HEAD = (
    "# State machines",
    "Written by `make docs` from the table `TRANSITIONS` of each module. A machine asserts that its table allows "
    "every change of its state.",
)


def page() -> str:
    """The whole page in Markdown, with Mermaid diagrams."""
    return "\n\n".join([*_HEAD, *(part for module in machines() for part in _section(module))]) + "\n"


def machines() -> list[ModuleType]:
    """The modules of the core that have a table of transitions."""
    names = [found.name for found in pkgutil.walk_packages(firezone_tunnel.core.__path__, "firezone_tunnel.core.")]
    return [module for name in sorted(names) if hasattr(module := import_module(name), "TRANSITIONS")]


def _section(module: ModuleType) -> Iterator[str]:
    transitions: Transitions = module.TRANSITIONS
    states = type(next(iter(transitions)))
    path = module.__name__.replace(".", "/")
    yield f"## {path.removeprefix('firezone_tunnel/')}"
    yield f"{inspect.getdoc(states)} [`{states.__name__}`](../{path}.py)"
    yield "\n".join(_diagram(transitions))


def _diagram(transitions: Transitions) -> Iterator[str]:
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {_label(next(iter(transitions)))}"
    for state, following in transitions.items():
        yield from (f"    {_label(state)} --> {_label(after)}" for after in following)
        if not following:
            yield f"    {_label(state)} --> [*]"
    yield "```"


def _label(state: enum.Enum) -> str:
    return state.name.lower()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

"""Write the reference page of all options from where they are declared: `python tools/options_reference.py FILE`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from firezone_tunnel.shell.process.settings import Options, Setting

_PACKAGE = Path(__file__).parents[1] / "firezone_tunnel"
_HEAD = (
    "# Options",
    "Written by `make docs` from the declarations: `twistd firezone-client --help` says the same. "
    "What is given on the command line wins over an environment variable; of several variables the first that is set "
    "counts. A flag's variable is `true` or `false`, `1` or `0`, `yes` or `no`, `on` or `off`.",
    "In the foreground, as under a service manager or in a container, they run as "
    "`twistd -n --pidfile= firezone-client …`. Option names can't be abbreviated.",
    "The token of a client, gateway or relay is no option, as everybody on the host can read a command line. "
    "It comes from the first of these that holds one: the variable `FIREZONE_TOKEN`, which is then removed from the "
    "process's environment; a systemd credential called `FIREZONE_TOKEN`; the file of `--token-path`, which must "
    "belong to the user that runs the program and be readable by nobody else.",
)


def page() -> str:
    """The whole page in Markdown."""
    return "\n\n".join([*_HEAD, *(part for role in roles() for part in _section(role))]) + "\n"


def roles() -> list[str]:
    """The applications that twistd starts, as their packages are called."""
    return sorted(path.parent.name for path in _PACKAGE.glob("apps/*/options.py"))


def _section(role: str) -> Iterator[str]:
    options: type[Options] = import_module(f"firezone_tunnel.apps.{role}.options").Options
    yield f"## firezone-{role}"
    yield "\n".join(_table(options.settings))


def _table(settings: Sequence[Setting]) -> Iterator[str]:
    yield "| option | variable | default | |"
    yield "|---|---|---|---|"
    for setting in settings:
        names = [f"`--{setting.name}`"] + ([f"`-{setting.short}`"] if setting.short else [])
        variables = [f"`{variable}`" for variable in setting.variables]
        cells = (", ".join(names), ", ".join(variables), _default(setting), setting.help)
        yield f"| {' | '.join(cells)} |"


def _default(setting: Setting) -> str:
    if setting.is_required:
        return "must be given"
    if setting.is_flag:
        return "off"
    return f"`{setting.default}`" if setting.default is not None else ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())

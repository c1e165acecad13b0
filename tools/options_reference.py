"""Generate the reference page of all options from their declarations: `python tools/options_reference.py FILE`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import click

from firezone_tunnel.apps.cli.main import main
from firezone_tunnel.shell.process.settings import Options, Setting

_PACKAGE = Path(__file__).parents[1] / "firezone_tunnel"
_HEAD = (
    "# Options",
    "`make docs` generates this page from the declarations that `twistd firezone-client --help` also prints. "
    "Command-line options take precedence over environment variables. If an option has several variables, the first "
    "that is set is used. The variable of a flag is `true` or `false`, `1` or `0`, `yes` or `no`, `on` or `off`.",
    "To run an application in the foreground, for example under a service manager or in a container, use "
    "`twistd -n --pidfile= firezone-client …`. Option names can't be abbreviated.",
    "There is no option for the token of a client, gateway or relay, because all users of a host can read command "
    "lines. The token is taken from the first of these sources that has one: the variable `FIREZONE_TOKEN`, which "
    "programs started by the process don't inherit, though root and the same user see it in `/proc/PID/environ`; a "
    "systemd credential named `FIREZONE_TOKEN`; the file given by "
    "`--token-path`, which must be owned by the user that runs the application and readable only by that user.",
)


def page() -> str:
    """The whole page in Markdown."""
    sections = [*(part for role in roles() for part in _section(role)), *_commands("firezone-tunnel", main)]
    return "\n\n".join([*_HEAD, *sections]) + "\n"


def roles() -> list[str]:
    """The package names of the applications that run under twistd."""
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
        return "required"
    if setting.is_flag:
        return "off"
    return f"`{setting.default}`" if setting.default is not None else ""


def _commands(name: str, command: click.Command) -> Iterator[str]:
    """A section for each command that is not a group of others."""
    if isinstance(command, click.Group):
        for word, one in sorted(command.commands.items()):
            yield from _commands(f"{name} {word}", one)
        return
    arguments = "".join(f" {str(one.name).upper()}" for one in command.params if isinstance(one, click.Argument))
    yield f"## {name}{arguments}"
    yield from inspect.cleandoc(command.help or "").replace("\n\n", "\0").replace("\n", " ").split("\0")
    options = [one for one in command.params if isinstance(one, click.Option)]
    if options:
        yield "\n".join(_command_table(options))


def _command_table(options: Sequence[click.Option]) -> Iterator[str]:
    yield "| option | variable | default | |"
    yield "|---|---|---|---|"
    for option in options:
        names = ", ".join(f"`{name}`" for name in option.opts)
        default = "off" if option.is_flag else f"`{option.default}`" if isinstance(option.default, str) else ""
        yield f"| {names} | {f'`{option.envvar}`' if option.envvar else ''} | {default} | {option.help} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())

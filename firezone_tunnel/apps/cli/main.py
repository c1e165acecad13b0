"""`firezone-tunnel`: what an operator asks this host for."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from firezone_tunnel import __version__
from firezone_tunnel.apps.cli.diagnose import ROLES, CheckState, Finding, is_usable
from firezone_tunnel.apps.cli.diagnose import diagnose as look_at_host
from firezone_tunnel.core.portal.account import token_hash
from firezone_tunnel.shell.tun.device import DEFAULT_NAME

_TOKEN_BYTES = 32
_COLOURS = {CheckState.OK: "green", CheckState.LIMIT: "yellow", CheckState.MISSING: "red"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="%(version)s")
def main() -> None:
    """Help with clients, gateways and portals of a Firezone-compatible tunnel.

    They themselves run under twistd: see `twistd --help`.
    """


@main.command()
@click.option("--api-url", "-u", envvar="FIREZONE_API_URL", help="URL of the portal; without it no portal is asked.")
@click.option("--ca-file", envvar="FIREZONE_CA_FILE", type=click.Path(path_type=Path), help="PEM file to trust for it.")
@click.option("--interface", envvar="FIREZONE_INTERFACE", default=DEFAULT_NAME, help="Name of the TUN device.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def diagnose(api_url: str | None, ca_file: Path | None, interface: str, as_json: bool) -> None:
    """Say what this host offers a client and a gateway, and what to do where something is missing.

    Ends with 1 if it is missing what either needs. Run it as the user that the client or gateway will have.
    """
    findings = look_at_host(interface, api_url, ca_file)
    if as_json:
        click.echo(json.dumps({**{role: is_usable(findings, role) for role in ROLES}, "checks": _records(findings)}))
    else:
        _show(findings)
    sys.exit(0 if all(is_usable(findings, role) for role in ROLES) else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def token(as_json: bool) -> None:
    """Make a random token, and the hash by which the portal's seed file knows it.

    The token goes to the client, gateway or relay, the hash into portal.toml, where it is of no use to who reads it.
    """
    made = secrets.token_urlsafe(_TOKEN_BYTES)
    if as_json:
        click.echo(json.dumps({"token": made, "sha3_256": token_hash(made)}))
        return
    click.echo(f'token:    {made}\nsha3_256 = "{token_hash(made)}"')


def _records(findings: list[Finding]) -> list[dict[str, object]]:
    return [
        {
            "check": one.check,
            "state": one.state.value,
            "found": one.found,
            "advice": one.advice,
            "needed_by": one.needed_by,
        }
        for one in findings
    ]


def _show(findings: list[Finding]) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, no_wrap=heading in {"check", ""}, overflow="fold")
    for one in findings:
        state = Text(one.state.value, style=_COLOURS[one.state])
        table.add_row(Text(one.check), state, Text(one.found), Text(one.advice))
    console.print(table)
    for role in ROLES:
        verdict = "can run here" if is_usable(findings, role) else "can't run here yet"
        console.print(Text(f"A {role} {verdict}."))

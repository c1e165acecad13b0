"""`firezone-tunnel`: commands for operators."""

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
    """Tools for operators of Firezone-compatible clients, gateways, relays and portals.

    These applications themselves run under twistd: see `twistd --help`.
    """


@main.command()
@click.option("--api-url", "-u", envvar="FIREZONE_API_URL", help="URL of the portal to check; omit to skip.")
@click.option(
    "--ca-file", envvar="FIREZONE_CA_FILE", type=click.Path(path_type=Path), help="PEM file of the portal's CA."
)
@click.option("--interface", envvar="FIREZONE_INTERFACE", default=DEFAULT_NAME, help="Name of the TUN device.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a table.")
def diagnose(api_url: str | None, ca_file: Path | None, interface: str, as_json: bool) -> None:
    """Check whether this host can run a client and a gateway, and print advice for each problem.

    Exits with 1 if the host lacks anything that either of them needs. Run it as the user that will run the client or
    gateway.
    """
    findings = look_at_host(interface, api_url, ca_file)
    if as_json:
        click.echo(json.dumps({**{role: is_usable(findings, role) for role in ROLES}, "checks": _records(findings)}))
    else:
        _show(findings)
    sys.exit(0 if all(is_usable(findings, role) for role in ROLES) else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of lines.")
def token(as_json: bool) -> None:
    """Generate a random token and its hash.

    Give the token to the client, gateway or relay, and add the hash to portal.toml. The token can't be derived from the
    hash.
    """
    secret = secrets.token_urlsafe(_TOKEN_BYTES)
    if as_json:
        click.echo(json.dumps({"token": secret, "sha3_256": token_hash(secret)}))
        return
    click.echo(f'token:    {secret}\nsha3_256 = "{token_hash(secret)}"')


def _records(findings: list[Finding]) -> list[dict[str, object]]:
    return [
        {
            "check": finding.check,
            "state": finding.state.value,
            "found": finding.found,
            "advice": finding.advice,
            "needed_by": finding.needed_by,
        }
        for finding in findings
    ]


def _show(findings: list[Finding]) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, no_wrap=heading in {"check", ""}, overflow="fold")
    for finding in findings:
        state = Text(finding.state.value, style=_COLOURS[finding.state])
        table.add_row(Text(finding.check), state, Text(finding.found), Text(finding.advice))
    console.print(table)
    for role in ROLES:
        ability = "can" if is_usable(findings, role) else "can't"
        console.print(Text(f"This host {ability} run a {role}."))

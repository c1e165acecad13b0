"""`firezone-tunnel`: commands for operators."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sized
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from firezone_tunnel import __version__
from firezone_tunnel.apps.cli.diagnose import ROLES, CheckState, Finding, is_usable
from firezone_tunnel.apps.cli.diagnose import diagnose as look_at_host
from firezone_tunnel.core.portal.account import Account, token_hash
from firezone_tunnel.core.portal.seed import SeedError
from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.process.seed_file import load_seed
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
@click.option("--client", metavar="ACTOR", help="For a client of this actor.")
@click.option("--gateway", metavar="SITE", help="For a gateway of this site.")
@click.option("--relay", is_flag=True, help="For a relay.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of lines.")
def token(client: str | None, gateway: str | None, relay: bool, as_json: bool) -> None:
    """Generate a random token, and its hash for the portal's seed file.

    Give the token to the client, gateway or relay. With --client, --gateway or --relay, the hash is printed as a whole
    [[tokens]] table to paste into the seed file. The token can't be derived from the hash.
    """
    if (client is not None) + (gateway is not None) + relay > 1:
        raise click.UsageError("--client, --gateway and --relay exclude each other")
    secret = secrets.token_urlsafe(_TOKEN_BYTES)
    line = f'sha3_256 = "{token_hash(secret)}"'
    table = ""
    if client is not None:
        table = f'[[tokens]]\nkind = "client"\nactor = {_quote(client)}\n{line}'
    elif gateway is not None:
        table = f'[[tokens]]\nkind = "gateway"\nsite = {_quote(gateway)}\n{line}'
    elif relay:
        table = f'[[tokens]]\nkind = "relay"\n{line}'
    if as_json:
        record = {"token": secret, "sha3_256": token_hash(secret)}
        click.echo(json.dumps(record | {"seed": table} if table else record))
        return
    click.echo(f"token:    {secret}\n" + (f"\n{table}" if table else line))


@main.group()
def portal() -> None:
    """Tools for operators of a portal."""


@portal.command()
@click.argument("file")
def check(file: str) -> None:
    """Check a seed file, without starting or changing a portal.

    Prints all errors and exits with 1, or prints warnings about what has no effect, and a summary.
    """
    try:
        account, warnings = load_seed(file)
    except ConfigurationError as error:
        problems = error.__cause__.problems if isinstance(error.__cause__, SeedError) else (str(error),)
        click.echo("\n".join(f"error: {what}" for what in problems))
        sys.exit(1)
    for what in warnings:
        click.echo(f"warning: {what}")
    counts = ", ".join(f"{name}: {len(things)}" for name, things in _summary(account) if things)
    click.echo(f"{file} is valid ({counts})")


def _quote(text: str) -> str:
    """A TOML string. JSON's differ in DEL only."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _summary(account: Account) -> list[tuple[str, Sized]]:
    return [
        ("sites", account.sites),
        ("groups", account.groups),
        ("actors", account.actors),
        ("tokens", account.tokens),
        ("resources", account.resources),
        ("policies", account.policies),
        ("TURN servers", account.turn_servers),
    ]


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

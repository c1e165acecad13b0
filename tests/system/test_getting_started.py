"""The commands of the getting-started guide, run on the demo's hosts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.system.hosts import Host, Lab
from tests.system.network import PORTAL, SERVER, Network
from tests.system.programs import Program

pytestmark = pytest.mark.namespaces

_ROOT = Path(__file__).parents[2]
_GUIDE = (_ROOT / "docs/getting-started.md").read_text()
_SOURCES = ("env", f"PYTHONPATH={_ROOT}")
_BIN = str(Path(sys.executable).parent)


def test_whoever_follows_the_guide_reaches_the_web_server(lab: Lab) -> None:
    network = Network(lab)
    network.start_servers()
    client_token, client_table = _make_token(network.portal, "client")
    gateway_token, gateway_table = _make_token(network.portal, "gateway")
    seed = "\n".join((*_blocks("The portal", "toml"), client_table, gateway_table))
    path = network.portal.directory / "portal.toml"
    path.write_text(seed)
    check = _command("The portal", "firezone-tunnel portal").replace("portal.toml", str(path))
    checked = network.portal.run(*_SOURCES, *check.split()).stdout
    assert checked == f"{path} is valid (sites: 1, groups: 1, actors: 1, tokens: 2, resources: 1, policies: 1)\n"
    assert f"ws://{PORTAL}:8081" in _GUIDE

    for host in (network.gateway, network.client):
        _diagnose(host)
    _start(network.portal, "The portal")
    gateway = _start(network.gateway, "The gateway", gateway_token)
    network.gateway.run(*_command("The gateway", "curl").split())
    client = _start(network.client, "The client", client_token)
    page = network.client.run("sh", "-c", _command("The client", "curl").replace(f"{SERVER}/", f"{SERVER}/bytes?num=7"))

    assert len(page.stdout) == 7
    for program, ready in ((gateway, "gateway:ready"), (client, "client:tunnel_ready")):
        assert f"`{ready}`" in _GUIDE
        assert ready in program.output()
    assert "tunnel:connection_established" in client.output()


def _make_token(host: Host, role: str) -> tuple[str, str]:
    """A token and its table for the seed file, parsed from the command's output."""
    printed = host.run(*_SOURCES, *_command("The portal", f"firezone-tunnel token --{role}").split()).stdout
    first, table = printed.split("\n", 1)
    return first.removeprefix("token:").strip(), table


def _diagnose(host: Host) -> None:
    command = _command("On each host", "firezone-tunnel").split()
    done = host.run(*_SOURCES, *command, "--json", check=False)
    assert done.returncode == 0, json.loads(done.stdout)


def _start(host: Host, section: str, token: str = "") -> Program:
    """Run the section's twistd command. The hosts share one file system, so each gets its own paths by environment."""
    command = _command(section, "twistd")
    path = host.directory / "token"
    path.write_text(f"{token}\n")
    path.chmod(0o600)
    environment = {"FIREZONE_TOKEN_PATH": str(path), "FIREZONE_STATE_DIR": str(host.state_directory)}
    program = host.spawn(host.name, *command.split(), environment={**environment, "PYTHONPATH": str(_ROOT)})
    program.wait_ready()
    return program


def _command(section: str, program: str) -> str:
    """The first command of a section that begins so, with the path replaced by the installed program."""
    lines = [line.removeprefix("/opt/firezone/bin/") for block in _blocks(section) for line in block.splitlines()]
    command = next(line for line in lines if line.startswith(f"{program} "))
    return command if program == "curl" else f"{_BIN}/{command}"


def _blocks(section: str, language: str = "") -> list[str]:
    """The code blocks in a section of the guide."""
    text = _GUIDE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for name, content in blocks if name == language]

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
    client_token, client_hash = _make_token(network.portal)
    gateway_token, gateway_hash = _make_token(network.portal)
    seed = _blocks("The portal", "toml")[0].replace("CLIENT_HASH", client_hash).replace("GATEWAY_HASH", gateway_hash)
    (network.portal.directory / "portal.toml").write_text(seed)
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


def _make_token(host: Host) -> tuple[str, str]:
    """A token and its hash, parsed from the command's output."""
    printed = host.run(*_SOURCES, *_command("The portal", "/opt/firezone/bin/firezone-tunnel").split()).stdout
    token, hashed = re.findall(r"token: +(\S+)\nsha3_256 = \"(\w+)\"", printed)[0]
    return token, hashed


def _diagnose(host: Host) -> None:
    command = _command("On each host", "/opt/firezone/bin/firezone-tunnel").split()
    done = host.run(*_SOURCES, *command, "--json", check=False)
    assert done.returncode == 0, json.loads(done.stdout)


def _start(host: Host, section: str, token: str = "") -> Program:
    """Run the section's twistd command. The hosts share one file system, so each gets its own paths by environment."""
    command = _command(section, "/opt/firezone/bin/twistd")
    path = host.directory / "token"
    path.write_text(f"{token}\n")
    path.chmod(0o600)
    environment = {"FIREZONE_TOKEN_PATH": str(path), "FIREZONE_STATE_DIR": str(host.state_directory)}
    program = host.spawn(host.name, *command.split(), environment={**environment, "PYTHONPATH": str(_ROOT)})
    program.wait_ready()
    return program


def _command(section: str, program: str) -> str:
    """The first command of a section that runs this program, with the path replaced by the installed program."""
    lines = [line for block in _blocks(section) for line in block.splitlines()]
    command = next(line for line in lines if line.startswith(f"{program} "))
    return command.replace("/opt/firezone/bin", _BIN)


def _blocks(section: str, language: str = "") -> list[str]:
    """The code blocks in a section of the guide."""
    text = _GUIDE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for name, content in blocks if name == language]

"""The container files, tested without a Docker engine by running the entry points as scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from firezone_tunnel.apps.client.options import Options as ClientOptions
from firezone_tunnel.apps.gateway.options import Options as GatewayOptions
from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.core.portal.seed import SeedContext, parse_seed
from firezone_tunnel.shell.process.settings import Options

yaml = pytest.importorskip("yaml")

_ROOT = Path(__file__).parents[2]
_DOCKER = _ROOT / "docker"
_IMAGE_SCRIPTS = "/usr/local/lib/firezone/"

# A stand-in for twistd that prints its arguments, environment and process id.
_FAKE_TWISTD = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}))
"""


@pytest.fixture
def fake_bin(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "twistd").write_text(_FAKE_TWISTD)
    (directory / "twistd").chmod(0o755)
    return directory


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_the_entry_process_becomes_twistd_in_the_foreground(fake_bin: Path, role: str) -> None:
    started = _start(fake_bin, role, "--log-level", "debug", FIREZONE_TOKEN="a-token")

    assert started["arguments"] == ["-n", "--pidfile=", f"firezone-{role}", "--log-level", "debug"]
    assert started["environment"]["FIREZONE_TOKEN"] == "a-token"
    assert started["pid"] == started["entry_pid"]


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_a_token_that_names_a_file_is_replaced_by_its_content(fake_bin: Path, tmp_path: Path, role: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the-token\n")

    started = _start(fake_bin, role, FIREZONE_TOKEN=str(secret))

    assert started["environment"]["FIREZONE_TOKEN"] == "the-token"
    assert "the-token" not in started["arguments"]


def test_the_client_leaves_a_containers_resolv_conf_alone_unless_told_otherwise(fake_bin: Path) -> None:
    assert _start(fake_bin, "client")["environment"]["FIREZONE_DNS_CONTROL"] == "disabled"
    started = _start(fake_bin, "client", FIREZONE_DNS_CONTROL="etc-resolv-conf")
    assert started["environment"]["FIREZONE_DNS_CONTROL"] == "etc-resolv-conf"


def test_the_portal_serves_the_mounted_seed_unless_told_otherwise(fake_bin: Path) -> None:
    arguments = _start(fake_bin, "portal")["arguments"]
    assert arguments[:3] == ["-n", "--pidfile=", "firezone-portal"]
    assert arguments[arguments.index("--seed") + 1] == "/etc/firezone/portal.toml"
    assert _start(fake_bin, "portal", "--listen", "[::]:9000")["arguments"][3:] == ["--listen", "[::]:9000"]


def test_every_script_of_the_dockerfile_exists_and_can_be_executed() -> None:
    named = re.findall(rf'"{_IMAGE_SCRIPTS}([\w-]+)"', _dockerfile())

    assert {"client", "gateway", "portal", "server"} <= set(named)
    assert [name for name in named if not os.access(_DOCKER / name, os.X_OK)] == []


def test_everything_the_dockerfile_copies_from_the_sources_exists() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", _dockerfile(), re.MULTILINE)

    assert copies != []
    assert [path for line in copies for path in line.split() if not (_ROOT / path).exists()] == []


def test_every_role_is_a_target_with_an_entry_point_and_a_health_check() -> None:
    stages = _stages()

    for role in ("client", "gateway", "portal"):
        assert re.search(r"^HEALTHCHECK .* CMD \[", stages[role], re.MULTILINE)
        assert re.search(r"^ENTRYPOINT \[", stages[role], re.MULTILINE)


def test_compose_builds_targets_that_exist_and_mounts_files_that_exist() -> None:
    compose = _compose()
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", _dockerfile(), re.MULTILINE))
    mounted = [mount.split(":")[0] for one in compose["services"].values() for mount in one.get("volumes", ())]
    mounted += [secret["file"] for secret in compose["secrets"].values()]

    assert {service["build"]["target"] for service in compose["services"].values()} <= targets
    assert [path for path in mounted if path.startswith(".") and not (_ROOT / path).exists()] == []


def test_compose_keeps_the_client_out_of_the_private_network() -> None:
    services = _compose()["services"]

    assert set(services["client"]["networks"]) == {"internet"}
    assert set(services["server"]["networks"]) == {"private"}
    assert set(services["gateway"]["networks"]) == {"internet", "private"}


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_compose_gives_a_tunnel_the_device_and_the_capability_it_needs(role: str) -> None:
    service = _compose()["services"][role]

    assert service["cap_add"] == ["NET_ADMIN"]
    assert service["devices"] == ["/dev/net/tun:/dev/net/tun"]
    assert service["environment"]["FIREZONE_API_URL"] == "ws://portal:8081"


@pytest.mark.parametrize(("role", "topic"), [("client", PeerRole.CLIENT), ("gateway", PeerRole.GATEWAY)])
def test_the_portal_of_compose_knows_the_tokens_of_compose(role: str, topic: PeerRole) -> None:
    account = parse_seed((_DOCKER / "portal.toml").read_text(), SeedContext(str, ZoneInfo)).account
    compose = _compose()
    token = (_ROOT / compose["secrets"][f"{role}-token"]["file"]).read_text().strip()

    assert compose["services"][role]["environment"]["FIREZONE_TOKEN"].endswith(f":-/run/secrets/{role}-token}}")
    assert compose["services"][role]["secrets"] == [f"{role}-token"]
    assert account.token(topic, token, utc_now=0) is not None


def test_the_portal_of_compose_serves_the_private_network_of_compose() -> None:
    account = parse_seed((_DOCKER / "portal.toml").read_text(), SeedContext(str, ZoneInfo)).account
    (pool,) = _compose()["networks"]["private"]["ipam"]["config"]

    assert [resource.address for resource in account.resources.values()] == [pool["subnet"]]


@pytest.mark.parametrize(("role", "options"), [("client", ClientOptions), ("gateway", GatewayOptions)])
def test_what_must_survive_a_restart_is_on_a_volume(role: str, options: type[Options]) -> None:
    (state,) = [one.default for one in options.settings if one.name == "state-dir"]

    assert re.findall(r"^VOLUME (\S+)$", _stages()[role], re.MULTILINE) == [state]
    assert [volume.split(":")[1] for volume in _compose()["services"][role]["volumes"]] == [state]


def test_the_health_checks_ask_where_the_programs_answer() -> None:
    (health,) = [one.default for one in GatewayOptions.settings if one.name == "health-check-addr"]

    assert health is not None
    assert f"http://127.0.0.1:{health.rpartition(':')[2]}/readyz" in _stages()["gateway"]
    assert "http://127.0.0.1:8081/healthz" in _stages()["portal"]
    assert "--listen 0.0.0.0:8081" in (_DOCKER / "portal").read_text()


def test_compose_is_valid_by_dockers_own_word() -> None:
    if shutil.which("docker") is None or _docker_compose("version").returncode != 0:
        return  # Docker's compose plugin is not available; the tests above parse the file
    checked = _docker_compose("config", "--quiet")
    assert checked.returncode == 0, checked.stderr


def _start(fake_bin: Path, role: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run an entry point with the stand-in for twistd. Returns the stand-in's output."""
    process = subprocess.Popen(
        [str(_DOCKER / role), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": f"{fake_bin}:{os.environ['PATH']}", **environment},
    )
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    started: dict[str, Any] = json.loads(output)
    return started | {"entry_pid": process.pid}


def _docker_compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["docker", "compose", "--file", str(_ROOT / "docker-compose.yml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _dockerfile() -> str:
    """The Dockerfile with continued lines joined."""
    return (_ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def _stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile, by its name."""
    return dict(re.findall(r"^FROM \S+ AS (\w+)$(.*?)(?=^FROM|\Z)", _dockerfile(), re.MULTILINE | re.DOTALL))


def _compose() -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((_ROOT / "docker-compose.yml").read_text())
    return compose

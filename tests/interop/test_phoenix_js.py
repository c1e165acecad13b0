"""The npm `phoenix` client, unmodified, as a peer of our portal, in both forms of its frames."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.utils import getProcessOutputAndValue

from tests.service.portal_peers import CLIENT_TOKEN, LAB_ID, Portal, key, start_portal, stop_portal

_SCRIPT = Path(__file__).with_name("phoenix_client.cjs")


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    directory = tmp_path_factory.mktemp("phoenix")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "phoenix", "ws"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"npm can't install phoenix: {done.stderr.strip()[-200:]}")
    return directory / "node_modules"


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(tmp_path)
    yield portal
    await stop_portal(portal)


@pytest.mark.parametrize("vsn", ["2.0.0", "1.0.0"])
@pytest_twisted.ensureDeferred
async def test_it_joins_gets_its_init_beats_and_gets_a_flow(portal: Portal, node_modules: Path, vsn: str) -> None:
    gateway = await portal.join("gateway")
    running = Deferred.fromCoroutine(_run_client(portal, node_modules, vsn))

    asked = await gateway.receive("authorize_flow", seconds=15)
    gateway.send("flow_authorized", {"ref": asked["ref"]})
    outcome = await running

    assert outcome.get("problem") is None
    assert outcome["joined"] == {}
    assert outcome["init"]["interface"]["ipv4"] == asked["client"]["ipv4"]
    assert outcome["unknown"] == {"reason": "unknown_message"}
    assert outcome["flow"]["resource_id"] == LAB_ID
    assert outcome["flow"]["preshared_key"] == asked["client"]["preshared_key"]
    assert outcome["heartbeats"] >= 3
    assert outcome["left"] is True


async def _run_client(portal: Portal, node_modules: Path, vsn: str) -> dict[str, Any]:
    arguments = {
        "url": f"ws://{portal.address}/client",
        "userAgent": "Linux/6.8 connlib/1.5.3 (x86_64)",
        "vsn": vsn,
        "params": {"token": CLIENT_TOKEN, "external_id": "npm", "public_key": key(1)},
        "resourceId": LAB_ID,
    }
    node = shutil.which("node")
    assert node is not None
    output, errors, code = await getProcessOutputAndValue(
        node, [str(_SCRIPT), json.dumps(arguments)], env=os.environ | {"NODE_PATH": str(node_modules)}
    )
    assert output, errors.decode()
    outcome: dict[str, Any] = json.loads(output.splitlines()[-1])
    return outcome | ({} if code == 0 else {"problem": outcome.get("problem", errors.decode())})

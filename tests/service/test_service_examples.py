"""The examples that embed the portal, the relay and the gateway: each runs as a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.portal_peers import RELAY_TOKEN as LOOPBACK_RELAY_TOKEN
from tests.service.portal_peers import SEED
from tests.service.relay_process import free_port
from tests.system.hosts import Lab
from tests.system.network import PORTAL, SERVER, Network
from tests.system.product import CLIENT_TOKEN, GATEWAY_TOKEN, PORTAL_PORT, Product
from tests.system.programs import Program

_ROOT = Path(__file__).parents[2]
_EXAMPLES = _ROOT / "docs/examples"

Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an example by its name, on loopback."""
    programs: list[Program] = []

    def start(name: str, *arguments: str, token: str = "") -> Program:
        program = Program(
            name,
            [sys.executable, str(_EXAMPLES / f"{name}.py"), *arguments],
            environment={**os.environ, "PYTHONPATH": str(_ROOT), "FIREZONE_TOKEN": token},
            log=tmp_path / f"{name}.log",
            notify_socket=tmp_path / f"{name}.notify",
            working_directory=tmp_path,
        )
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.stop()


def test_a_relay_joins_a_portal_and_both_stop_when_interrupted(start: Start, tmp_path: Path) -> None:
    (tmp_path / "portal.toml").write_text(SEED)
    port = free_port()
    portal = start("portal_service", "portal.toml", "127.0.0.1", str(port))
    _wait_for(portal, "the portal is ready")

    relay = start("relay_service", f"ws://127.0.0.1:{port}/", "127.0.0.1", str(free_port()), token=LOOPBACK_RELAY_TOKEN)
    _wait_for(relay, "the relay is ready")

    for program in (relay, portal):
        program.send_signal(signal.SIGINT)
        assert program.wait_exit() == 0, program.output()


def test_a_relay_that_the_portal_refuses_prints_one_sentence(start: Start, tmp_path: Path) -> None:
    (tmp_path / "portal.toml").write_text(SEED)
    port = free_port()
    _wait_for(start("portal_service", "portal.toml", "127.0.0.1", str(port)), "the portal is ready")

    relay = start("relay_service", f"ws://127.0.0.1:{port}/", "127.0.0.1", str(free_port()), token="wrong")

    relay.process.wait(20)
    assert relay.process.returncode == 1
    (line,) = relay.output().splitlines()
    assert "token" in line


def test_a_portal_without_its_seed_prints_one_sentence(start: Start) -> None:
    portal = start("portal_service", "portal.toml", "127.0.0.1", str(free_port()))

    portal.process.wait(20)
    assert portal.process.returncode == 1
    (line,) = portal.output().splitlines()
    assert "can't read the seed file portal.toml" in line


@pytest.mark.namespaces
def test_a_client_fetches_through_the_gateway(lab: Lab) -> None:
    network = Network(lab)
    network.start_servers()
    product = Product(network)
    product.start_portal()
    url = f"ws://{PORTAL}:{PORTAL_PORT}/"
    gateway = _spawn(lab, "gateway", "gateway_service.py", url, token=GATEWAY_TOKEN)
    _wait_for(gateway, "the gateway is ready")

    client = _spawn(lab, "client", "asyncio_session.py", url, f"http://{SERVER}/bytes?num=100000", token=CLIENT_TOKEN)
    assert client.wait_exit() == 0, client.output()
    assert "100000 bytes" in client.output()

    gateway.send_signal(signal.SIGINT)
    assert gateway.wait_exit() == 0, gateway.output()
    assert "tun-firezone" not in lab.hosts["gateway"].ip("link")
    product.stop()


def _spawn(lab: Lab, host: str, example: str, *arguments: str, token: str) -> Program:
    environment = {"PYTHONPATH": str(_ROOT), "FIREZONE_TOKEN": token}
    return lab.hosts[host].spawn(
        "example", sys.executable, str(_EXAMPLES / example), *arguments, environment=environment
    )


def _wait_for(program: Program, text: str) -> None:
    program.wait_until(lambda: text in program.output(), f"printing {text!r}")

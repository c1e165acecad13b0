"""SIGTERM ends a client and a gateway within five seconds, whatever hangs, and the host is as it was before."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hanging import hanging
from tests.polling import until
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside
from tests.system.network import PORTAL, Network
from tests.system.processes import start
from tests.system.product import PORTAL_PORT, Product
from tests.system.programs import Program

pytestmark = pytest.mark.namespaces

LIMIT = 5.0
_ROOT = str(Path(__file__).parents[2])

BOTH = pytest.mark.parametrize("role", ["client", "gateway"])


@pytest.fixture
def network(lab: Lab) -> Network:
    return Network(lab)


@pytest.fixture
def product(network: Network) -> Iterator[Product]:
    product = Product(network)
    product.start_portal()
    yield product
    product.stop()


@BOTH
def test_a_resolver_that_never_answers_does_not_hold_up_the_end(network: Network, role: str) -> None:
    host = getattr(network, role)
    before = _rules(host)
    program = _start(host, role, "socket.getaddrinfo", FIREZONE_API_URL="wss://portal.example/")
    program.wait_for("portal:connection_stalled", missing="the address of portal.example")

    assert _end(program) < LIMIT
    assert list(program.events("process:end_forced")) == []
    assert _rules(host) == before


@BOTH
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_a_portal_that_does_not_answer_does_not_hold_up_the_end(network: Network, role: str, scheme: str) -> None:
    host = getattr(network, role)
    portal = network.lab.hosts["portal"]
    with inside(portal), socket.create_server((PORTAL, PORTAL_PORT)):
        program = _start(host, role, FIREZONE_API_URL=f"{scheme}://{PORTAL}:{PORTAL_PORT}")
        program.wait_for("portal:connection_stalled")

        assert _end(program) < LIMIT
    assert list(program.events("process:end_forced")) == []


@BOTH
def test_a_netlink_call_that_hangs_leaves_no_rule_behind(network: Network, product: Product, role: str) -> None:
    host = getattr(network, role)
    before = _rules(host)
    program = _start(host, role, "firezone_tunnel.shell.host.route_socket.RouteSocket.add")
    program.wait_for("portal:joined")
    until(lambda: _rules(host) != before, "the rules being set")

    assert _end(program) < LIMIT
    (forced,) = program.events("process:end_forced")
    assert any(": hang (" in place for place in forced["threads"])
    assert _rules(host) == before


def _start(host: Host, role: str, hang: str | None = None, **environment: str) -> Program:
    paths = [_ROOT] if hang is None else [str(hanging(host.directory, hang)), _ROOT]
    health = ("--health-check-addr", "off") if role == "gateway" else ()
    return start(host, role, *health, PYTHONPATH=":".join(paths), **environment)


def _end(program: Program) -> float:
    """Send SIGTERM. Returns the seconds until the end."""
    started = time.monotonic()
    program.terminate()
    assert program.wait_exit(20) == 0
    return time.monotonic() - started


def _rules(host: Host) -> str:
    return host.ip("-4", "rule") + host.ip("-6", "rule")

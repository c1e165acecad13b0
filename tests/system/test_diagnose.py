"""`firezone-tunnel diagnose` on hosts with and without the prerequisites."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.system.hosts import Host, Lab

pytestmark = pytest.mark.namespaces

_ROOT = Path(__file__).parents[2]
_MAIN = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from firezone_tunnel.apps.cli.main import main; main()"
_HOLD = """
import signal
from firezone_tunnel.shell.host.instance import Instance
held = Instance("gateway")
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def host(lab: Lab) -> Host:
    """A host with an uplink of each family."""
    internet = lab.switch("internet")
    internet.route("203.0.113.1/24", "2001:db8:113::1/64")
    host = lab.host("host")
    internet.plug(host, "203.0.113.20/24", "2001:db8:113::20/64", gateways=("203.0.113.1", "2001:db8:113::1"))
    host.sysctl("net.ipv4.conf.all.rp_filter", "0")
    host.sysctl("net.ipv4.conf.eth0.rp_filter", "0")
    return host


def test_on_a_host_that_has_everything_client_and_gateway_can_run_and_nothing_is_changed(host: Host) -> None:
    before = _state(host)

    code, found = _diagnose(host)

    assert {one["state"] for one in found.values()} == {"ok"}
    assert code == 0
    assert found["IPv4 uplink"]["found"] == "eth0 via 203.0.113.1 from 203.0.113.20"
    assert found["IPv6 uplink"]["found"] == "eth0 via 2001:db8:113::1 from 2001:db8:113::20"
    assert found["candidates"]["found"] == "203.0.113.20, 2001:db8:113::20"
    assert "strict rp_filter" not in found
    assert _state(host) == before


def test_without_the_capability_it_says_so_and_ends_with_1(host: Host) -> None:
    code, found = _diagnose(host, "setpriv", "--bounding-set=-net_admin", "--")

    assert code == 1
    assert found["privileges"]["found"] == "root, but without CAP_NET_ADMIN"
    assert {name for name, one in found.items() if one["state"] == "missing"} == {
        *("privileges", "tun", "nftables"),
    }


def test_without_a_network_no_peer_could_be_reached(lab: Lab) -> None:
    code, found = _diagnose(lab.host("alone"))

    assert code == 1
    assert found["candidates"]["state"] == "missing"
    assert (found["IPv4 uplink"]["state"], found["IPv6 uplink"]["state"]) == ("limit", "limit")


def test_strict_reverse_path_filtering_is_told_and_no_obstacle(host: Host) -> None:
    host.sysctl("net.ipv4.conf.eth0.rp_filter", "1")

    code, found = _diagnose(host)

    assert code == 0
    assert found["strict rp_filter"]["found"].startswith("on eth0: ")
    assert found["nftables"]["needed_by"] == ["client", "gateway"]


def test_another_instance_is_named_with_its_process(host: Host) -> None:
    holder = host.spawn("holder", sys.executable, "-c", _HOLD, environment={"PYTHONPATH": str(_ROOT)})
    holder.wait_until(lambda: "held" in holder.output(), "being the gateway")

    code, found = _diagnose(host)

    assert code == 0
    assert found["occupied"]["state"] == "limit"
    assert found["occupied"]["found"].startswith(f"A gateway (process {holder.pid})")


def _diagnose(host: Host, *prefix: str) -> tuple[int, Mapping[str, Any]]:
    """The exit code, and the findings by check."""
    done = host.run(*prefix, sys.executable, "-c", _MAIN, "diagnose", "--json", check=False)
    assert done.stderr == ""
    return done.returncode, {one["check"]: one for one in json.loads(done.stdout)["checks"]}


def _state(host: Host) -> list[str]:
    commands = "ip -brief link; ip -brief address; ip route show table all; ip rule; nft list ruleset"
    lines = host.run("sh", "-c", commands).stdout.splitlines()
    return [line for line in lines if "fe80" not in line]  # added by the kernel shortly after an interface is up

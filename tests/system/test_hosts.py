"""The hosts that the demo, the benchmarks and all other system tests are built on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.hosts import Lab
from tests.system.programs import NotReady

pytestmark = pytest.mark.namespaces


def test_hosts_on_a_switch_reach_each_other_by_both_families(lab: Lab) -> None:
    switch = lab.switch("internet")
    alice, bob = lab.host("alice"), lab.host("bob")
    switch.plug(alice, "203.0.113.20/24", "2001:db8:113::20/64")
    switch.plug(bob, "203.0.113.30/24", "2001:db8:113::30/64")

    assert _can_connect(lab, "bob", "alice", "203.0.113.30")
    assert _can_connect(lab, "bob", "alice", "2001:db8:113::30")


def test_hosts_on_different_networks_do_not_reach_each_other(lab: Lab) -> None:
    alice, bob = lab.host("alice"), lab.host("bob")
    lab.switch("left").plug(alice, "203.0.113.20/24")
    lab.switch("right").plug(bob, "10.20.0.100/24")

    assert not _can_connect(lab, "bob", "alice", "10.20.0.100")


def test_a_host_sees_its_own_resolv_conf_and_the_machine_keeps_its(lab: Lab) -> None:
    before = Path("/etc/resolv.conf").read_bytes()
    host = lab.host("alice")
    host.resolv_conf.write_text("nameserver 192.0.2.53\n")

    assert host.run("cat", "/etc/resolv.conf").stdout == "nameserver 192.0.2.53\n"
    assert Path("/etc/resolv.conf").read_bytes() == before


def test_a_program_is_ready_when_it_says_so_and_its_events_are_readable(lab: Lab) -> None:
    program = lab.host("alice").spawn("a", sys.executable, "-c", _SAY_READY + "time.sleep(60)")

    program.wait_ready()
    assert program.wait_for("a:started", n=3)["n"] == 3
    assert program.resident_bytes() > 1_000_000
    assert program.stop() == -signal.SIGTERM


def test_a_program_that_ends_before_it_is_ready_is_reported_with_its_last_lines(lab: Lab) -> None:
    program = lab.host("alice").spawn("a", sys.executable, "-c", "raise SystemExit('no such portal')")

    with pytest.raises(NotReady, match="no such portal"):
        program.wait_ready()


def test_a_host_that_replaces_another_has_its_name_and_addresses(lab: Lab) -> None:
    switch = lab.switch("internet")
    alice, bob = lab.host("alice"), lab.host("bob")
    switch.plug(alice, "203.0.113.20/24")
    switch.plug(bob, "203.0.113.30/24")
    program = alice.spawn("a", "sleep", "600")
    (alice.directory / "left").touch()

    lab.remove(alice)
    alice = lab.host("alice")
    switch.plug(alice, "203.0.113.20/24")

    assert not program.is_running
    assert not (alice.directory / "left").exists()
    assert _can_connect(lab, "alice", "bob", "203.0.113.20")


def test_closing_ends_every_process_on_the_hosts(lab: Lab) -> None:
    host = lab.host("alice")
    program = host.spawn("a", "sh", "-c", "setsid sleep 600 & echo $! > orphan; wait")
    orphan = host.directory / "orphan"
    program.wait_until(lambda: orphan.exists() and orphan.read_text().endswith("\n"), "telling the process")
    pid = int(orphan.read_text())

    lab.close()

    assert not program.is_running
    assert not _runs(pid)
    assert lab.leftovers() == []


@pytest.mark.serial  # any lab of another worker would sweep it
def test_the_next_lab_sweeps_what_a_killed_one_left() -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", _MAKE_AND_WAIT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert maker.stdout is not None
    names = maker.stdout.readline().split()
    maker.kill()
    maker.wait()
    maker.stdout.close()
    assert all(os.path.exists(name) for name in names)

    with Lab():
        assert not any(os.path.exists(name) for name in names)


def test_a_lab_ends_in_order_on_sigterm() -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", _MAKE_AND_WAIT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert maker.stdout is not None
    names = maker.stdout.readline().split()
    maker.terminate()

    assert maker.wait(20) == 128 + signal.SIGTERM
    maker.stdout.close()
    assert not any(os.path.exists(name) for name in names)


_MAKE_AND_WAIT = """
import signal
from tests.system.hosts import Lab

with Lab() as lab:
    host = lab.host("alice")
    host.spawn("sleeper", "sleep", "600")
    print("/run/netns/" + host.namespace, lab.directory, flush=True)
    signal.pause()
"""


_SAY_READY = """
import os, socket, time
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
print('{"message_type": "a:started", "n": 3}', flush=True)
"""

_LISTEN = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], 8000), family=family)
"""


def _can_connect(lab: Lab, server: str, client: str, address: str) -> bool:
    """Whether a TCP connection from `client` arrives at `server`."""
    script = _LISTEN + _SAY_READY + "listener.accept()"
    program = lab.hosts[server].spawn("server", sys.executable, "-c", script, address)
    program.wait_ready()
    connect = f"import socket; socket.create_connection(({address!r}, 8000), timeout=5)"
    connected = lab.hosts[client].run(sys.executable, "-c", connect, check=False).returncode == 0
    program.stop()
    return connected


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

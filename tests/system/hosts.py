"""Hosts made of network namespaces, joined by cables and switches, gone when their lab closes.

    with Lab() as lab:
        internet = lab.switch("internet")
        alice, bob = lab.host("alice"), lab.host("bob")
        internet.plug(alice, "203.0.113.20/24", "2001:db8:113::20/64")
        internet.plug(bob, "203.0.113.30/24", "2001:db8:113::30/64")
        alice.run("ping", "-c1", "203.0.113.30")

Every host has its own directory with state, runtime and log paths and its own /etc/resolv.conf; nothing of the
machine's own configuration is touched. Names carry the process id of their maker, so that the next lab can
sweep what a killed one left behind. Only the standard library is used: the demo, the benchmarks and the tests share
this module.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tests.system.programs import Program

PREFIX = "fz"
_LAB_NAME = re.compile(rf"^{PREFIX}(\d+)x\d+-")
_lab_numbers = itertools.count()

# A process of a host sees the host's resolv.conf: `ip netns exec` has given it a mount namespace of its own already.
_ENTER = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


class MissingCapability(Exception):
    """This machine or this user can't build network namespaces; the text says what is missing, in one sentence."""


class Lab:
    """Everything built for one run. Closes on leaving the context, on exit and on SIGTERM or SIGHUP."""

    def __init__(self) -> None:
        self.name = f"{PREFIX}{os.getpid()}x{next(_lab_numbers)}"
        self.hosts: dict[str, Host] = {}
        self.directory = Path()
        self._previous_handlers: dict[int, Any] = {}
        self._is_open = False

    def __enter__(self) -> Lab:
        require_capabilities()
        sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._is_open = True
        atexit.register(self.close)
        self._catch_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def host(self, name: str, *, forwards: bool = False) -> Host:
        """A new host without any link; one that `forwards` is a router."""
        host = Host(self, name)
        self.hosts[name] = host
        host.set_up(forwards=forwards)
        return host

    def switch(self, name: str) -> Switch:
        """A network that hosts plug into: a router for its members, which itself leads nowhere."""
        return Switch(self.host(name, forwards=True))

    def cable(self, left: Host, left_interface: str, right: Host, right_interface: str) -> None:
        """Join two hosts by a veth pair; the interfaces come up without addresses."""
        _ip(
            *("link", "add", left_interface, "netns", left.namespace, "type", "veth"),
            *("peer", "name", right_interface, "netns", right.namespace),
        )
        left.ip("link", "set", left_interface, "up")
        right.ip("link", "set", right_interface, "up")

    def close(self) -> None:
        """End every program, remove every namespace and the directory. Safe to call twice."""
        if not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self.close)
        for host in reversed(self.hosts.values()):
            host.stop_programs()
        for host in self.hosts.values():
            _remove_namespace(host.namespace)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._restore_signals()

    def leftovers(self) -> list[str]:
        """Namespaces and directories that carry this lab's name: none once it is closed."""
        directories = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{self.name}-*")]
        return [name for name in _namespaces() if name.startswith(f"{self.name}-")] + directories

    def _catch_signals(self) -> None:
        """Make the signals that would kill us raise SystemExit, unless somebody handles them already."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                self._previous_handlers[number] = signal.signal(number, _exit_on_signal)

    def _restore_signals(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()


class Host:
    """One network namespace: a machine of its own as far as addresses, routes, firewall and sockets go."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.namespace = f"{lab.name}-{name}"
        self.directory = lab.directory / name
        self.state_directory = self.directory / "state"
        self.runtime_directory = self.directory / "run"
        self.log_directory = self.directory / "log"
        self.resolv_conf = self.directory / "resolv.conf"
        self.programs: list[Program] = []

    def set_up(self, *, forwards: bool) -> None:
        for directory in (self.state_directory, self.runtime_directory, self.log_directory):
            directory.mkdir(parents=True)
        self.resolv_conf.write_text("")
        _ip("netns", "add", self.namespace)
        self.ip("link", "set", "lo", "up")
        if forwards:
            self.sysctl("net.ipv4.ip_forward", "1")
            self.sysctl("net.ipv6.conf.all.forwarding", "1")

    def ip(self, *arguments: str) -> str:
        """Run `ip ARGUMENTS` on this host; returns what it prints."""
        return _ip("-n", self.namespace, *arguments)

    def add_address(self, interface: str, *addresses: str) -> None:
        """Addresses with their prefix length, IPv4 or IPv6, usable at once (no duplicate address detection)."""
        for address in addresses:
            self.ip("address", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))

    def sysctl(self, name: str, value: str) -> None:
        self.run("sysctl", "-qw", f"{name}={value}")

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` on this host, with the host's resolv.conf."""
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", _ENTER, "sh", str(self.resolv_conf), *command]

    def run(
        self, *command: str, check: bool = True, timeout: float = 30.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is text.

        Raises: CalledProcessError (with `check`), TimeoutExpired.
        """
        source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            self.command(*command), check=check, timeout=timeout, capture_output=True, text=True, **source
        )

    def spawn(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> Program:
        """Start a program that goes on running; it ends with the lab at the latest.

        `environment` is all that it gets besides PATH and the locale.
        """
        program = Program(
            name,
            self.command(*command),
            environment=_base_environment() | dict(environment or {}),
            log=self.log_directory / f"{name}.log",
            notify_socket=self.directory / f"{name}.notify",
            working_directory=self.directory,
        )
        self.programs.append(program)
        return program

    def stop_programs(self) -> None:
        for program in self.programs:
            program.terminate()
        for program in reversed(self.programs):
            program.stop()
        self.programs.clear()


class Switch:
    """A network of its own: a bridge inside a namespace, which may be its members' default router as well."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._ports = 0
        host.ip("link", "add", "br0", "type", "bridge")
        host.ip("link", "set", "br0", "up")

    def route(self, *addresses: str) -> None:
        """Give the switch itself addresses, for members to name as their default gateways."""
        self.host.add_address("br0", *addresses)

    def plug(self, host: Host, *addresses: str, interface: str = "eth0", gateways: tuple[str, ...] = ()) -> None:
        """Connect a host's new interface to this network; `gateways` become its default routes."""
        port = f"port{self._ports}"
        self._ports += 1
        self.host.lab.cable(host, interface, self.host, port)
        self.host.ip("link", "set", port, "master", "br0")
        host.add_address(interface, *addresses)
        for gateway in gateways:
            host.ip("route", "add", "default", "via", gateway, "dev", interface)


def require_capabilities() -> None:
    """Raises: MissingCapability, where namespaces can't be built here."""
    for program in ("ip", "nft", "sysctl", "mount"):
        if shutil.which(program) is None:
            raise MissingCapability(
                f"The program `{program}` is not installed: run tools/system-packages demo as root."
            )
    if os.geteuid() != 0:
        raise MissingCapability("Network namespaces take root, or a user namespace of your own.")
    if not os.path.exists("/dev/net/tun"):
        raise MissingCapability("There is no /dev/net/tun: load the kernel module `tun`.")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise MissingCapability("This user may not open /dev/net/tun: run it as root, or let everybody (mode 0666).")


def enter_user_namespace(arguments: list[str]) -> None:
    """Replace this process by `arguments`, run as root of a new user, mount and network namespace.

    Raises: MissingCapability, where the kernel or its policy doesn't allow that.
    """
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    trial = subprocess.run(
        [*unshare, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True, check=False
    )
    if trial.returncode != 0:
        reason = " ".join(trial.stderr.split()) or f"unshare ended with {trial.returncode}"
        raise MissingCapability(f"This kernel allows no unprivileged user namespaces ({reason}): run it as root.")
    # `ip netns` keeps its files in /run/netns, which only the machine's root may write to.
    prepare = 'mount -t tmpfs tmpfs /run && mkdir /run/netns && exec "$@"'
    os.execvp("unshare", [*unshare, "sh", "-c", prepare, "sh", *arguments])


def sweep() -> None:
    """Remove what labs of processes that no longer live have left behind."""
    for name in _namespaces():
        match = _LAB_NAME.match(name)
        if match and not _is_alive(int(match[1])):
            _remove_namespace(name)
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*x*-*"):
        match = _LAB_NAME.match(path.name)
        if match and path.is_dir() and path.stat().st_uid == os.getuid() and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _namespaces() -> list[str]:
    try:
        return sorted(os.listdir("/run/netns"))
    except FileNotFoundError:
        return []


def _remove_namespace(name: str) -> None:
    """End what still runs in a namespace, then delete it, and its interfaces with it."""
    for pid in _processes_in(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _processes_in(name: str) -> Iterator[int]:
    answer = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return map(int, answer.stdout.split())


def _is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def _base_environment() -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("LANG", "LC_ALL", "TERM", "PYTHONDONTWRITEBYTECODE") if name in os.environ
    }
    return {"PATH": os.environ.get("PATH", os.defpath), **kept}


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {' '.join(done.stderr.split())}")
    return done.stdout

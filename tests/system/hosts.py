"""Hosts made of network namespaces, connected by cables and switches. Closing the lab removes them.

    with Lab() as lab:
        internet = lab.switch("internet")
        alice, bob = lab.host("alice"), lab.host("bob")
        internet.plug(alice, "203.0.113.20/24", "2001:db8:113::20/64")
        internet.plug(bob, "203.0.113.30/24", "2001:db8:113::30/64")
        alice.run("ping", "-c1", "203.0.113.30")

Each host has its own directory with state, runtime and log paths, and its own /etc/resolv.conf. The machine's
configuration is not changed. Names contain the process id of the lab, so that the next lab can remove the leftovers of
a killed process. The module only uses the standard library, because the demo, the benchmarks and the tests share it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import stat
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
_CABLE = re.compile(r"^\d+: ([^:@]+)", re.MULTILINE)  # in the output of `ip -oneline link`
_lab_numbers = itertools.count()

# Mount the host's resolv.conf. `ip netns exec` runs the process in its own mount namespace.
_ENTER = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


class MissingCapability(Exception):
    """This machine or user can't create network namespaces. The message says what is missing, in one sentence."""


class Lab:
    """All hosts of one run. It closes at the end of the context, at exit, and on SIGTERM or SIGHUP."""

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
        """Create a host without links. With `forwards` it is a router."""
        host = Host(self, name)
        self.hosts[name] = host
        host.set_up(forwards=forwards)
        return host

    def remove(self, host: Host) -> None:
        """Remove a host with its programs, links and directory. A new host may then have its name and addresses."""
        del self.hosts[host.name]
        host.stop_programs()
        host.unplug()  # the kernel takes its time to remove a deleted namespace's links
        _remove_namespace(host.namespace)
        shutil.rmtree(host.directory)

    def switch(self, name: str) -> Switch:
        """Create a network for hosts. It can be a router for its members, but has no uplink."""
        return Switch(self.host(name, forwards=True))

    def cable(self, left: Host, left_interface: str, right: Host, right_interface: str) -> None:
        """Connect two hosts by a veth pair. The interfaces are up and have no addresses."""
        _ip(
            *("link", "add", left_interface, "netns", left.namespace, "type", "veth"),
            *("peer", "name", right_interface, "netns", right.namespace),
        )
        left.ip("link", "set", left_interface, "up")
        right.ip("link", "set", right_interface, "up")

    def close(self) -> None:
        """Stop all programs, remove all namespaces and the directory. May be called more than once."""
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
        """The namespaces and directories with this lab's name. After `close` there should be none."""
        directories = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{self.name}-*")]
        return [name for name in _namespaces() if name.startswith(f"{self.name}-")] + directories

    def _catch_signals(self) -> None:
        """Make SIGTERM and SIGHUP raise SystemExit, unless they have a handler."""
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
    """One network namespace: a separate machine with regard to addresses, routes, firewall and sockets."""

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
        """Run `ip ARGUMENTS` on this host. Returns its output."""
        return _ip("-n", self.namespace, *arguments)

    def add_address(self, interface: str, *addresses: str) -> None:
        """Add IPv4 or IPv6 addresses with prefix length, without duplicate address detection."""
        for address in addresses:
            self.ip("address", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))

    def unplug(self) -> None:
        """Remove all cables."""
        for interface in _CABLE.findall(self.ip("-oneline", "link", "show", "type", "veth")):
            self.ip("link", "delete", interface)

    def sysctl(self, name: str, value: str) -> None:
        self.run("sysctl", "-qw", f"{name}={value}")

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` on this host, with the host's resolv.conf."""
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", _ENTER, "sh", str(self.resolv_conf), *command]

    def run(
        self, *command: str, check: bool = True, timeout: float = 30.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and wait for its end. Its output is text.

        Raises: CalledProcessError (with `check`), TimeoutExpired.
        """
        source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            self.command(*command), check=check, timeout=timeout, capture_output=True, text=True, **source
        )

    def spawn(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> Program:
        """Start a program in the background. It ends with the lab at the latest.

        Its environment is `environment`, PATH and the locale.
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
    """A network: a bridge in a separate namespace, which can also be the default router of its members."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._ports = 0
        host.ip("link", "add", "br0", "type", "bridge")
        host.ip("link", "set", "br0", "up")

    def route(self, *addresses: str) -> None:
        """Add addresses to the switch itself, which members can use as default gateways."""
        self.host.add_address("br0", *addresses)

    def plug(self, host: Host, *addresses: str, interface: str = "eth0", gateways: tuple[str, ...] = ()) -> None:
        """Connect a new interface of a host to this network, with default routes through `gateways`."""
        port = f"port{self._ports}"
        self._ports += 1
        self.host.lab.cable(host, interface, self.host, port)
        self.host.ip("link", "set", port, "master", "br0")
        host.add_address(interface, *addresses)
        for gateway in gateways:
            host.ip("route", "add", "default", "via", gateway, "dev", interface)


def require_capabilities() -> None:
    """
    Raises: MissingCapability, if this machine or user can't create the namespaces.
    """
    for program in ("ip", "nft", "sysctl", "mount"):
        if shutil.which(program) is None:
            raise MissingCapability(
                f"The program `{program}` is not installed: run tools/system-packages demo as root."
            )
    if os.geteuid() != 0:
        raise MissingCapability("Creating network namespaces requires root, or a user namespace: run it as root.")
    if not os.path.exists("/dev/net/tun"):
        raise MissingCapability("/dev/net/tun does not exist: load the kernel module `tun`.")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise MissingCapability("This user can't open /dev/net/tun: run it as root, or set the device's mode to 0666.")


def enter_user_namespace(arguments: list[str]) -> None:
    """Replace this process by `arguments`, run as root in a new user, mount and network namespace.

    Raises: MissingCapability, if the kernel or its security policy doesn't allow it.
    """
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    trial = subprocess.run(
        [*unshare, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True, check=False
    )
    if trial.returncode != 0:
        reason = " ".join(trial.stderr.split()) or f"unshare ended with {trial.returncode}"
        raise MissingCapability(f"Can't create an unprivileged user namespace ({reason}): run it as root.")
    # `ip netns` keeps its files in /run/netns, which is only writable for the machine's root.
    prepare = 'mount -t tmpfs tmpfs /run && mkdir /run/netns && exec "$@"'
    os.execvp("unshare", [*unshare, "sh", "-c", prepare, "sh", *arguments])


def sweep() -> None:
    """Remove the leftovers of labs whose process has ended."""
    for name in _namespaces():
        match = _LAB_NAME.match(name)
        if match and not _is_alive(int(match[1])):
            _remove_namespace(name)
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*x*-*"):
        match = _LAB_NAME.match(path.name)
        if match and not _is_alive(int(match[1])) and _is_own_directory(path):
            shutil.rmtree(path, ignore_errors=True)


def _namespaces() -> list[str]:
    try:
        return sorted(os.listdir("/run/netns"))
    except FileNotFoundError:
        return []


def _remove_namespace(name: str) -> None:
    """Kill the processes in a namespace, then delete it together with its interfaces."""
    for pid in _processes_in(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _processes_in(name: str) -> Iterator[int]:
    answer = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return map(int, answer.stdout.split())


def _is_own_directory(path: Path) -> bool:
    """False as well if another process, which sweeps at the same time, has just removed it."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return False


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

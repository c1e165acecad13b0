"""The host's network is put right, whatever other programs do to it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from firezone_tunnel.errors import FirezoneError
from firezone_tunnel.shell.host import reconciler as reconciler_module
from firezone_tunnel.shell.host.firewall import GatewayFirewall
from firezone_tunnel.shell.host.guard import ResourceGuard
from firezone_tunnel.shell.host.link import TunnelLink
from firezone_tunnel.shell.host.parts import HostState, Part
from firezone_tunnel.shell.host.reconciler import Reconciler
from firezone_tunnel.shell.host.route_socket import RouteSocket
from firezone_tunnel.shell.host.routing import TunnelRoutes, TunnelRules
from firezone_tunnel.shell.host.rpfilter import ReplyMarks
from firezone_tunnel.shell.host.rtnetlink import RtNetlink
from firezone_tunnel.shell.host.watcher import NetworkWatcher
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.tun.device import TunDevice, open_tun
from tests.polling import PATIENCE
from tests.system.firewalls import DOCKER, UFW
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

NAME = "tun-firezone"
NETWORKS = ("10.20.0.0/16", "100.64.0.0/11", "2001:db8:20::/48", "fd00:2021:1111::/107")
STATE = HostState(
    ipv4="100.64.0.1",
    ipv6="fd00:2021:1111::1",
    routes=tuple(ipaddress.ip_network(network) for network in NETWORKS),
    uplinks=("eth0",),
)
RECOVERY = 1.0  # seconds
_ETH_P_ALL = 3  # <linux/if_ether.h>

# What each command takes away, by the words that name it in the log.
ROUTING_FAULTS = {
    "ip rule del priority 100": "the IPv4 rule",
    "ip -6 rule del priority 100": "the IPv6 rule",
    "ip rule flush; ip -6 rule flush": "the IPv6 rule",
    f"ip link set {NAME} down": f"{NAME} up",
    f"ip link set {NAME} down; ip link set {NAME} up": "the route 10.20.0.0/16",
    f"ip link set {NAME} mtu 1500": "the MTU 1280",
    f"ip link set {NAME} txqueuelen 5": "the MTU 1280",
    f"ip -4 address flush dev {NAME}": "the address 100.64.0.1",
    f"ip -6 address flush dev {NAME}": "the address fd00:2021:1111::1",
    f"ip address add 192.0.2.77/32 dev {NAME}": "without the address 192.0.2.77",
    "ip route flush table 0x2021fd00": "the route 10.20.0.0/16",
    "ip -6 route flush table 0x2021fd00": "the route 2001:db8:20::/48",
    "ip route del 10.20.0.0/16 table 0x2021fd00": "the route 10.20.0.0/16",
    f"ip route add 10.99.0.0/16 dev {NAME} table 0x2021fd00": "no route 10.99.0.0/16",
    "ip route replace 10.20.0.0/16 dev eth0 table 0x2021fd00": "the route 10.20.0.0/16",
}
FIREWALL_FAULTS = {
    "nft flush ruleset": "the nftables table inet firezone_gateway",
    "nft delete table inet firezone_gateway": "the nftables table inet firezone_gateway",
    "nft flush chain inet firezone_gateway postrouting": "the nftables table inet firezone_gateway",
    "nft insert rule inet firezone_gateway forward drop": "the nftables table inet firezone_gateway",
    f"echo '{DOCKER}' | nft -f -": "chain ip filter DOCKER-USER",
    f"echo '{UFW}' | nft -f -": "chain ip6 filter FORWARD",
    f"nft flush ruleset; echo '{DOCKER}' | nft -f -": "chain ip filter DOCKER-USER",
    "sysctl -qw net.ipv4.ip_forward=0": "net.ipv4.ip_forward",
    "sysctl -qw net.ipv6.conf.all.forwarding=0": "net.ipv6.conf.all.forwarding",
}
STRICT = "sysctl -qw net.ipv4.conf.eth0.rp_filter=1"
MARK_FAULTS = {
    "nft delete table inet firezone_client": "the nftables table inet firezone_client",
    "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.src_valid_mark=0": "src_valid_mark",
}


@pytest.mark.parametrize("fault", ROUTING_FAULTS)
@pytest_twisted.ensureDeferred
async def test_routing_is_repaired(host: Host, kept: Kept, fault: str, logged: list[dict[str, Any]]) -> None:
    await kept.start(STATE)
    before = routing(host)

    host.run("sh", "-c", fault)
    await becomes(lambda: routing(host) == before)
    await becomes(lambda: kept.host.is_settled)

    assert ROUTING_FAULTS[fault] in named(logged)
    assert kept.host.repairs >= 1


@pytest.mark.parametrize("fault", FIREWALL_FAULTS)
@pytest_twisted.ensureDeferred
async def test_a_gateways_firewall_is_repaired(
    host: Host, kept: Kept, fault: str, logged: list[dict[str, Any]]
) -> None:
    await kept.start(STATE, GatewayFirewall(interface=NAME, state_directory=kept.state))
    before = own_rules(host)

    host.run("sh", "-c", fault)
    await becomes(lambda: FIREWALL_FAULTS[fault] in named(logged))

    assert own_rules(host) >= before
    shown = host.run("sysctl", "-n", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding").stdout
    assert shown.split() == ["1", "1"]


@pytest.mark.parametrize("fault", MARK_FAULTS)
@pytest_twisted.ensureDeferred
async def test_marks_for_strict_reverse_path_filters_come_with_the_filter_and_stay(
    host: Host, kept: Kept, fault: str, logged: list[dict[str, Any]]
) -> None:
    marks = ReplyMarks(state_directory=kept.state)
    await kept.start(STATE, marks)
    assert own_rules(host) == 0

    host.run("sh", "-c", STRICT)
    await becomes(lambda: own_rules(host) == 1)
    host.run("sh", "-c", fault)
    await becomes(lambda: MARK_FAULTS[fault] in named(logged))

    assert own_rules(host) == 1
    await kept.host.stop()
    assert own_rules(host) == 0


@pytest.mark.serial
@pytest.mark.parametrize("fault", ["ip rule del priority 100", "nft flush ruleset"])
@pytest_twisted.ensureDeferred
async def test_a_repair_takes_less_than_a_second(host: Host, kept: Kept, fault: str) -> None:
    await kept.start(STATE, GatewayFirewall(interface=NAME, state_directory=kept.state))
    before = routing(host), own_rules(host)

    host.run("sh", "-c", fault)
    await becomes(lambda: (routing(host), own_rules(host)) == before, within=RECOVERY)


@pytest_twisted.ensureDeferred
async def test_all_faults_at_once_are_repaired(host: Host, kept: Kept) -> None:
    await kept.start(STATE, GatewayFirewall(interface=NAME, state_directory=kept.state))
    before = routing(host), own_rules(host)

    host.run("sh", "-c", f"ip rule flush; ip -6 rule flush; nft flush ruleset; ip link set {NAME} down", check=False)
    await becomes(lambda: (routing(host), own_rules(host)) == before)


@pytest_twisted.ensureDeferred
async def test_a_fault_without_a_notification_is_found_by_the_next_look(
    host: Host, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler_module, "LOOK_INTERVAL", 0.2)
    await kept.start(STATE)
    kept.watcher.close()
    before = routing(host)

    host.ip("rule", "del", "priority", "100")

    await becomes(lambda: routing(host) == before)


@pytest_twisted.ensureDeferred
async def test_while_another_program_fights_it_is_named_and_nothing_leaves_in_clear(
    host: Host, kept: Kept, logged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler_module, "CALM", 2.0)
    await kept.start(STATE, ResourceGuard(interface=NAME))
    with fighting(host):
        await becomes(lambda: message(logged, "host:contested") is not None)
        await becomes(lambda: "firezone_guard" in host.run("nft", "list", "ruleset").stdout)
        repairs = kept.host.repairs
        await deferLater(reactor, 2.0)
        assert kept.host.repairs - repairs <= 2 * 3  # two rules, once a second
        for destination in ("10.20.0.7", "2001:db8:20::7"):
            assert not leaves(host, destination)
        assert leaves(host, "192.0.2.1")
    await becomes(lambda: "firezone_guard" not in host.run("nft", "list", "ruleset").stdout)
    await becomes(lambda: kept.host.is_settled)


@pytest_twisted.ensureDeferred
async def test_what_cannot_be_repaired_is_a_problem_until_it_can(
    host: Host, kept: Kept, logged: list[dict[str, Any]]
) -> None:
    await kept.start(STATE, ResourceGuard(interface=NAME))

    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")
    await becomes(lambda: bool(kept.host.problems))
    assert "fd00:2021:1111::1" in kept.host.problems[0]
    await becomes(lambda: not leaves(host, "2001:db8:20::7"))

    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "0")
    await becomes(lambda: kept.host.is_settled)
    assert message(logged, "host:as_wanted_again") is not None


@pytest_twisted.ensureDeferred
async def test_the_first_failure_is_final(host: Host, kept: Kept) -> None:
    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")

    await kept.start(HostState(ipv6="fd00:2021:1111::1"))

    assert "check that the host supports" in str(kept.failed[0])


@pytest_twisted.ensureDeferred
async def test_the_end_leaves_the_host_as_it_was(host: Host, kept: Kept) -> None:
    before = routing(host, own=False), host.run("nft", "list", "ruleset").stdout
    await kept.start(STATE, GatewayFirewall(interface=NAME, state_directory=kept.state))

    await kept.host.stop()
    host.ip("link", "del", NAME)

    assert (routing(host, own=False), host.run("nft", "list", "ruleset").stdout) == before


class Kept:
    """A reconciler at work."""

    def __init__(self, device: TunDevice, state: Path) -> None:
        self.device = device
        self.state = state
        self.failed: list[FirezoneError] = []
        self._settled: list[HostState] = []
        self._netlink = RtNetlink()
        self._routes = RouteSocket()
        self._worker = WorkerThread(reactor)

    async def start(self, state: HostState, *parts: Part) -> None:
        """Returns once the state is there, or has failed."""
        link = TunnelLink(self._netlink, NAME)
        own = (link, TunnelRoutes(self._routes, link), TunnelRules(self._netlink, link))
        self.host = Reconciler(
            reactor, self._worker, (*own, *parts), on_settled=self._settled.append, on_failed=self.failed.append
        )
        self.watcher = NetworkWatcher(reactor, self.host.notice, own_link=NAME, own_ports=self._own_ports)
        self.host.want(state)
        await becomes(lambda: bool(self._settled or self.failed))
        await deferLater(reactor, 0.1)  # our own changes are noticed, too

    def _own_ports(self) -> tuple[int | None, ...]:
        return self._netlink.port_id, self._routes.port_id

    async def stop(self) -> None:
        self.watcher.close()
        await self.host.stop()
        await self._worker.call(self._netlink.close)
        await self._worker.call(self._routes.close)
        await self._worker.stop()


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    host = lab.host("host")
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8:113::2/64")
    host.ip("route", "add", "default", "via", "192.0.2.1")
    host.ip("route", "add", "default", "via", "2001:db8:113::1")
    for router in ("192.0.2.1", "2001:db8:113::1"):
        host.ip("neighbour", "replace", router, "lladdr", "02:00:00:00:00:01", "dev", "eth0")
    with inside(host):
        yield host


@pytest.fixture
def kept(host: Host, tmp_path: Path) -> Iterator[Kept]:
    device = open_tun(NAME)
    kept = Kept(device, tmp_path)
    yield kept
    pytest_twisted.blockon(Deferred.fromCoroutine(kept.stop()))
    device.close()


async def becomes(condition: Callable[[], bool], *, within: float = PATIENCE) -> None:
    """Wait until the condition holds. The commands that read the host's state don't count."""
    waited = 0.0
    while not condition():
        assert waited < within, f"not within {within} s"
        await deferLater(reactor, 0.05)
        waited += 0.05


def routing(host: Host, *, own: bool = True) -> list[str]:
    """Addresses, rules and routes of the tunnel."""
    commands = ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"]
    if own:
        commands.append(f"-o link show dev {NAME}")
    shown = [host.run("ip", *command.split(), check=False).stdout for command in commands]
    lines = sorted(line.strip() for one in shown for line in one.splitlines())
    return [line for line in lines if not own or "2021fd00" in line or "539098368" in line or NAME in line]


def own_rules(host: Host) -> int:
    """The number of tables and rules of ours."""
    ruleset = host.run("nft", "list", "ruleset").stdout
    return ruleset.count("table inet firezone") + ruleset.count('comment "firezone_tunnel"')


def leaves(host: Host, destination: str) -> bool:
    """Whether a packet that an application sends by the uplink gets there."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as uplink:
        uplink.bind(("eth0", _ETH_P_ALL))
        uplink.settimeout(0.2)
        with socket.socket(family, socket.SOCK_DGRAM) as application:
            application.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            with contextlib.suppress(OSError):
                application.sendto(b"secret", (destination, 9))
        with contextlib.suppress(TimeoutError):
            while True:
                if b"secret" in uplink.recv(2048):
                    return True
    return False


@contextlib.contextmanager
def fighting(host: Host) -> Iterator[None]:
    """Another program deletes the rules whenever they are there."""
    over = threading.Event()

    def fight() -> None:
        while not over.is_set():
            host.run("sh", "-c", "ip rule del priority 100; ip -6 rule del priority 100", check=False)
            time.sleep(0.05)

    thread = threading.Thread(target=fight)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def message(logged: list[dict[str, Any]], message_type: str) -> dict[str, Any] | None:
    return next((one for one in logged if one["message_type"] == message_type), None)


def named(logged: list[dict[str, Any]]) -> str:
    """Everything that was reported as repaired."""
    found = [one for one in logged if one["message_type"] in {"host:repaired", "host:contested"}]
    return "\n".join(item for one in found for item in one["missing"])

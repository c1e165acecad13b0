"""Forwarding, masquerading and reverse-path filters on real hosts.

A veth interface named like the TUN device replaces the tunnel: its packets are those of the gateway's clients.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host import nftables, sysctl
from firezone_tunnel.shell.host.firewall import GatewayFirewall
from firezone_tunnel.shell.host.parts import HostState
from firezone_tunnel.shell.host.rpfilter import ReplyMarks
from firezone_tunnel.shell.host.tables import FIREZONE_MARK
from tests.polling import until
from tests.system.firewalls import DOCKER, UFW
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

TUNNEL = "tun-firezone"
CLIENT = {"ipv4": "100.64.0.5", "ipv6": "fd00:2021:1111::5"}
GATEWAY = {"ipv4": "10.20.0.1", "ipv6": "fd00:20::1"}
SERVER = {"ipv4": "10.20.0.100", "ipv6": "fd00:20::100"}
FAMILIES = list(CLIENT)
STATE = HostState()
UPLINKS = HostState(uplinks=("eth1",))

PERMISSIVE = """
table ip filter {
    chain FORWARD { type filter hook forward priority filter; policy accept; ip daddr 192.0.2.1 drop; }
}
"""
FIREWALLD = """
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state established,related accept
        reject with icmpx admin-prohibited
    }
}
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_sees_the_gateways_address(network: Network, firewall: GatewayFirewall, family: str) -> None:
    firewall.put_right(STATE, is_suspect=True)

    assert network.seen_by_the_server(family) == GATEWAY[family]


@pytest.mark.parametrize(
    ("other", "families"),
    [(DOCKER, ["ipv4"]), (UFW, FAMILIES), (FIREWALLD, FAMILIES)],
    ids=["Docker", "ufw", "firewalld"],
)
def test_another_firewall_that_drops_lets_the_tunnel_through(
    network: Network, firewall: GatewayFirewall, other: str, families: list[str]
) -> None:
    network.gateway.run("nft", "-f", "-", stdin=other)
    before = network.gateway.run("nft", "list", "ruleset").stdout

    firewall.put_right(STATE, is_suspect=True)
    seen = [network.seen_by_the_server(family) for family in families]
    firewall.remove()

    assert seen == [GATEWAY[family] for family in families]
    assert network.gateway.run("nft", "list", "ruleset").stdout == before


def test_dockers_own_chain_is_the_one_that_is_opened(network: Network, firewall: GatewayFirewall) -> None:
    network.gateway.run("nft", "-f", "-", stdin=DOCKER)

    firewall.put_right(STATE, is_suspect=True)

    assert TUNNEL in network.gateway.run("nft", "list", "chain", "ip", "filter", "DOCKER-USER").stdout
    assert TUNNEL not in network.gateway.run("nft", "list", "chain", "ip", "filter", "FORWARD").stdout


def test_firewalls_that_accept_are_left_alone(network: Network, firewall: GatewayFirewall) -> None:
    network.gateway.run("nft", "-f", "-", stdin=PERMISSIVE)
    before = network.gateway.run("nft", "list", "table", "ip", "filter").stdout

    firewall.put_right(STATE, is_suspect=True)

    assert network.gateway.run("nft", "list", "table", "ip", "filter").stdout == before


def test_everything_is_put_back_at_the_end(network: Network, firewall: GatewayFirewall, state: Path) -> None:
    network.gateway.sysctl("net.ipv4.conf.eth1.forwarding", "1")
    before = settings(network.gateway)

    firewall.put_right(STATE, is_suspect=True)
    assert settings(network.gateway) != before
    firewall.remove()

    assert settings(network.gateway) == before
    assert network.gateway.run("nft", "list", "ruleset").stdout == ""
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("change", ["an interface", "a firewall"])
def test_forwarding_stays_on_once_something_else_may_need_it(
    lab: Lab, network: Network, firewall: GatewayFirewall, state: Path, change: str
) -> None:
    firewall.put_right(STATE, is_suspect=True)

    if change == "an interface":
        network.gateway.ip("link", "add", "docker0", "type", "bridge")
    else:
        network.gateway.run("nft", "-f", "-", stdin=UFW)
    firewall.remove()

    assert forwarding(network.gateway) == ["1", "1"]
    assert "firezone" not in network.gateway.run("nft", "list", "ruleset").stdout
    assert list(state.iterdir()) == []


def test_forwarding_that_was_on_before_stays_on(network: Network, firewall: GatewayFirewall) -> None:
    network.gateway.sysctl("net.ipv4.ip_forward", "1")

    firewall.put_right(STATE, is_suspect=True)
    firewall.remove()

    assert forwarding(network.gateway) == ["1", "0"]


def test_what_a_killed_predecessor_left_is_swept_and_its_originals_are_kept(network: Network, state: Path) -> None:
    network.gateway.run("nft", "-f", "-", stdin=DOCKER)
    before = settings(network.gateway)
    GatewayFirewall(interface="tun-before", state_directory=state).put_right(STATE, is_suspect=True)

    successor = GatewayFirewall(interface=TUNNEL, state_directory=state)
    successor.put_right(STATE, is_suspect=True)
    rules = network.gateway.run("nft", "list", "ruleset").stdout
    originals = json.loads((state / "gateway-sysctls.json").read_text())["originals"]
    successor.remove()

    assert "tun-before" not in rules
    assert rules.count(f'iifname "{TUNNEL}"') == 2
    assert originals["net/ipv4/ip_forward"] == "0"
    assert settings(network.gateway) == before


def test_a_gateway_that_was_never_installed_removes_nothing(network: Network, firewall: GatewayFirewall) -> None:
    network.gateway.run("nft", "-f", "-", stdin=UFW)
    before = settings(network.gateway), network.gateway.run("nft", "list", "ruleset").stdout

    firewall.remove()

    assert (settings(network.gateway), network.gateway.run("nft", "list", "ruleset").stdout) == before


def test_originals_of_an_earlier_boot_do_not_count(network: Network, firewall: GatewayFirewall, state: Path) -> None:
    stale = {"boot_id": "another", "originals": {"net/ipv4/ip_forward": "1"}, "notes": []}
    (state / "gateway-sysctls.json").write_text(json.dumps(stale))

    firewall.put_right(STATE, is_suspect=True)
    firewall.remove()

    assert forwarding(network.gateway) == ["0", "0"]


def test_a_host_keeps_the_default_route_it_was_advertised(network: Network, firewall: GatewayFirewall) -> None:
    network.gateway.sysctl("net.ipv6.conf.eth1.accept_ra", "1")
    network.server.add_address("eth0", "fe80::1/64")

    def has_default_route() -> bool:
        with inside(network.server):
            advertise_router("eth0")
        return "default" in network.gateway.ip("-6", "route")

    until(has_default_route)

    firewall.put_right(STATE, is_suspect=True)

    assert "default" in network.gateway.ip("-6", "route")
    assert network.gateway.run("sysctl", "-n", "net.ipv6.conf.eth1.accept_ra").stdout.strip() == "2"
    firewall.remove()
    assert network.gateway.run("sysctl", "-n", "net.ipv6.conf.eth1.accept_ra").stdout.strip() == "1"


def test_a_host_without_nft_is_told_what_to_install(
    network: Network, firewall: GatewayFirewall, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(PlatformError, match="package nftables"):
            firewall.put_right(STATE, is_suspect=True)

    assert forwarding(network.gateway) == ["0", "0"]


def test_a_setting_that_cant_be_made_is_named_and_nothing_is_left(
    network: Network, firewall: GatewayFirewall, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def read_only(path: Path, text: str) -> int:
        if path.is_relative_to(sysctl.PROC_SYS):
            raise OSError(30, "Read-only file system")
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(PlatformError, match=r"net\.ipv4\.ip_forward.*Read-only"):
        firewall.put_right(STATE, is_suspect=True)
    firewall.remove()

    assert network.gateway.run("nft", "list", "ruleset").stdout == ""


def test_a_script_that_nft_refuses_changes_nothing(network: Network) -> None:
    with pytest.raises(PlatformError, match="nft failed"):
        nftables.run("add table inet one\nadd rule inet one none accept\n")

    assert nftables.rules() == [rule for rule in nftables.rules() if "metainfo" in rule]


def test_a_strict_reverse_path_filter_lets_answers_to_marked_sockets_pass(network: Network, state: Path) -> None:
    host = network.gateway
    for name in ("all", "eth1"):
        host.sysctl(f"net.ipv4.conf.{name}.rp_filter", "1")
    host.ip("route", "add", "default", "dev", TUNNEL, "table", "77")
    host.ip("rule", "add", "not", "fwmark", hex(FIREZONE_MARK), "priority", "100", "lookup", "77")
    host.ip("rule", "add", "priority", "99", "to", "127.0.0.0/8", "lookup", "local")
    marks = ReplyMarks(state_directory=state)
    assert not network.marked_echo()

    marks.put_right(UPLINKS, is_suspect=True)

    assert network.marked_echo()
    marks.remove()
    assert not network.marked_echo()
    assert host.run("nft", "list", "ruleset").stdout == ""
    assert host.run("sysctl", "-n", "net.ipv4.conf.all.src_valid_mark").stdout.strip() == "0"
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("values", [("0", "0"), ("0", "2"), ("2", "1"), ("1", "2")])
def test_without_a_strict_filter_nothing_is_changed(network: Network, state: Path, values: tuple[str, str]) -> None:
    for name, value in zip(("all", "eth1"), values, strict=True):
        network.gateway.sysctl(f"net.ipv4.conf.{name}.rp_filter", value)

    changes = ReplyMarks(state_directory=state).put_right(UPLINKS, is_suspect=True)

    assert changes == []
    assert network.gateway.run("nft", "list", "ruleset").stdout == ""


def test_marks_of_a_killed_predecessor_are_removed(network: Network, state: Path) -> None:
    network.gateway.sysctl("net.ipv4.conf.eth1.rp_filter", "1")
    ReplyMarks(state_directory=state).put_right(UPLINKS, is_suspect=True)
    network.gateway.sysctl("net.ipv4.conf.eth1.rp_filter", "0")

    ReplyMarks(state_directory=state).put_right(UPLINKS, is_suspect=True)

    assert network.gateway.run("nft", "list", "ruleset").stdout == ""


def test_a_strict_filter_and_no_nft_is_refused_in_one_sentence(
    network: Network, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.gateway.sysctl("net.ipv4.conf.eth1.rp_filter", "1")
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(PlatformError, match=r"reverse-path filtering on eth1.*rp_filter"):
        ReplyMarks(state_directory=state).put_right(UPLINKS, is_suspect=True)
    monkeypatch.undo()


class Network:
    """A client behind the tunnel's interface, the gateway, and a server without a route to the client."""

    def __init__(self, lab: Lab) -> None:
        self.client, self.gateway, self.server = (lab.host(name) for name in ("client", "gateway", "server"))
        lab.cable(self.client, "eth0", self.gateway, TUNNEL)
        lab.cable(self.gateway, "eth1", self.server, "eth0")
        self.client.add_address("eth0", *(f"{host}/32" for host in CLIENT.values() if ":" not in host))
        self.client.add_address("eth0", f"{CLIENT['ipv6']}/128")
        self.gateway.add_address("eth1", f"{GATEWAY['ipv4']}/24", f"{GATEWAY['ipv6']}/64")
        self.server.add_address("eth0", f"{SERVER['ipv4']}/24", f"{SERVER['ipv6']}/64")
        self.gateway.add_address(TUNNEL, "100.64.0.1/32", "fd00:2021:1111::1/128")
        for host, interface, ipv4, ipv6 in (
            (self.client, "eth0", "100.64.0.1", "fd00:2021:1111::1"),
            (self.gateway, TUNNEL, CLIENT["ipv4"], CLIENT["ipv6"]),
        ):
            host.ip("route", "add", ipv4, "dev", interface)
            host.ip("route", "add", ipv6, "dev", interface)
        self.client.ip("route", "add", "default", "via", "100.64.0.1", "dev", "eth0")
        self.client.ip("route", "add", "default", "via", "fd00:2021:1111::1", "dev", "eth0")

    def seen_by_the_server(self, family: str) -> str:
        """The client's address as seen by the server, if a reply arrives; otherwise ""."""
        version = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
        with inside(self.server):
            server = socket.socket(version, socket.SOCK_DGRAM)
            server.bind((SERVER[family], 0))
        with inside(self.client):
            client = socket.socket(version, socket.SOCK_DGRAM)
        server.settimeout(2)
        client.settimeout(2)
        with server, client:
            client.sendto(b"hello", server.getsockname())
            _, sender = server.recvfrom(100)
            server.sendto(b"answer", sender)
            client.recv(100)
        return str(sender[0])

    def marked_echo(self) -> bool:
        """Whether a marked socket of the gateway gets a reply from the server."""
        with inside(self.server):
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            server.bind((SERVER["ipv4"], 0))
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, FIREZONE_MARK.to_bytes(4, "little"))
        server.settimeout(2)
        client.settimeout(0.2)
        with server, client:
            client.sendto(b"hello", server.getsockname())
            _, sender = server.recvfrom(100)
            server.sendto(b"answer", sender)
            try:
                return client.recv(100) == b"answer"
            except TimeoutError:
                return False


@pytest.fixture
def network(lab: Lab) -> Iterator[Network]:
    network = Network(lab)
    with inside(network.gateway):
        yield network


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def firewall(network: Network, state: Path) -> GatewayFirewall:
    return GatewayFirewall(interface=TUNNEL, state_directory=state)


def settings(host: Host) -> list[str]:
    """All settings that forwarding affects."""
    shown = host.run("sysctl", "-a").stdout.splitlines()
    return [line for line in shown if "forward" in line or "accept_ra " in line or "accept_redirects" in line]


def forwarding(host: Host) -> list[str]:
    return host.run("sysctl", "-n", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding").stdout.split()


def advertise_router(interface: str) -> None:
    """Send one router advertisement (RFC 4861, section 4.2): lifetime 1800 s, no prefix."""
    kind = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    with kind:
        kind.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        kind.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(interface))
        kind.sendto(bytes([134, 0, 0, 0, 64, 0, 1800 >> 8, 1800 & 255]) + bytes(8), ("ff02::1", 0))

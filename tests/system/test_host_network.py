"""The tunnel's interface, routes and rules, and snapshots and notifications, in real network namespaces."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from firezone_tunnel.errors import InUseError, PlatformError
from firezone_tunnel.shell.host.addresses import Uplink, host_candidates, uplinks
from firezone_tunnel.shell.host.link import TunnelLink
from firezone_tunnel.shell.host.parts import Aspect, HostState
from firezone_tunnel.shell.host.route_socket import RouteSocket
from firezone_tunnel.shell.host.routing import TunnelRoutes, TunnelRules
from firezone_tunnel.shell.host.rtnetlink import Families, RtNetlink
from firezone_tunnel.shell.host.snapshot import read_snapshot
from firezone_tunnel.shell.host.tables import USER_TABLE
from firezone_tunnel.shell.host.watcher import NetworkWatcher
from firezone_tunnel.shell.tun.device import TunDevice, open_tun
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

NAME = "tun-firezone"
IPV4 = "100.64.0.1"
IPV6 = "fd00:2021:1111::1"


def test_a_link_is_configured_for_both_families(host: Host, tunnel: Tunnel) -> None:
    tunnel.want()

    assert tunnel.link.families == Families(ipv4=True, ipv6=True)
    [link] = show(host, "link", "show", NAME)
    assert (link["mtu"], link["txqlen"], "UP" in link["flags"]) == (1280, 1000, True)
    assert addresses(host) == [f"{IPV4}/32", f"{IPV6}/128"]


def test_what_is_right_is_left_alone(tunnel: Tunnel) -> None:
    tunnel.want("10.0.0.0/8", "fd00:1::/64")

    assert tunnel.want("10.0.0.0/8", "fd00:1::/64", is_suspect=True) == []


def test_a_link_that_is_configured_again_loses_its_old_addresses(host: Host, tunnel: Tunnel) -> None:
    tunnel.want()

    tunnel.want(ipv4="100.64.0.2", ipv6="fd00:2021:1111::2")

    assert addresses(host) == ["100.64.0.2/32", "fd00:2021:1111::2/128"]


def test_without_ipv6_the_link_works_all_the_same(host: Host, tunnel: Tunnel) -> None:
    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")

    tunnel.want("10.0.0.0/8", "fd00:1::/64")

    assert tunnel.link.families == Families(ipv4=True, ipv6=False)
    assert (len(rules(host, "-4")), len(rules(host, "-6"))) == (1, 0)
    assert routes(host) == ["10.0.0.0/8"]


def test_ipv6_that_comes_later_is_used_and_one_that_goes_is_reported(host: Host, tunnel: Tunnel) -> None:
    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")
    tunnel.want("fd00:1::/64")

    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "0")
    tunnel.want("fd00:1::/64", is_suspect=True)
    assert routes(host) == ["fd00:1::/64"]

    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")
    failed = tunnel.want("fd00:1::/64", is_suspect=True)
    assert [failure for failure in failed if failure.startswith(f"the address {IPV6}")]


def test_a_link_without_any_family_is_an_error(host: Host, tunnel: Tunnel) -> None:
    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")

    with pytest.raises(PlatformError, match=f"{IPV6} to the network interface {NAME}"):
        tunnel.want(ipv4=None)


def test_a_link_that_does_not_exist_is_an_error(host: Host, netlink: RtNetlink) -> None:
    with pytest.raises(PlatformError, match=NAME):
        TunnelLink(netlink, NAME).put_right(HostState(ipv4=IPV4), is_suspect=True)


def test_what_is_not_marked_uses_our_table_first(host: Host, tunnel: Tunnel) -> None:
    tunnel.want("203.0.113.0/24", "2001:db8:1::/48", "0.0.0.0/0", "::/0")

    for destination in ("203.0.113.7", "198.51.100.1", "2001:db8:1::1", "2001:db8:2::1"):
        assert show(host, "route", "get", destination)[0]["dev"] == NAME
        marked = host.run("ip", "route", "get", destination, "mark", "0xfd002021", check=False)
        assert "unreachable" in marked.stderr
    assert [rule["priority"] for rule in rules(host, "-4") + rules(host, "-6")] == [100, 100]


def test_setting_routes_removes_the_stale_and_adds_the_missing(host: Host, tunnel: Tunnel) -> None:
    tunnel.want("10.0.0.0/8", "10.1.2.3/32", "0.0.0.0/0", "fd00:1::/64")

    tunnel.want("10.0.0.0/8", "192.168.7.0/24", "fd00:2::/64")

    assert routes(host) == ["10.0.0.0/8", "192.168.7.0/24", "fd00:2::/64"]


def test_a_killed_predecessor_leaves_nothing(host: Host, tunnel: Tunnel) -> None:
    for family in ("-4", "-6"):
        host.ip(
            family,
            *[
                "rule",
                "add",
                "not",
                "fwmark",
                "0xfd002021",
                "priority",
                "77",
                "lookup",
                "0x2021fd00",
                "protocol",
                "253",
            ],
        )
    host.ip("rule", "add", "priority", "50", "lookup", "77")
    host.ip("link", "set", "lo", "up")
    host.ip("route", "add", "10.9.0.0/16", "dev", "lo", "table", "0x2021fd02", "proto", "253")

    tunnel.want()
    assert [rule["priority"] for rule in rules(host, "-4") + rules(host, "-6")] == [100, 100]

    tunnel.remove()
    assert [rule["table"] for rule in show(host, "-4", "rule")] == ["local", "77", "main", "default"]
    assert rules(host, "-6") == []
    assert "10.9.0.0/16 dev lo" not in host.ip("route", "show", "table", "all")


def test_rules_of_another_program_stay(host: Host, tunnel: Tunnel) -> None:
    host.ip(*["rule", "add", "not", "fwmark", "0xfd002021", "priority", "200", "lookup", "0x2021fd01"])

    tunnel.want()
    tunnel.remove()

    assert [rule["priority"] for rule in show(host, "-4", "rule")] == [0, 200, 32766, 32767]


def test_a_table_that_another_tunnel_uses_is_left_alone(lab: Lab, host: Host, tunnel: Tunnel) -> None:
    lab.cable(host, "tun-other", lab.host("other"), "eth0")
    host.ip("route", "add", "10.7.0.0/16", "dev", "tun-other", "table", "0x2021fd00")

    with pytest.raises(InUseError, match="tun-other"):
        tunnel.want("10.0.0.0/8")
    tunnel.remove()

    assert routes(host) == ["10.7.0.0/16"]


def test_a_snapshot_tells_the_uplinks_and_the_host_candidates(
    lab: Lab, host: Host, tunnel: Tunnel, netlink: RtNetlink
) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    lab.cable(host, "eth1", lab.host("neighbour"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8::2/64")
    host.add_address("eth1", "198.51.100.2/24")
    host.ip("route", "add", "default", "via", "198.51.100.1", "metric", "50")
    host.ip("route", "add", "default", "via", "192.0.2.1", "metric", "600", "src", "192.0.2.2")
    host.ip("route", "add", "default", "via", "2001:db8::1")
    host.ip("address", "add", "2001:db8::3/64", "dev", "eth0", "nodad", "preferred_lft", "0")
    tunnel.want("0.0.0.0/0", "::/0")

    snapshot = read_snapshot(netlink)

    assert uplinks(snapshot, own_link=NAME) == (
        Uplink("eth1", "198.51.100.1", "198.51.100.2", ("198.51.100.2",)),
        Uplink("eth0", "2001:db8::1", "2001:db8::2", ("2001:db8::2", "2001:db8::3")),
    )
    assert host_candidates(snapshot, own_link=NAME) == ["198.51.100.2", "2001:db8::2"]


def test_a_multipath_route_stands_for_its_first_hop(lab: Lab, host: Host, netlink: RtNetlink) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24")
    host.ip("route", "add", "default", "nexthop", "via", "192.0.2.1", "nexthop", "via", "192.0.2.9")

    snapshot = read_snapshot(netlink)

    assert uplinks(snapshot, own_link=NAME).ipv4 == Uplink("eth0", "192.0.2.1", "192.0.2.2", ("192.0.2.2",))


def test_halves_of_the_default_route_are_an_uplink(lab: Lab, host: Host, netlink: RtNetlink) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    lab.cable(host, "vpn", lab.host("server"), "eth0")
    host.add_address("eth0", "192.0.2.2/24")
    host.add_address("vpn", "198.51.100.2/24")
    host.ip("route", "add", "default", "via", "192.0.2.1")
    host.ip("route", "add", "128.0.0.0/1", "via", "198.51.100.1")

    uplink = uplinks(read_snapshot(netlink), own_link=NAME).ipv4

    assert uplink == Uplink("vpn", "198.51.100.1", "198.51.100.2", ("198.51.100.2",))


def test_a_vpn_that_a_rule_sends_everything_through_is_the_uplink(
    lab: Lab, host: Host, tunnel: Tunnel, netlink: RtNetlink
) -> None:
    """The default route of the main table stays as it was, and the VPN's interface has no link-layer address."""
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8::2/64")
    for next_hop in ("192.0.2.1", "2001:db8::1"):
        host.ip("route", "add", "default", "via", next_hop)
    tunnel.want("0.0.0.0/0", "::/0")
    vpn = open_tun("vpn0")
    try:
        host.ip("address", "add", "10.8.0.2", "peer", "10.8.0.1/32", "dev", "vpn0")
        host.ip("address", "add", "fd00:8::2/128", "dev", "vpn0", "nodad")
        host.ip("link", "set", "vpn0", "up")
        for family in ("-4", "-6"):
            host.ip(family, "route", "add", "default", "dev", "vpn0", "table", "51820")
            host.ip(family, "rule", "add", "not", "fwmark", "0xca6c", "table", "51820")

        snapshot = read_snapshot(netlink)
    finally:
        vpn.close()

    assert uplinks(snapshot, own_link=NAME) == (
        Uplink("vpn0", None, "10.8.0.2", ("10.8.0.2",)),
        Uplink("vpn0", None, "fd00:8::2", ("fd00:8::2",)),
    )
    assert host_candidates(snapshot, own_link=NAME) == ["10.8.0.2", "fd00:8::2"]


def test_a_private_network_gives_no_candidates_unless_it_is_all_there_is(
    lab: Lab, host: Host, tunnel: Tunnel, netlink: RtNetlink
) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    lab.cable(host, "eth1", lab.host("neighbour"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8::2/64")
    host.add_address("eth1", "10.20.0.1/24", "fd00:20::1/64")
    tunnel.want("10.0.0.0/8")

    isolated = host_candidates(read_snapshot(netlink), own_link=NAME)
    host.ip("route", "add", "default", "via", "192.0.2.1")
    attached = host_candidates(read_snapshot(netlink), own_link=NAME)

    assert isolated == ["192.0.2.2", "10.20.0.1", "2001:db8::2", "fd00:20::1"]
    assert attached == ["192.0.2.2", "2001:db8::2"]


@pytest.mark.parametrize(
    ("change", "aspect"),
    [
        (("link", "set", "eth0", "down"), Aspect.UPLINKS),
        (("address", "add", "192.0.2.3/24", "dev", "eth0"), Aspect.UPLINKS),
        (("address", "add", "2001:db8::3/64", "dev", "eth0"), Aspect.UPLINKS),
        (("route", "add", "default", "via", "192.0.2.1"), Aspect.UPLINKS),
        (("route", "add", "128.0.0.0/1", "via", "192.0.2.1"), Aspect.UPLINKS),
        (("-6", "route", "add", "default", "dev", "eth0"), Aspect.UPLINKS),
        (("rule", "add", "priority", "50", "lookup", "77"), Aspect.RULES),
        (("-6", "rule", "add", "priority", "50", "lookup", "77"), Aspect.RULES),
        (("route", "add", "10.0.0.0/8", "dev", "eth0", "table", "0x2021fd00"), Aspect.ROUTES),
        (("-6", "route", "add", "fd00:1::/64", "dev", "eth0", "table", "0x2021fd00"), Aspect.ROUTES),
        (("link", "set", NAME, "up"), Aspect.LINK),
        (("address", "add", "100.64.0.9/32", "dev", NAME), Aspect.LINK),
    ],
)
@pytest_twisted.ensureDeferred
async def test_changes_are_noticed(
    lab: Lab, host: Host, tun: TunDevice, change: tuple[str, ...], aspect: Aspect
) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24")

    await noticed(lambda: host.ip(*change), aspect)


@pytest.mark.parametrize("setting", ["net.ipv4.ip_forward", "net.ipv4.conf.all.rp_filter"])
@pytest_twisted.ensureDeferred
async def test_settings_are_noticed(host: Host, setting: str) -> None:
    value = host.run("sysctl", "-n", setting).stdout.strip()

    await noticed(lambda: host.sysctl(setting, "0" if value == "1" else "1"), Aspect.SETTINGS)


@pytest_twisted.ensureDeferred
async def test_nftables_are_noticed_with_the_program(host: Host) -> None:
    program = await noticed(lambda: host.run("nft", "add", "table", "inet", "other"), Aspect.NFTABLES)

    assert program == "nft"


@pytest_twisted.ensureDeferred
async def test_routes_that_do_not_lead_to_the_internet_are_not_noticed(lab: Lab, host: Host) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24")
    seen: list[Aspect] = []
    watcher = NetworkWatcher(reactor, lambda aspects, _: seen.append(aspects), own_link=NAME)

    host.ip("route", "add", "203.0.113.0/24", "via", "192.0.2.1")
    host.ip("route", "add", "10.1.0.0/16", "dev", "eth0", "table", "0x77777777")
    host.ip("-6", "route", "add", "2001:db8:7::/48", "dev", "eth0")
    await deferLater(reactor, 0.1)

    watcher.close()
    watcher.close()
    assert seen == []


@pytest_twisted.ensureDeferred
async def test_own_changes_of_routes_and_rules_are_not_noticed(tunnel: Tunnel) -> None:
    tunnel.want()
    seen: list[Aspect] = []
    watcher = NetworkWatcher(
        reactor,
        lambda aspects, _: seen.append(aspects),
        own_link=NAME,
        own_ports=tunnel.ports,
    )

    tunnel.want("10.0.0.0/8", "fd00:1::/64")
    tunnel.remove()
    await deferLater(reactor, 0.1)

    watcher.close()
    assert [aspects for aspects in seen if aspects & (Aspect.ROUTES | Aspect.RULES)] == []


async def noticed(change: Callable[[], object], aspect: Aspect) -> str | None:
    """Wait until the watcher has noticed the change. Returns the program that it names."""
    changed: Deferred[str | None] = Deferred()

    def notice(aspects: Aspect, program: str | None) -> None:
        if aspect & aspects and not changed.called:
            changed.callback(program)

    watcher = NetworkWatcher(reactor, notice, own_link=NAME)
    try:
        change()
        return await changed.addTimeout(5, reactor)
    finally:
        watcher.close()


class Tunnel:
    """The interface with its routes and rules."""

    def __init__(self, netlink: RtNetlink) -> None:
        self.netlink = netlink
        self.routes = RouteSocket()
        self.link = TunnelLink(netlink, NAME)
        self._parts = (self.link, TunnelRoutes(self.routes, self.link), TunnelRules(netlink, self.link))

    def ports(self) -> tuple[int | None, ...]:
        return self.netlink.port_id, self.routes.port_id

    def want(
        self, *routes: str, ipv4: str | None = IPV4, ipv6: str | None = IPV6, is_suspect: bool = False
    ) -> list[str]:
        """Returns what was changed."""
        state = HostState(ipv4=ipv4, ipv6=ipv6, routes=tuple(ipaddress.ip_network(route) for route in routes))
        return [change.item for part in self._parts for change in part.put_right(state, is_suspect=is_suspect)]

    def remove(self) -> None:
        for part in reversed(self._parts):
            part.remove()


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    host = lab.host("host")
    with inside(host):
        yield host


@pytest.fixture
def tun(host: Host) -> Iterator[TunDevice]:
    device = open_tun(NAME)
    yield device
    device.close()


@pytest.fixture
def netlink(host: Host) -> Iterator[RtNetlink]:
    netlink = RtNetlink()
    yield netlink
    netlink.close()


@pytest.fixture
def tunnel(tun: TunDevice, netlink: RtNetlink) -> Iterator[Tunnel]:
    tunnel = Tunnel(netlink)
    yield tunnel
    tunnel.routes.close()


def show(host: Host, *arguments: str) -> list[Any]:
    shown: list[Any] = json.loads(host.ip("-json", *arguments) or "[]")
    return shown


def addresses(host: Host) -> list[str]:
    [link] = show(host, "address", "show", NAME)
    return [f"{address['local']}/{address['prefixlen']}" for address in link["addr_info"]]


def routes(host: Host) -> list[str]:
    found: list[str] = []
    for family in ("-4", "-6"):
        table = host.run("ip", family, "route", "show", "table", str(USER_TABLE.number), check=False)
        found += [line.split()[0] for line in table.stdout.splitlines()]
    return found


def rules(host: Host, family: str) -> list[Any]:
    return [rule for rule in show(host, family, "rule") if rule["table"] == str(USER_TABLE.number)]

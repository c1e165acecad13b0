"""Links, addresses, routes and rules of real network namespaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.addresses import Uplink, host_candidates, uplinks
from firezone_tunnel.shell.host.kernel import USER_TABLE, Families
from firezone_tunnel.shell.host.netlink import Netlink, NetworkWatcher
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.tun.device import TunDevice, open_tun
from tests.system.hosts import Host, Lab
from tests.system.namespace import inside

pytestmark = pytest.mark.namespaces

NAME = "tun-firezone"
IPV4 = "100.64.0.1"
IPV6 = "fd00:2021:1111::1"
BOTH = Families(ipv4=True, ipv6=True)


@pytest_twisted.ensureDeferred
async def test_a_link_is_configured_for_both_families(host: Host, tun: TunDevice, netlink: Netlink) -> None:
    families = await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)

    assert families == BOTH
    [link] = show(host, "link", "show", NAME)
    assert (link["mtu"], link["txqlen"], "UP" in link["flags"]) == (1280, 128, True)
    assert addresses(host) == [f"{IPV4}/32", f"{IPV6}/128"]


@pytest_twisted.ensureDeferred
async def test_a_link_that_is_configured_again_loses_its_old_addresses(
    host: Host, tun: TunDevice, netlink: Netlink
) -> None:
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)

    await netlink.configure_link(NAME, ipv4="100.64.0.2", ipv6="fd00:2021:1111::2")

    assert addresses(host) == ["100.64.0.2/32", "fd00:2021:1111::2/128"]


@pytest_twisted.ensureDeferred
async def test_without_ipv6_the_link_works_all_the_same(host: Host, tun: TunDevice, netlink: Netlink) -> None:
    host.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6", "1")

    families = await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)
    await netlink.set_rules(families)

    assert families == Families(ipv4=True, ipv6=False)
    assert (len(rules(host, "-4")), len(rules(host, "-6"))) == (1, 0)


@pytest_twisted.ensureDeferred
async def test_a_link_without_any_family_is_an_error(host: Host, tun: TunDevice, netlink: Netlink) -> None:
    with pytest.raises(PlatformError, match=NAME):
        await netlink.configure_link(NAME, ipv4=None, ipv6=None)


@pytest_twisted.ensureDeferred
async def test_a_link_that_does_not_exist_is_an_error(host: Host, netlink: Netlink) -> None:
    with pytest.raises(PlatformError, match=NAME):
        await netlink.configure_link(NAME, ipv4=IPV4, ipv6=None)
    with pytest.raises(PlatformError, match=NAME):
        await netlink.set_routes(NAME, [])


@pytest_twisted.ensureDeferred
async def test_what_is_not_marked_uses_our_table_first(host: Host, tun: TunDevice, netlink: Netlink) -> None:
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)
    await netlink.set_routes(NAME, ["203.0.113.0/24", "2001:db8:1::/48", "0.0.0.0/0", "::/0"])
    await netlink.set_rules(BOTH)
    await netlink.set_rules(BOTH)  # a second call changes nothing

    for destination in ("203.0.113.7", "198.51.100.1", "2001:db8:1::1", "2001:db8:2::1"):
        assert show(host, "route", "get", destination)[0]["dev"] == NAME
        marked = host.run("ip", "route", "get", destination, "mark", "0xfd002021", check=False)
        assert "unreachable" in marked.stderr
    assert [rule["priority"] for rule in rules(host, "-4") + rules(host, "-6")] == [100, 100]


@pytest_twisted.ensureDeferred
async def test_setting_routes_removes_the_stale_and_adds_the_missing(
    host: Host, tun: TunDevice, netlink: Netlink
) -> None:
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)
    await netlink.set_routes(NAME, ["10.0.0.0/8", "10.1.2.3/32", "0.0.0.0/0", "fd00:1::/64"])

    await netlink.set_routes(NAME, ["10.0.0.0/8", "192.168.7.9/24", "fd00:2::/64"])

    assert routes(host) == ["10.0.0.0/8", "192.168.7.0/24", "fd00:2::/64"]


@pytest_twisted.ensureDeferred
async def test_routes_that_vanished_with_the_link_come_back(host: Host, tun: TunDevice, netlink: Netlink) -> None:
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)
    await netlink.set_routes(NAME, ["10.0.0.0/8"])
    host.ip("link", "set", NAME, "down")
    host.ip("link", "set", NAME, "up")
    assert routes(host) == []

    await netlink.set_routes(NAME, ["10.0.0.0/8"])

    assert routes(host) == ["10.0.0.0/8"]


@pytest_twisted.ensureDeferred
async def test_a_killed_predecessor_leaves_nothing_after_the_sweep(
    host: Host, tun: TunDevice, netlink: Netlink
) -> None:
    host.ip("rule", "add", "not", "fwmark", "0xfd002021", "lookup", "0x2021fd00")  # another version's priority
    host.ip("rule", "add", "not", "fwmark", "0xfd002021", "priority", "300", "lookup", "0x2021fd02")
    host.ip("rule", "add", "priority", "50", "lookup", "77")
    host.ip("link", "set", "lo", "up")
    host.ip("route", "add", "10.9.0.0/16", "dev", "lo", "table", "0x2021fd01")

    removed = await netlink.remove_everything()

    assert removed == 3
    assert [rule["table"] for rule in show(host, "-4", "rule")] == ["local", "77", "main", "default"]
    assert await netlink.remove_everything() == 0


@pytest_twisted.ensureDeferred
async def test_a_snapshot_tells_the_uplinks_and_the_host_candidates(
    lab: Lab, host: Host, tun: TunDevice, netlink: Netlink
) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    lab.cable(host, "eth1", lab.host("neighbour"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8::2/64")
    host.add_address("eth1", "198.51.100.2/24")
    host.ip("route", "add", "default", "via", "198.51.100.1", "metric", "50")
    host.ip("route", "add", "default", "via", "192.0.2.1", "metric", "600", "src", "192.0.2.2")
    host.ip("route", "add", "default", "via", "2001:db8::1")
    host.ip("address", "add", "2001:db8::3/64", "dev", "eth0", "nodad", "preferred_lft", "0")
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)

    snapshot = await netlink.snapshot()

    assert uplinks(snapshot, own_link=NAME) == (
        Uplink("eth1", "198.51.100.1", "198.51.100.2", ("198.51.100.2",)),
        Uplink("eth0", "2001:db8::1", "2001:db8::2", ("2001:db8::2", "2001:db8::3")),
    )
    assert host_candidates(snapshot, own_link=NAME) == ["198.51.100.2", "192.0.2.2", "2001:db8::2"]


@pytest_twisted.ensureDeferred
async def test_a_vpn_that_a_rule_sends_everything_through_is_the_uplink(
    lab: Lab, host: Host, tun: TunDevice, netlink: Netlink
) -> None:
    """The default route of the main table stays as it was, and the VPN's interface has no link-layer address."""
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8::2/64")
    for next_hop in ("192.0.2.1", "2001:db8::1"):
        host.ip("route", "add", "default", "via", next_hop)
    host.ip("tuntap", "add", "vpn0", "mode", "tun")
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)
    vpn = open_tun("vpn0")
    try:
        host.ip("address", "add", "10.8.0.2", "peer", "10.8.0.1/32", "dev", "vpn0")
        host.ip("address", "add", "fd00:8::2/128", "dev", "vpn0", "nodad")
        host.ip("link", "set", "vpn0", "up")
        for family in ("-4", "-6"):
            host.ip(family, "route", "add", "default", "dev", "vpn0", "table", "51820")
            host.ip(family, "rule", "add", "not", "fwmark", "0xca6c", "table", "51820")

        snapshot = await netlink.snapshot()
    finally:
        vpn.close()

    assert uplinks(snapshot, own_link=NAME) == (
        Uplink("vpn0", None, "10.8.0.2", ("10.8.0.2",)),
        Uplink("vpn0", None, "fd00:8::2", ("fd00:8::2",)),
    )
    assert host_candidates(snapshot, own_link=NAME) == ["10.8.0.2", "192.0.2.2", "fd00:8::2", "2001:db8::2"]


@pytest_twisted.ensureDeferred
async def test_a_private_network_gives_no_candidates_unless_it_is_all_there_is(
    lab: Lab, host: Host, tun: TunDevice, netlink: Netlink
) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    lab.cable(host, "eth1", lab.host("neighbour"), "eth0")
    host.add_address("eth0", "192.0.2.2/24", "2001:db8::2/64")
    host.add_address("eth1", "10.20.0.1/24", "fd00:20::1/64")
    await netlink.configure_link(NAME, ipv4=IPV4, ipv6=IPV6)

    isolated = host_candidates(await netlink.snapshot(), own_link=NAME)
    host.ip("route", "add", "default", "via", "192.0.2.1")
    attached = host_candidates(await netlink.snapshot(), own_link=NAME)

    assert isolated == ["192.0.2.2", "10.20.0.1", "2001:db8::2", "fd00:20::1"]
    assert attached == ["192.0.2.2", "2001:db8::2"]


@pytest_twisted.ensureDeferred
async def test_a_multipath_route_stands_for_its_first_hop(lab: Lab, host: Host, netlink: Netlink) -> None:
    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24")
    host.ip("route", "add", "default", "nexthop", "via", "192.0.2.1", "nexthop", "via", "192.0.2.9")

    snapshot = await netlink.snapshot()

    assert uplinks(snapshot, own_link=NAME).ipv4 == Uplink("eth0", "192.0.2.1", "192.0.2.2", ("192.0.2.2",))


@pytest.mark.parametrize(
    "change",
    [
        ("link", "set", "eth0", "down"),
        ("address", "add", "192.0.2.3/24", "dev", "eth0"),
        ("address", "add", "2001:db8::3/64", "dev", "eth0"),
        ("route", "add", "default", "via", "192.0.2.1"),
        ("route", "add", "2001:db8:7::/48", "dev", "eth0"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_changes_are_noticed(lab: Lab, host: Host, change: tuple[str, ...]) -> None:
    from twisted.internet import reactor

    lab.cable(host, "eth0", lab.host("router"), "eth0")
    host.add_address("eth0", "192.0.2.2/24")
    changed: Deferred[None] = Deferred()
    watcher = NetworkWatcher(reactor, lambda: changed.called or changed.callback(None))
    host.ip(*change)

    await changed.addTimeout(5, reactor)

    watcher.close()
    watcher.close()


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
def netlink(host: Host) -> Iterator[Netlink]:
    from twisted.internet import reactor

    worker = WorkerThread(reactor)
    netlink = Netlink(worker)
    yield netlink
    pytest_twisted.blockon(netlink.close())
    pytest_twisted.blockon(worker.stop())


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

"""The whole product on the demo's network: real TUN devices, real sockets, real twistd processes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest

from tests.polling import until
from tests.system.hosts import Host, Lab
from tests.system.network import PRIVATE_NETWORK, SERVER, SERVER_IPV6, WEB_PORT, Network
from tests.system.product import REFUSED_PORT, SEED, Product
from tests.system.programs import NotReady

pytestmark = pytest.mark.namespaces

_MEGABYTE = 1_000_000
_MEMORY_LIMIT = 100 * _MEGABYTE  # client and gateway, each


@pytest.fixture
def network(lab: Lab) -> Network:
    network = Network(lab)
    network.start_servers()
    return network


@pytest.fixture
def product(network: Network) -> Iterator[Product]:
    product = Product(network)
    product.start()
    yield product
    product.stop()


def test_the_resource_is_reached_through_the_tunnel_and_not_without_it(network: Network) -> None:
    assert download(network, 1, patience=1) is None

    product = Product(network)
    product.start()

    assert download(network, 5 * _MEGABYTE) == 5 * _MEGABYTE
    assert download(network, _MEGABYTE, server=f"[{SERVER_IPV6}]") == _MEGABYTE
    assert product.stop() == {"client": 0, "gateway": 0, "portal": 0}
    assert download(network, 1, patience=1) is None


def test_on_one_network_the_path_is_direct(network: Network, product: Product) -> None:
    assert download(network, 1) == 1

    assert product.connection()["path"] == "direct"


@pytest.mark.serial
def test_client_and_gateway_stay_under_100_mb_before_and_after_a_load(network: Network, product: Product) -> None:
    both = (product.client, product.gateway)
    before = [program.resident_bytes() for program in both]
    assert download(network, 200 * _MEGABYTE) == 200 * _MEGABYTE
    after = [program.resident_bytes() for program in both]

    assert [size for size in before + after if size >= _MEMORY_LIMIT] == []


def test_a_port_that_the_filters_leave_out_is_refused_at_once(network: Network, product: Product) -> None:
    assert download(network, 1) == 1
    url = f"http://{SERVER}:{REFUSED_PORT}/"

    refused = network.client.run("curl", "--silent", "--show-error", "--max-time", "10", url, check=False, timeout=15)

    assert refused.returncode == 7  # could not connect; 28 would be a timeout
    assert product.gateway.is_running


def test_flows_outlive_the_portal(network: Network, product: Product) -> None:
    assert download(network, 1) == 1

    product.portal.kill()

    assert download(network, _MEGABYTE) == _MEGABYTE


def test_a_portal_that_was_killed_comes_back_with_all_it_knew(network: Network, product: Product) -> None:
    address = tunnel_addresses(network.client)
    product.portal.kill()
    product.start_portal()

    product.restart_client()

    assert download(network, 1) == 1
    assert tunnel_addresses(network.client) == address


def test_the_client_recovers_by_itself_when_the_gateway_restarts(network: Network, product: Product) -> None:
    assert download(network, 1) == 1

    product.restart_gateway()

    assert download(network, _MEGABYTE, patience=30) == _MEGABYTE


def test_a_killed_client_is_swept_by_the_next_one(network: Network, product: Product) -> None:
    product.client.kill()

    product.start_client()

    assert download(network, 1) == 1


def test_everything_on_the_hosts_is_put_back_on_exit(network: Network) -> None:
    hosts = (network.client, network.gateway)
    before = [host_state(host) for host in hosts]
    product = Product(network)
    product.start()
    assert download(network, 1) == 1
    assert [host_state(host) for host in hosts] != before

    product.stop()

    assert [host_state(host) for host in hosts] == before


def test_a_resource_that_is_added_and_removed_while_everything_runs(network: Network, product: Product) -> None:
    seed = network.portal.directory / "portal.toml"
    private_only = seed.read_text().replace(f'address = "{PRIVATE_NETWORK}"', 'address = "10.99.0.0/24"')
    seed.write_text(private_only)
    product.portal.send_signal(signal.SIGHUP)
    until(lambda: not routes_to(network.client, SERVER))
    assert download(network, 1, patience=1) is None

    seed.write_text(SEED)
    product.portal.send_signal(signal.SIGHUP)
    until(lambda: routes_to(network.client, SERVER))
    assert download(network, 1) == 1


def test_a_second_client_on_a_host_is_refused_and_the_first_undisturbed(network: Network, product: Product) -> None:
    first = product.client

    with pytest.raises(NotReady, match="in use"):
        product.start_client()

    assert first.is_running
    assert download(network, 1) == 1
    first.stop()


def test_a_wrong_token_ends_the_client_with_one_clear_line_and_no_retry(network: Network) -> None:
    product = Product(network)
    product.start_portal()

    with pytest.raises(NotReady, match="token"):
        product.start_client(FIREZONE_TOKEN="no-such-token")

    assert product.client.wait_exit() == 1
    product.stop()


def test_a_client_waits_for_a_portal_that_is_not_there_yet(network: Network) -> None:
    product = Product(network)
    client = product.spawn_client()
    client.wait_for("portal:retry_scheduled")

    product.start_portal()

    client.wait_ready()
    assert product.stop()["client"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["client", "gateway"])
def test_signals_end_a_process_with_code_0(product: Product, name: str, number: signal.Signals) -> None:
    program = getattr(product, name)

    program.send_signal(number)

    assert program.wait_exit() == 0


def test_the_private_network_has_no_way_back_but_masquerade(network: Network) -> None:
    """This validates the other tests: without the gateway's masquerading there would be no replies."""
    assert PRIVATE_NETWORK in network.server.ip("route")
    assert "default" not in network.server.ip("route")


def download(network: Network, count: int, *, server: str = SERVER, patience: float = 10.0) -> int | None:
    """Download on the client. Returns the bytes received, or None if the server could not be reached.

    Retries for `patience` seconds while the server is not reachable.
    """
    url = f"http://{server}:{WEB_PORT}/bytes?num={count}"
    limits = ("--connect-timeout", "5", "--retry", str(int(patience)), "--retry-connrefused", "--retry-max-time")
    command = ("curl", "--silent", "--output", "/dev/null", "--write-out", "%{size_download}", *limits, f"{patience:g}")
    answer = network.client.run(*command, url, check=False, timeout=patience + 60)
    return int(answer.stdout) if answer.returncode == 0 else None


def routes_to(host: Host, address: str) -> bool:
    """Whether the host sends packets for an address into the tunnel."""
    return "tun-firezone" in host.run("ip", "route", "get", address, check=False).stdout


def tunnel_addresses(host: Host) -> str:
    return host.run("sh", "-c", "ip -brief address show dev tun-firezone scope global").stdout


def host_state(host: Host) -> list[str]:
    """The state that a client or gateway changes: links, addresses, routes, rules, firewall, forwarding.

    The kernel adds link-local addresses and their routes shortly after an interface comes up.
    """
    commands = (
        "ip -brief link; ip -brief address",
        "ip route show table all; ip -6 route show table all",
        "ip rule; ip -6 rule",
        "nft list ruleset",
        "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding",
    )
    lines = [line for command in commands for line in host.run("sh", "-c", command).stdout.splitlines()]
    return [re.sub(r" fe80::\S+", "", line) for line in lines if not line.startswith("local fe80")]

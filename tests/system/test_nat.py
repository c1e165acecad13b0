"""Tunnels through every pair of NATs, direct where possible, and the behaviour of the NATs themselves."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator

import pytest

from tests.system.hosts import Host, Lab
from tests.system.namespace import inside
from tests.system.nat import KINDS, Pair
from tests.system.network import CLIENT, GATEWAY, GATEWAY_IPV6, RELAYS, SERVER, WEB_PORT, Network
from tests.system.product import Product
from tests.system.traffic import Download, Ping

pytestmark = pytest.mark.namespaces

PAIRS = [*map(Pair, *zip(*itertools.product(KINDS, repeat=2), strict=True)), Pair("v6", "v4"), Pair("v4", "v6")]
DIRECT_WITHIN = 3.0  # seconds from the first packet: docs/decisions.md, 8
_PORT = 52625
_BYTES = 1_000_000


@pytest.fixture
def product(center: Product, nat: Pair) -> Iterator[Product]:
    """A new client and a new gateway behind these NATs."""
    center.network.replace_sites(str(nat))
    center.start_sites()
    yield center
    center.stop_sites()


@pytest.mark.parametrize("nat", PAIRS, ids=str)
def test_every_pair_comes_up_directly_where_that_is_possible_and_else_through_a_relay(
    product: Product, nat: Pair
) -> None:
    network = product.network
    began = time.time()

    with Download(network.client, SERVER, WEB_PORT) as download:
        download.wait_for_more(_BYTES)
        if nat.is_direct:
            product.wait_path("direct", timeout=DIRECT_WITHIN)
        else:
            download.wait_for_more(_BYTES)
    with Ping(network.client, SERVER):  # more time to switch to another path
        pass

    path = product.path()
    assert path["path"] == ("direct" if nat.is_direct else "relayed")
    if nat.is_direct:
        assert path["timestamp"] - began < DIRECT_WITHIN


@pytest.mark.serial
def test_a_host_that_may_not_send_to_the_gateway_is_served_by_the_relay_until_it_may(lab: Lab) -> None:
    network, product = _start(lab, Pair("none", "none"), may_send=False)

    with Download(network.client, SERVER, WEB_PORT) as download, Ping(network.client, SERVER) as ping:
        download.wait_for_more(_BYTES)
        assert product.path()["path"] == "relayed"

        network.client.run("nft", "delete", "table", "inet", "test")
        began = time.time()
        product.wait_path("direct", timeout=DIRECT_WITHIN)
        download.wait_for_more(_BYTES)
        ping.wait_steady(began)
        answers = ping.answers()

    numbers = [answer.number for answer in answers]
    assert numbers == list(range(1, len(numbers) + 1)), "a ping was lost on the way from one path to the other"
    product.stop()


@pytest.mark.parametrize(
    ("nat", "direct"),
    [
        ("none", True),
        ("none,udp-blocked", False),
        ("symmetric", False),
        ("cone,symmetric", False),
        ("symmetric,double", False),
        ("symmetric,none", True),
        ("fullcone,symmetric", True),
        ("cgn,double", True),
        ("v6-v4", False),
    ],
)
def test_which_pairs_can_be_direct(nat: str, direct: bool) -> None:
    assert Pair.parse(nat).is_direct is direct
    assert str(Pair.parse(nat)) == nat


@pytest.mark.parametrize("nat", ["", "conical", "cone,", "cone,cone,cone", "v6", "v6,v4"])
def test_other_names_of_nats_are_refused(nat: str) -> None:
    with pytest.raises(ValueError, match="is not a kind of NAT"):
        Pair.parse(nat)


@pytest.mark.parametrize("kind", ["none", "cone", "fullcone", "double", "cgn"])
def test_these_kinds_show_the_same_port_to_everybody(lab: Lab, kind: str) -> None:
    assert _seen_ports(Network(lab, kind)) == {_PORT}


def test_a_symmetric_nat_shows_another_port_to_everybody(lab: Lab) -> None:
    assert len(_seen_ports(Network(lab, "symmetric"))) > 1


@pytest.mark.parametrize("kind", ["none", "cone", "fullcone", "symmetric", "double", "cgn"])
def test_who_may_write_to_a_port_that_was_opened_for_somebody_else(lab: Lab, kind: str) -> None:
    network = Network(lab, kind)
    with _udp(network.client, _PORT) as host, _udp(network.relay()) as known, _udp(network.relay("relay2")) as stranger:
        seen_at = _send(host, known)

        stranger.sendto(b"stranger", seen_at)
        known.sendto(b"known", seen_at)

        assert host.recv(99) == (b"stranger" if kind in {"none", "fullcone"} else b"known")


@pytest.mark.parametrize("kind", ["cone", "double", "cgn"])
def test_a_datagram_that_comes_too_early_does_not_take_the_port(lab: Lab, kind: str) -> None:
    network = Network(lab, kind)
    with _udp(network.client, _PORT) as host, _udp(network.relay()) as peer:
        peer.sendto(b"too early", (CLIENT, _PORT))

        assert _send(host, peer) == (CLIENT, _PORT)


@pytest.mark.parametrize("kind", ["fullcone", "cone"])
def test_hairpin_is_for_full_cones(lab: Lab, kind: str) -> None:
    network = Network(lab, kind)
    with _udp(network.client, _PORT) as host, _udp(network.client) as neighbour, _udp(network.relay()) as known:
        seen_at = _send(host, known)

        neighbour.sendto(b"neighbour", (CLIENT, _PORT))
        known.sendto(b"known", seen_at)

        assert host.recv(99) == (b"neighbour" if kind == "fullcone" else b"known")


def test_where_udp_is_blocked_only_relays_are_reached(lab: Lab) -> None:
    network = Network(lab, "udp-blocked")
    with _udp(network.client) as host, _udp(network.relay(), 3478) as relay, _udp(network.relay(), 3479) as other:
        other.setblocking(False)
        host.sendto(b"other", other.getsockname())

        assert _send(host, relay)[0] == CLIENT
        with pytest.raises(BlockingIOError):
            other.recv(99)


def test_carrier_addresses_are_only_between_the_two_nats(lab: Lab) -> None:
    network = Network(lab, "cgn,none")

    def has_carrier_address(host: Host) -> bool:
        return "inet 100." in host.ip("address")

    assert [has_carrier_address(host) for host in (network.client, *network.client_nats)] == [False, True, True]
    assert "100.64." not in network.client.ip("route")


def _start(lab: Lab, nat: Pair, *, may_send: bool = True) -> tuple[Network, Product]:
    """Start all programs with one relay. Without `may_send`, the client's host drops packets to the gateway."""
    network = Network(lab, str(nat))
    network.start_servers()
    if not may_send:
        network.client.run("nft", "-f", "-", stdin=_BLOCKED)
    product = Product(network, relays=("relay",))
    product.start()
    return network, product


_BLOCKED = f"""
table inet test {{
    chain output {{
        type filter hook output priority filter
        meta l4proto udp ip daddr {GATEWAY} drop
        meta l4proto udp ip6 daddr {GATEWAY_IPV6} drop
    }}
}}
"""


@contextlib.contextmanager
def _udp(host: Host, port: int = 0) -> Iterator[socket.socket]:
    """A UDP socket on a host's IPv4 address."""
    ipv4 = {name: addresses[0] for name, addresses in RELAYS.items()}
    with inside(host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((ipv4.get(host.name, ""), port))
        udp.settimeout(5)
        yield udp


def _send(sender: socket.socket, receiver: socket.socket) -> tuple[str, int]:
    """Send a datagram and wait for its arrival. Returns its source address."""
    sender.sendto(b"hello", receiver.getsockname())
    source: tuple[str, int] = receiver.recvfrom(99)[1]
    return source


def _seen_ports(network: Network) -> set[int]:
    """The source ports of one client socket, as seen by four destinations."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(_udp(network.client, _PORT))
        hosts = [network.relay(name) for name in RELAYS for _ in range(2)]
        sources = [_send(host, stack.enter_context(_udp(destination))) for destination in hosts]
    assert {address for address, _ in sources} == {CLIENT}
    return {port for _, port in sources}

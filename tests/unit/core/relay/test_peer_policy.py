"""Nothing is relayed to special-purpose addresses in any spelling, nor to the relay itself."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.relay.peer_policy import PRIVATE, PeerPolicy, embedded
from firezone_tunnel.core.sansio import SocketAddress
from tests.unit.core.relay.world import PEER4, RELAY4, RELAY6, Client, World, code_of

# The IANA registries of special-purpose addresses, and group and reserved ones.
SPECIAL_IPV4 = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "255.255.255.255/32",
]
SPECIAL_IPV6 = [
    "::/128",
    "::1/128",
    "::ffff:0:0/96",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/23",
    "2001::/32",
    "2001:2::/48",
    "2001:10::/28",
    "2001:db8::/32",
    "2620:4f:8000::/48",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]
ORDINARY = [
    "1.1.1.1",
    "9.9.9.9",
    "100.128.0.1",
    "172.32.0.1",
    "198.20.0.1",
    "2606:4700::1111",
    "2a02:2::2",
    "2001:4860::8",
]


def _v6(prefix: int, inner: ipaddress.IPv4Address, shift: int) -> str:
    return str(ipaddress.IPv6Address(prefix | int(inner) << shift))


EMBEDDINGS: dict[str, Callable[[ipaddress.IPv4Address], str]] = {
    "as it is": str,
    "compatible": lambda inner: _v6(0, inner, 0),
    "mapped": lambda inner: _v6(0xFFFF << 32, inner, 0),
    "translated": lambda inner: _v6(0xFFFF << 48, inner, 0),
    "NAT64": lambda inner: _v6(0x64FF9B << 96, inner, 0),
    "local NAT64": lambda inner: _v6(0x64FF9B0001 << 80, inner, 0),
    "6to4": lambda inner: _v6(0x2002 << 112 | 1, inner, 80),
    "Teredo server": lambda inner: _v6(0x20010000 << 96, inner, 64),
    "Teredo client": lambda inner: _v6(0x20010000 << 96, ipaddress.IPv4Address(int(inner) ^ 0xFFFFFFFF), 0),
    "ISATAP": lambda inner: _v6(0x2A020002 << 96 | 0x5EFE << 32, inner, 0),
    "global ISATAP": lambda inner: _v6(0x2A020002 << 96 | 0x02005EFE << 32, inner, 0),
}


@pytest.mark.parametrize("spelling", EMBEDDINGS)
@pytest.mark.parametrize("block", SPECIAL_IPV4)
def test_special_ipv4_blocks_are_denied_in_every_spelling(block: str, spelling: str) -> None:
    network = ipaddress.IPv4Network(block)
    policy = _policy()

    for address in (network[0], network[network.num_addresses // 2], network[-1]):
        peer = SocketAddress(EMBEDDINGS[spelling](address), 5000)
        assert not policy.permits(peer), peer
        assert not policy.permits_host(peer.host), peer


@pytest.mark.parametrize("block", SPECIAL_IPV6)
def test_special_ipv6_blocks_are_denied(block: str) -> None:
    network = ipaddress.IPv6Network(block)

    for address in (network[0], network[network.num_addresses // 2], network[-1]):
        assert not _policy().permits(SocketAddress(str(address), 5000)), address


@pytest.mark.parametrize("host", ORDINARY)
def test_ordinary_addresses_are_permitted(host: str) -> None:
    assert _policy().permits(SocketAddress(host, 5000))
    assert _policy().permits_host(host)


@pytest.mark.parametrize("spelling", ["NAT64", "6to4", "ISATAP"])
def test_an_ordinary_ipv4_address_may_be_reached_through_a_translator(spelling: str) -> None:
    assert _policy().permits(SocketAddress(EMBEDDINGS[spelling](ipaddress.IPv4Address("9.9.9.9")), 5000))


@pytest.mark.parametrize("spelling", EMBEDDINGS)
def test_the_relays_own_addresses_are_denied_in_every_spelling(spelling: str) -> None:
    policy = _policy(own_hosts=["9.2.2.2"])

    for host, port in ((RELAY4, 3478), (RELAY4, 22), ("9.2.2.2", 22), ("9.2.2.2", 50_000)):
        peer = SocketAddress(EMBEDDINGS[spelling](ipaddress.IPv4Address(host)), port)
        assert not policy.permits(peer), peer


def test_only_the_ports_of_allocations_are_exempt_and_only_on_their_addresses() -> None:
    policy = _policy(own_hosts=["2a01:1::2"])

    assert policy.permits(SocketAddress(RELAY4, 49152))
    assert policy.permits(SocketAddress(RELAY6, 65535))
    assert not policy.permits(SocketAddress(RELAY4, 49151))
    assert not policy.permits(SocketAddress("2a01:1::2", 50_000))
    assert not policy.permits(SocketAddress("::ffff:9.1.1.1", 50_000))


def test_private_networks_are_permitted_where_the_operator_allows_them() -> None:
    policy = _policy(allow=PRIVATE)

    for host in ("10.1.2.3", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fd00::1"):
        assert policy.permits(SocketAddress(host, 5000)), host
    for host in ("127.0.0.1", "169.254.169.254", "::1", "fe80::1", "::ffff:10.1.2.3"):
        assert not policy.permits(SocketAddress(host, 5000)), host


def test_group_and_unspecified_addresses_and_our_own_are_denied_whatever_is_allowed() -> None:
    everything = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
    policy = _policy(allow=everything, own_hosts=["127.0.0.1"])

    for host in ("0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "ff02::1", "127.0.0.1", "::ffff:127.0.0.1", RELAY4):
        assert not policy.permits(SocketAddress(host, 3478)), host
    assert policy.permits(SocketAddress("127.0.0.2", 3478))


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.1.2.3", "10.0.0.0/8"),
        ("100.64.0.1", "100.64.0.0/10"),
        ("fd00::1", "fc00::/7"),
        ("64:ff9b::a01:203", "10.0.0.0/8"),
        ("192.168.7.7", None),  # our own
        ("172.17.9.9", None),  # permitted
        ("127.0.0.1", None),
        ("169.254.169.254", None),
        ("2001:db8::1", None),
        ("9.9.9.9", None),
    ],
)
def test_peers_that_the_operator_could_allow_are_identified_by_their_network(host: str, network: str | None) -> None:
    policy = _policy(
        own_hosts=["192.168.7.7"],
        allow=[ipaddress.ip_network("172.17.0.0/16")],
    )

    found = policy.private_network(host)

    assert (None if found is None else str(found)) == network


def test_refused_peers_are_counted_by_the_private_network() -> None:
    client = Client(World())
    client.allocate_dual()

    for host in ("10.0.0.1", "10.9.9.9", "fd00::1", "127.0.0.1"):
        assert code_of(client.bind(0x4000, SocketAddress(host, 5000))) == 403
    assert code_of(client.permit(PEER4, SocketAddress("10.0.0.1", 1))) == 403

    counters = client.world.server.counters
    assert counters.private_peers == {"10.0.0.0/8": 3, "fc00::/7": 1}
    assert counters.forbidden_peers == 5


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "::1", "::ffff:7f00:1"]
)
def test_forbidden_peers_are_403_and_nothing_is_sent_to_them(host: str) -> None:
    world = World()
    client = Client(world)
    client.allocate_dual()
    peer = SocketAddress(host, 5000)

    assert code_of(client.bind(0x4000, peer)) == 403
    assert code_of(client.permit(PEER4, peer)) == 403
    assert client.send_on(0x4000, b"data") == []
    assert client.indicate(peer, b"data") == []
    assert client.indicate(PEER4, b"nor was this permitted") == []
    assert world.server.counters.forbidden_peers == 2


def test_the_relays_own_services_are_403_and_a_permission_for_its_address_reaches_only_allocations() -> None:
    world = World()
    client = Client(world)
    client.allocate_dual()

    for host in (RELAY4, RELAY6):
        assert code_of(client.bind(0x4000, SocketAddress(host, 3478))) == 403
        assert code_of(client.permit(SocketAddress(host, 3478))) == 0
        assert client.indicate(SocketAddress(host, 3478), b"data") == []
    assert world.server.counters.forbidden_peers == 4


@given(st.ip_addresses(v=6))
def test_an_ipv6_address_is_permitted_only_if_all_that_it_embeds_is(address: ipaddress.IPv6Address) -> None:
    policy = _policy()

    if policy.permits(SocketAddress(str(address), 5000)):
        assert all(policy.permits(SocketAddress(str(inner), 5000)) for inner in embedded(address))
        # Translators' and 6to4's own networks are judged by what is embedded; Python's versions differ about them.
        is_judged_inside = any(address in ipaddress.ip_network(net) for net in ("64:ff9b::/96", "2002::/16"))
        assert address.is_global or is_judged_inside


def _policy(**options: object) -> PeerPolicy:
    return PeerPolicy(relayed_hosts=[RELAY4, RELAY6], lowest_port=49152, highest_port=65535, **options)

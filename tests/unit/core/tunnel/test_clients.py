"""The rules of one client of a gateway, against an evaluator that asks every resource anew.

docs/protocol/data-plane.md, 6.5.
"""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.messages.gateway import CidrResource
from firezone_tunnel.core.tunnel.clients import AdmittedClient, Allowed
from firezone_tunnel.core.tunnel.filter import PERMIT_ALL, PERMIT_NOTHING, Rules

ICMP_ONLY = Filter(protocol="icmp")
SSH = Filter(protocol="tcp", port_range_start=22, port_range_end=22)
WEB = Filter(protocol="tcp", port_range_start=80, port_range_end=80)

_numbers = st.integers(0, 2**32 - 1).map(lambda number: number & 0x0A03_0303)  # so that networks overlap
_networks = st.builds(
    lambda number, bits: str(ipaddress.IPv4Network((number, bits), strict=False)), _numbers, st.integers(0, 32)
)
_filters = st.lists(st.sampled_from([ICMP_ONLY, SSH, WEB]), max_size=2, unique_by=lambda one: one.port_range_start)
_resources = st.builds(
    lambda rid, network, filters: _cidr(rid, network, *filters), st.sampled_from("abcd"), _networks, _filters
)
_changes = st.tuples(st.sampled_from(["allow", "update", "forbid"]), _resources)


@given(st.lists(_changes, max_size=12), st.lists(_numbers, min_size=1, max_size=4))
def test_an_address_has_the_rules_of_all_resources_that_hold_it(
    changes: list[tuple[str, CidrResource]], numbers: list[int]
) -> None:
    client = AdmittedClient("client")
    allowed: dict[str, CidrResource] = {}
    for change, resource in changes:
        before = allowed.get(resource.id)
        match change:
            case "allow":
                client.allow(Allowed.of(resource))
                allowed[resource.id] = resource
            case "update":
                client.update_filters(resource)
                if before is not None:
                    allowed[resource.id] = _cidr(resource.id, before.address, *resource.filters)
            case _:
                assert client.forbid(resource.id) == (before is not None)
                allowed.pop(resource.id, None)

        assert {rid: one.resource for rid, one in client.resources.items()} == allowed
        for address in map(ipaddress.IPv4Address, numbers):
            holding = [one for one in allowed.values() if address in ipaddress.ip_network(one.address)]
            assert _same(client.rules(address.packed), Rules.union(Rules.of(one.filters) for one in holding))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize(
    ("wide", "middle", "narrow"),
    [("10.0.0.0/8", "10.20.0.0/16", "10.20.0.5/32"), ("fd00::/16", "fd00:20::/32", "fd00:20::5/128")],
)
def test_nested_resources_add_up_in_any_order(wide: str, middle: str, narrow: str, order: list[int]) -> None:
    resources = [_cidr("wide", wide, ICMP_ONLY), _cidr("middle", middle, WEB), _cidr("narrow", narrow, SSH)]
    address = ipaddress.ip_network(narrow).network_address.packed
    client = AdmittedClient("client")

    for index in order:
        client.allow(Allowed.of(resources[index]))

    assert _same(client.rules(address), Rules(tcp=((22, 22), (80, 80)), icmp=True))
    client.forbid("narrow")
    assert _same(client.rules(address), Rules(tcp=((80, 80),), icmp=True))


def test_without_a_resource_nothing_passes() -> None:
    client = AdmittedClient("client")

    assert client.rules(bytes((10, 0, 0, 1))) == PERMIT_NOTHING
    assert client.rules(bytes(16)) == PERMIT_NOTHING


@pytest.mark.parametrize("everything", ["0.0.0.0/0", "100.64.0.0/10", "100.64.0.0/16"])
def test_no_resource_permits_packets_from_one_client_to_another(everything: str) -> None:
    client = AdmittedClient("client")
    client.allow(Allowed.of(_cidr("a", everything)))
    client.allow(Allowed.of(_cidr("b", "::/0")))

    assert client.rules(ipaddress.ip_address("100.64.0.7").packed) == PERMIT_NOTHING
    assert client.rules(ipaddress.ip_address("fd00:2021:1111::7").packed) == PERMIT_NOTHING


def test_a_resource_for_everything_permits_everything_in_more_specific_resources_too() -> None:
    client, address = AdmittedClient("client"), bytes((172, 20, 0, 1))
    client.allow(Allowed.of(_cidr("lab", "172.20.0.0/16", WEB)))
    assert client.rules(address) == Rules(tcp=((80, 80),))

    client.allow(Allowed.of(_cidr("internet", "0.0.0.0/0")))

    assert client.rules(address) == PERMIT_ALL


def _cidr(rid: str, address: str, *filters: Filter) -> CidrResource:
    return CidrResource(id=rid, name="Lab", address=address, filters=list(filters))


def _same(one: Rules, other: Rules) -> bool:
    """Whether they permit the same packets: the order of port ranges doesn't matter."""
    return (one.everything, set(one.tcp), one.icmp) == (other.everything, set(other.tcp), other.icmp)

"""What passes, against an evaluator that asks every resource anew (docs/protocol/data-plane.md, 6.5)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.packet.superpacket import ICMP, ICMPV6, TCP, UDP, SuperPacket
from firezone_tunnel.core.tunnel.filter import PERMIT_ALL, PERMIT_NOTHING, Rules

_GRE = 47
_PORT = 100  # tests draw ports close to it, so that they hit the ranges

_filters = st.lists(
    st.builds(
        lambda protocol, start, length: Filter(
            protocol=protocol, port_range_start=start, port_range_end=min(start + length, 0xFFFF)
        ),
        st.sampled_from(["tcp", "udp", "icmp"]),
        st.integers(_PORT - 3, _PORT + 3),
        st.integers(0, 3),
    ),
    max_size=3,
)
_protocols = st.sampled_from([TCP, UDP, ICMP, ICMPV6, _GRE])
_ports = st.one_of(st.integers(_PORT - 5, _PORT + 8), st.sampled_from([0, 0xFFFF]))


@given(_filters, _protocols, _ports)
def test_a_resource_permits_packets_that_match_one_of_its_filters(
    filters: list[Filter], protocol: int, port: int
) -> None:
    assert Rules.of(filters).permits(_packet(protocol), port) == _passes(filters, protocol, port)


@given(st.lists(_filters, max_size=4), _protocols, _ports)
def test_the_union_permits_packets_that_one_of_the_resources_permits(
    several: list[list[Filter]], protocol: int, port: int
) -> None:
    union = Rules.union(Rules.of(filters) for filters in several)

    assert union.permits(_packet(protocol), port) == any(_passes(filters, protocol, port) for filters in several)


def test_an_empty_list_permits_every_protocol() -> None:
    assert Rules.of([]) == PERMIT_ALL
    assert Rules.of([]).permits(_packet(_GRE), 0)


def test_missing_bounds_are_the_whole_range() -> None:
    rules = Rules.of([Filter(protocol="tcp")])

    assert rules.permits(_packet(TCP), 0)
    assert rules.permits(_packet(TCP), 0xFFFF)
    assert not rules.permits(_packet(UDP), 80)


def test_icmp_of_any_type_and_both_versions_passes_if_listed() -> None:
    rules = Rules.of([Filter(protocol="icmp")])

    assert rules.permits(_packet(ICMP), 0)
    assert rules.permits(_packet(ICMPV6), 12345)
    assert not rules.permits(_packet(TCP), 0)


def test_a_fragment_passes_only_where_everything_does() -> None:
    fragment = _packet(TCP, fragment=True)

    assert PERMIT_ALL.permits(fragment, 0)
    assert not Rules.of([Filter(protocol="tcp")]).permits(fragment, 0)
    assert not Rules.union([Rules.of([Filter(protocol="udp")]), Rules.of([Filter(protocol="icmp")])]).permits(
        fragment, 0
    )


def test_the_union_of_nothing_permits_nothing() -> None:
    assert Rules.union([]) == PERMIT_NOTHING
    assert not PERMIT_NOTHING.permits(_packet(ICMP), 0)


def _packet(protocol: int, *, fragment: bool = False) -> SuperPacket:
    """A packet with only the fields that rules check."""
    packet = SuperPacket()
    packet.protocol = protocol
    packet.fragment = fragment
    return packet


def _passes(filters: list[Filter], protocol: int, port: int) -> bool:
    names = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmp"}
    return not filters or any(
        entry.protocol == names.get(protocol)
        and (entry.protocol == "icmp" or entry.port_range_start <= port <= entry.port_range_end)
        for entry in filters
    )

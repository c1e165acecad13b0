"""Allocations and their lifetimes, as RFC 8656, sections 7 and 8, and Firezone's clients require them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from firezone_tunnel.core.relay.allocator import MAX_ATTEMPTS, RelayConfig
from firezone_tunnel.core.relay.outputs import ClosePort, Drained, OpenPort
from firezone_tunnel.core.relay.port_range import QUARANTINE
from firezone_tunnel.core.relay.registry import RESERVATION_LIFETIME
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import FAMILY_IPV4, FAMILY_IPV6, AddressError, Method
from tests.unit.core.relay.world import (
    CLIENT4,
    CLIENT6,
    PEER4,
    PEER6,
    RELAY4,
    RELAY6,
    Client,
    World,
    code_of,
    relayed_port,
)

DUAL = (stun.ADDITIONAL_ADDRESS_FAMILY, FAMILY_IPV6)
ONLY4 = (stun.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV4)
ONLY6 = (stun.REQUESTED_ADDRESS_FAMILY, FAMILY_IPV6)


@pytest.mark.parametrize("address", [CLIENT4, CLIENT6])
def test_a_success_carries_relayed_address_own_address_and_lifetime(address: SocketAddress) -> None:
    world = World()

    answer = Client(world, address).allocate()

    assert [attribute.name for attribute, _ in answer.attributes] == [
        "XOR-RELAYED-ADDRESS",
        "XOR-MAPPED-ADDRESS",
        "LIFETIME",
    ]
    (relayed,) = answer.get_all(stun.XOR_RELAYED_ADDRESS)
    assert relayed.host == RELAY4
    assert 49152 <= relayed.port <= 65535
    assert answer.get(stun.XOR_MAPPED_ADDRESS) == address
    assert answer.get(stun.LIFETIME) == 600
    assert world.open == {(relayed.port, FAMILY_IPV4)}


@pytest.mark.parametrize("asked", [DUAL, (stun.COTURN_ADDITIONAL_ADDRESS_FAMILY, FAMILY_IPV6)])
def test_a_dual_stack_allocation_has_the_same_port_in_both_families(asked: tuple[Any, int]) -> None:
    world = World()

    relayed = Client(world).allocate(asked).get_all(stun.XOR_RELAYED_ADDRESS)

    assert [address.host for address in relayed] == [RELAY4, RELAY6]
    assert relayed[0].port == relayed[1].port
    assert world.open == {(relayed[0].port, FAMILY_IPV4), (relayed[0].port, FAMILY_IPV6)}


@pytest.mark.parametrize(
    ("asked", "both", "only4", "only6"),
    [
        (None, [RELAY4], [RELAY4], 440),
        (ONLY4, [RELAY4], [RELAY4], 440),
        (ONLY6, [RELAY6], 440, [RELAY6]),
        (DUAL, [RELAY4, RELAY6], [RELAY4], [RELAY6]),
        ((stun.REQUESTED_ADDRESS_FAMILY, 3), 440, 440, 440),
    ],
)
def test_families_are_granted_as_requested_and_available(
    asked: tuple[stun.Attribute[int], int] | None, both: object, only4: object, only6: object
) -> None:
    worlds = [World(), World(public_ipv6=None), World(public_ipv4=None)]

    answers = [Client(world).allocate(*([asked] if asked else [])) for world in worlds]

    for answer, expected in zip(answers, (both, only4, only6), strict=True):
        hosts = [address.host for address in answer.get_all(stun.XOR_RELAYED_ADDRESS)]
        assert (hosts or code_of(answer)) == expected


def test_the_family_that_a_dual_stack_allocation_lacks_is_named() -> None:
    (without6, without4) = (Client(World(**{which: None})).allocate(DUAL) for which in ("public_ipv6", "public_ipv4"))

    assert without6.get(stun.ADDRESS_ERROR_CODE) == AddressError(FAMILY_IPV6, 440)
    assert without4.get(stun.ADDRESS_ERROR_CODE) == AddressError(FAMILY_IPV4, 440)
    assert Client(World()).allocate(DUAL).get(stun.ADDRESS_ERROR_CODE) is None


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ([], 400),
        ([(stun.REQUESTED_TRANSPORT, 6)], 442),
        ([(stun.REQUESTED_TRANSPORT, 17), ONLY4, DUAL], 400),
        ([(stun.REQUESTED_TRANSPORT, 17), (stun.ADDITIONAL_ADDRESS_FAMILY, FAMILY_IPV4)], 400),
        ([(stun.REQUESTED_TRANSPORT, 17), (stun.EVEN_PORT, True), DUAL], 400),
        ([(stun.REQUESTED_TRANSPORT, 17), (stun.EVEN_PORT, False), (stun.RESERVATION_TOKEN, bytes(8))], 400),
        ([(stun.REQUESTED_TRANSPORT, 17), (stun.RESERVATION_TOKEN, bytes(8)), ONLY4], 400),
        ([(stun.REQUESTED_TRANSPORT, 17), (stun.RESERVATION_TOKEN, bytes(8)), DUAL], 400),
        ([(stun.REQUESTED_TRANSPORT, 17), (stun.RESERVATION_TOKEN, bytes(8))], 508),
    ],
)
def test_requests_that_cannot_be_granted(attributes: list[tuple[stun.Attribute[object], object]], code: int) -> None:
    world = World()

    answer = Client(world).request(Method.ALLOCATE, *attributes)

    assert code_of(answer) == code
    assert world.server.allocations == 0
    assert world.open == set()


@pytest.mark.parametrize(
    ("asked", "granted"), [(None, 600), (0, 600), (1, 600), (777, 777), (3600, 3600), (3601, 3600), (2**32 - 1, 3600)]
)
def test_lifetimes_have_a_floor_and_a_cap(asked: int | None, granted: int) -> None:
    world = World()
    client = Client(world)

    answer = client.allocate(*([] if asked is None else [(stun.LIFETIME, asked)]))

    assert answer.get(stun.LIFETIME) == granted
    if asked != 0:
        assert client.refresh(asked).get(stun.LIFETIME) == granted


def test_an_allocation_that_is_not_refreshed_ends_at_its_second() -> None:
    world = World()
    client = Client(world)
    port = relayed_port(client.allocate(DUAL))

    world.advance(599.9)
    assert world.server.allocations == 1
    world.advance(0.1)

    assert world.server.allocations == 0
    assert world.commands[-1] == ClosePort(port, (FAMILY_IPV4, FAMILY_IPV6))
    assert world.open == set()
    assert code_of(client.bind(0x4000, PEER4)) == 437


def test_a_late_timer_keeps_no_allocation_alive() -> None:
    world = World()
    client = Client(world)
    port = relayed_port(client.allocate())
    client.bind(0x4000, PEER4)

    world.now += 600  # without a call of handle_timeout

    assert client.send_on(0x4000, b"late") == []
    assert (port, FAMILY_IPV4) not in world.open


def test_an_allocation_that_is_refreshed_in_time_lives_on_past_its_old_end() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    world.advance(300)
    client.refresh(600)

    world.advance(599)

    assert world.server.allocations == 1
    assert world.open == {(port, FAMILY_IPV4), (port, FAMILY_IPV6)}


def test_a_refresh_with_lifetime_0_deletes_at_once() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()

    answer = client.refresh(0)

    assert (code_of(answer), answer.get(stun.LIFETIME)) == (0, 0)
    assert world.open == set()
    assert world.commands[-1] == ClosePort(port, (FAMILY_IPV4, FAMILY_IPV6))
    assert code_of(client.refresh(0)) == 437
    assert code_of(client.refresh(600)) == 437


def test_a_retransmitted_deletion_succeeds_again() -> None:
    client = Client(World())
    client.allocate()
    client.refresh(0, transaction_id=b"deletes once")

    assert code_of(client.refresh(0, transaction_id=b"deletes once")) == 0
    assert code_of(client.refresh(0, transaction_id=b"another one!")) == 437
    client.world.advance(41)
    assert code_of(client.refresh(0, transaction_id=b"deletes once")) == 437


def test_a_retransmitted_allocate_gets_the_same_addresses_and_a_different_allocate_437() -> None:
    world = World()
    client = Client(world)
    client.request(Method.REFRESH)  # for the nonce
    first = client.allocate(DUAL, transaction_id=b"allocate this")
    world.advance(10)

    again = client.allocate(DUAL, transaction_id=b"allocate this")

    assert again.get_all(stun.XOR_RELAYED_ADDRESS) == first.get_all(stun.XOR_RELAYED_ADDRESS)
    assert again.get(stun.LIFETIME) == 590
    assert code_of(client.allocate(DUAL)) == 437
    assert world.server.allocations == 1


def test_a_client_that_returns_under_another_name_gets_a_new_allocation_and_frees_the_old() -> None:
    world = World()
    Client(world).allocate()
    renamed = Client(world)

    assert code_of(renamed.allocate()) == 437
    assert code_of(renamed.refresh(0)) == 0
    assert code_of(renamed.allocate()) == 0
    assert world.server.allocations == 1


def test_another_name_is_refused_where_the_operator_wants_it_so() -> None:
    world = World(same_user_only=True)
    owner = Client(world)
    owner.allocate()

    assert code_of(Client(world).refresh(600)) == 441
    assert code_of(owner.refresh(600)) == 0


def test_a_refresh_of_one_family_leaves_the_other_alone() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.bind(0x4000, PEER4)
    client.bind(0x4001, PEER6)

    assert code_of(client.refresh(0, ONLY6)) == 0

    assert world.open == {(port, FAMILY_IPV4)}
    assert [sent.to for sent in client.send_on(0x4000, b"four")] == [PEER4]
    assert client.send_on(0x4001, b"six") == []
    assert code_of(client.refresh(600, ONLY6)) == 443
    assert code_of(client.refresh(600, (stun.REQUESTED_ADDRESS_FAMILY, 7))) == 443
    assert world.server.channels == 1


def test_each_family_ends_in_its_own_time() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.refresh(1200, ONLY6)

    world.advance(600)

    assert world.open == {(port, FAMILY_IPV6)}
    assert code_of(client.bind(0x4000, PEER4)) == 443
    assert code_of(client.bind(0x4000, PEER6)) == 0


def test_firezones_refresh_with_attributes_of_an_allocate_succeeds() -> None:
    client = Client(World())
    client.allocate(DUAL)

    answer = client.refresh(None, (stun.REQUESTED_TRANSPORT, stun.UDP), DUAL, (stun.SOFTWARE, "snownet"))

    assert (code_of(answer), answer.get(stun.LIFETIME)) == (0, 600)


def test_an_even_port_is_even() -> None:
    world = World(lowest_port=50_001, highest_port=50_100)

    ports = [relayed_port(_client(world, number).allocate((stun.EVEN_PORT, False))) for number in range(50)]

    assert sorted(ports) == list(range(50_002, 50_101, 2))
    assert code_of(_client(world, 60).allocate((stun.EVEN_PORT, False))) == 508
    assert code_of(_client(world, 61).allocate()) == 0


def test_the_next_port_is_reserved_for_the_holder_of_the_token() -> None:
    world = World()
    answer = _client(world, 1).allocate((stun.EVEN_PORT, True))
    token = answer.get(stun.RESERVATION_TOKEN)
    assert token is not None

    second = _client(world, 2).allocate((stun.RESERVATION_TOKEN, token))

    assert relayed_port(second) == relayed_port(answer) + 1
    assert code_of(_client(world, 3).allocate((stun.RESERVATION_TOKEN, token))) == 508


def test_a_reservation_is_over_after_30_seconds() -> None:
    world = World(lowest_port=50_000, highest_port=50_001)
    token = _client(world, 1).allocate((stun.EVEN_PORT, True)).get(stun.RESERVATION_TOKEN)
    late = _client(world, 2)
    assert code_of(late.allocate()) == 508

    world.advance(RESERVATION_LIFETIME)

    assert code_of(late.allocate((stun.RESERVATION_TOKEN, token))) == 508
    assert relayed_port(late.allocate()) == 50_001


def test_one_of_several_workers_reserves_nothing() -> None:
    world = World(workers=2)

    assert code_of(_client(world, 1).allocate((stun.EVEN_PORT, True))) == 508
    assert code_of(_client(world, 2).allocate((stun.EVEN_PORT, False))) == 0


@given(st.integers(1, 65_535), st.integers(0, 500), st.integers(1, 64))
def test_workers_divide_the_ports_among_them_and_leave_none_out(lowest: int, more: int, workers: int) -> None:
    highest = min(65_535, lowest + more)
    assume(highest - lowest + 1 >= workers)
    configs = [
        RelayConfig(lowest_port=lowest, highest_port=highest, workers=workers, worker=worker)
        for worker in range(workers)
    ]

    assert [port for config in configs for port in config.own_ports] == list(range(lowest, highest + 1))
    sizes = [len(config.own_ports) for config in configs]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 1000), st.integers(1, 64))
def test_the_shares_of_workers_are_equal_and_at_least_what_they_share(limit: int, workers: int) -> None:
    share = RelayConfig(workers=workers).share(limit)

    assert limit <= share * workers < limit + workers


def test_each_of_several_workers_grants_its_share() -> None:
    world = World(workers=2, max_allocations=5, max_allocations_per_user=3)
    clients = [_client(world, number) for number in range(6)]
    for client in clients[:3]:
        client.username, client.password = clients[0].username, clients[0].password

    codes = [code_of(client.allocate()) for client in clients]

    assert codes == [0, 0, 486, 0, 486, 486]  # two of one user, three in all


def test_exhausted_ports_are_508_and_come_back() -> None:
    world = World(lowest_port=50_000, highest_port=50_002)
    clients = [_client(world, number) for number in range(4)]
    ports = {relayed_port(client.allocate()) for client in clients[:3]}

    assert ports == {50_000, 50_001, 50_002}
    assert code_of(clients[3].allocate()) == 508
    clients[1].refresh(0)
    assert code_of(clients[3].allocate()) == 0


def test_a_port_rests_before_another_client_gets_it() -> None:
    world = World(lowest_port=50_000, highest_port=50_063)
    first = _client(world, 0)
    port = relayed_port(first.allocate())
    first.refresh(0)

    others = [relayed_port(_client(world, number).allocate()) for number in range(1, 64)]
    assert port not in others

    world.advance(QUARANTINE)
    assert relayed_port(_client(world, 64).allocate()) == port


def test_a_port_that_another_process_has_is_replaced_by_a_free_port() -> None:
    world = World()
    world.occupied = lambda port: len(world.commands) < 3

    answer = Client(world).allocate()

    assert code_of(answer) == 0
    assert len([command for command in world.commands if isinstance(command, OpenPort)]) == 3
    assert world.open == {(relayed_port(answer), FAMILY_IPV4)}


def test_a_host_whose_ports_are_all_taken_is_508_and_the_relay_goes_on() -> None:
    world = World()
    world.occupied = lambda port: True
    client = Client(world)

    assert code_of(client.allocate()) == 508
    assert len(world.commands) == MAX_ATTEMPTS
    world.occupied = lambda port: False
    assert code_of(client.allocate()) == 0


def test_a_host_without_sockets_is_508_at_once() -> None:
    world = World()
    world.sockets = 3
    _client(world, 1).allocate_dual()

    assert code_of(_client(world, 2).allocate(DUAL)) == 508
    assert len(world.commands) == 2
    assert code_of(_client(world, 3).allocate()) == 0


def test_quotas_are_486() -> None:
    world = World(max_allocations=3, max_allocations_per_user=2)
    first, second = Client(world), Client(world)
    addresses = [SocketAddress("5.5.5.5", 1000 + number) for number in range(5)]

    codes = []
    for user, address in zip([first, first, first, second, second], addresses, strict=True):
        same_user = Client(world, address, username=user.username, password=user.password)
        codes.append(code_of(same_user.allocate()))

    assert codes == [0, 0, 486, 0, 486]
    Client(world, addresses[0], username=first.username, password=first.password).refresh(0)
    assert code_of(Client(world, addresses[2], username=first.username, password=first.password).allocate()) == 0


def test_a_draining_relay_refuses_new_allocations_and_reports_when_the_last_has_gone() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)

    world.drain()

    assert code_of(_client(world, 1).allocate()) == 508
    assert [sent.to for sent in client.send_on(0x4000, b"on")] == [PEER4]
    assert code_of(client.refresh(600)) == 0
    assert Drained() not in world.commands
    client.refresh(0)
    assert world.commands[-1] == Drained()
    world.drain()
    assert world.commands.count(Drained()) == 1


def test_a_relay_without_allocations_is_drained_at_once() -> None:
    world = World()

    world.drain()

    assert world.commands == [Drained()]


def test_ports_are_spread_over_the_whole_range() -> None:
    world = World()

    ports = [relayed_port(_client(world, number).allocate()) for number in range(200)]

    assert len(set(ports)) == 200
    assert min(ports) < 52_000
    assert max(ports) > 62_000


def _client(world: World, number: int) -> Client:
    return Client(world, SocketAddress(f"5.5.5.{number}", 10_000))

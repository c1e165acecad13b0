"""Strangers get few answers, leave no state behind, and never make the relay raise or send to third parties."""

from __future__ import annotations

import gc
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.relay.budget import MAX_CREDIT, MAX_RESPONSE, RESPONSES_PER_SECOND, ResponseBudget
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method
from tests.hypothesis_profiles import examples
from tests.unit.core.relay.world import CLIENT4, CLIENT6, PEER4, Client, World, channel_data, code_of, parsed

BINDING = Message(Method.BINDING, Kind.REQUEST, bytes(12)).encode()
ALLOCATE = Message(Method.ALLOCATE, Kind.REQUEST, bytes(12), ((stun.REQUESTED_TRANSPORT, stun.UDP),)).encode()


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_a_binding_request_is_answered_with_the_address_that_it_came_from(source: SocketAddress) -> None:
    client = Client(World(), source)

    answer = client.ask(BINDING)

    assert answer.kind is Kind.SUCCESS
    assert answer.attributes == ((stun.XOR_MAPPED_ADDRESS, source),)
    assert not answer.has_integrity


def test_a_fingerprint_is_checked_and_mirrored() -> None:
    client = Client(World())
    request = Message(Method.BINDING, Kind.REQUEST, bytes(12)).encode(fingerprint=True)

    assert client.ask(request).is_intact()
    assert not client.ask(BINDING).has_fingerprint
    assert client.world.deliver(CLIENT4, request[:-1] + b"\0") == []
    assert client.allocate(fingerprint=True).is_intact()


def test_unknown_comprehension_required_attributes_are_420_and_optional_attributes_are_ignored() -> None:
    client = Client(World())
    required, optional = _unknown(0x7FFE), _unknown(0xBFFF)

    binding = Message(Method.BINDING, Kind.REQUEST, bytes(12), ((required, b""), (optional, b""))).encode()
    answer = client.ask(binding)

    assert (code_of(answer), answer.get(stun.UNKNOWN_ATTRIBUTES)) == (420, (0x7FFE,))
    answer = client.allocate((required, b"x"))
    assert (code_of(answer), answer.get(stun.UNKNOWN_ATTRIBUTES)) == (420, (0x7FFE,))
    assert code_of(client.allocate((optional, b"x"))) == 0


def test_the_first_of_equal_attributes_counts() -> None:
    client = Client(World())

    answer = client.allocate((stun.LIFETIME, 900), (stun.LIFETIME, 1000))

    assert answer.get(stun.LIFETIME) == 900


@pytest.mark.parametrize("kind", [Kind.INDICATION, Kind.SUCCESS, Kind.ERROR])
@pytest.mark.parametrize("method", [*Method, 0x00A, 0xFFF])
def test_only_requests_are_answered(kind: Kind, method: int) -> None:
    world = World()
    Client(world).allocate()

    assert world.deliver(CLIENT4, Message(method, kind, bytes(12)).encode()) == []


@pytest.mark.parametrize("method", [0x002, Method.SEND, Method.DATA, 0x00A, 0x080, 0xFFF])
def test_requests_of_methods_that_we_do_not_have_are_not_answered(method: int) -> None:
    assert World().deliver(CLIENT4, Message(method, Kind.REQUEST, bytes(12)).encode()) == []


def test_senders_without_a_port_are_ignored() -> None:
    world = World()

    assert world.deliver(SocketAddress("5.5.5.5", 0), BINDING) == []
    assert world.deliver(SocketAddress("5.5.5.5", 0), ALLOCATE) == []


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
@pytest.mark.parametrize("fingerprint", [False, True])
def test_answers_to_strangers_are_at_most_100_bytes(source: SocketAddress, fingerprint: bool) -> None:
    world = World()
    client = Client(world, source)
    unknown = tuple((_unknown(0x7000 + number), b"") for number in range(50))
    sizes = []

    for method in (Method.BINDING, Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND):
        client.nonce = None
        bare = Message(method, Kind.REQUEST, bytes(12), unknown).encode(fingerprint=fingerprint)
        named = Message(method, Kind.REQUEST, bytes(12), ((stun.USERNAME, client.username),))
        requests = [bare, named.encode(fingerprint=fingerprint), client.encode(method, fingerprint=fingerprint)]
        client.nonce = "stale"
        requests.append(client.encode(method, fingerprint=fingerprint))
        for request in requests:
            (sent,) = world.deliver(source, request)
            sizes.append(len(sent.datagrams[0]))

    assert len(sizes) == 20
    assert max(sizes) <= MAX_RESPONSE


@pytest.mark.parametrize("request_", [BINDING, ALLOCATE])
def test_one_address_gets_at_most_100_answers_a_second(request_: bytes) -> None:
    world = World()

    def answered() -> int:
        return sum(len(world.deliver(SocketAddress("5.5.5.5", port), request_)) for port in range(1, 301))

    assert answered() == RESPONSES_PER_SECOND
    world.now += 0.9
    assert answered() == 0
    assert len(world.deliver(SocketAddress("5.5.5.6", 1), request_)) == 1
    world.now += 0.1
    assert answered() == RESPONSES_PER_SECOND


def test_the_addresses_of_an_ipv6_network_share_a_budget() -> None:
    world = World()

    answered = sum(len(world.deliver(SocketAddress(f"2a03:3::{number:x}", 5000), BINDING)) for number in range(1, 301))

    assert answered == RESPONSES_PER_SECOND
    assert len(world.deliver(SocketAddress("2a03:3:0:1::1", 5000), BINDING)) == 1


@pytest.mark.parametrize("source", ["5.5.{}.{}", "2a03:{}:{}::1"])
def test_a_flood_from_forged_addresses_is_not_amplified(source: str) -> None:
    world = World()
    requests = [
        BINDING,
        ALLOCATE,
        Message(Method.ALLOCATE, Kind.REQUEST, bytes(12), ((stun.USERNAME, "1:a"),)).encode(),
        Message(Method.REFRESH, Kind.REQUEST, bytes(12)).encode(fingerprint=True),
    ]
    bytes_in = bytes_out = answers = 0

    for number in range(20_000):
        world.now += 1 / 50_000
        request = requests[number % 4]
        sent = world.deliver(SocketAddress(source.format(number // 200, number % 200), 1234), request)
        bytes_in += len(request)
        bytes_out += sum(len(send.datagrams[0]) for send in sent)
        answers += len(sent)

    assert answers > 1000
    assert bytes_out <= bytes_in
    assert world.server.counters.withheld_responses == 20_000 - answers


def test_a_flood_does_not_silence_the_relay_for_its_clients() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    for number in range(10_000):
        world.deliver(SocketAddress(f"6.{number // 250}.{number % 250}.1", 1234), BINDING)
    strangers = [world.deliver(SocketAddress(f"7.7.7.{number}", 1), BINDING) for number in range(100)]
    assert 20 < strangers.count([]) < 80

    assert client.ask(BINDING).kind is Kind.SUCCESS
    assert code_of(client.refresh(600)) == 0


def test_forged_allocates_leave_nothing_behind() -> None:
    world = World()
    _forge(world, range(2000))  # everything that is created once exists by now
    before = _objects()

    _forge(world, range(2000, 22_000))

    grown = {name: count for name, count in (_objects() - before).items() if count > 20}
    assert grown == {}
    assert world.server.allocations == 0
    assert world.commands == []


def test_a_budget_is_of_a_fixed_size_and_recovers() -> None:
    budget = ResponseBudget(random.Random(1).randbytes, 0.0)
    source = iter(SocketAddress(f"6.{number // 250}.{number % 250}.1", 1) for number in range(10_000))

    spent = 0
    while budget.spend(next(source), 100, 0.0):
        spent += 100
    assert spent == MAX_CREDIT // 100 * 100
    assert budget.spend(next(source), 100, 1.0)
    budget.received(800)
    assert budget.spend(CLIENT4, 100, 0.0, proven=True)


def test_workers_share_the_budget_of_answers_to_strangers() -> None:
    worlds = [World(workers=4, worker=worker) for worker in range(4)]

    one_address = [len(world.deliver(SocketAddress("5.5.5.5", n), BINDING)) for world in worlds for n in range(1, 200)]
    budgets = [ResponseBudget(random.Random(1).randbytes, 0.0, workers=4) for _ in range(4)]
    spent = [sum(budget.spend(SocketAddress(f"6.0.{n}.1", 1), 100, 0.0) for n in range(200)) for budget in budgets]

    assert sum(one_address) == RESPONSES_PER_SECOND
    assert MAX_CREDIT - 400 < sum(spent) * 100 <= MAX_CREDIT


@given(st.binary(max_size=300), st.integers(0, 300))
@settings(max_examples=examples(300))
def test_no_bytes_from_a_client_raise(data: bytes, segment_size: int) -> None:
    world = _established()

    sent = world.deliver(CLIENT4, data, segment_size=segment_size if 0 < segment_size < len(data) else 0)

    assert all(send.port == 0 for send in sent if send.to != PEER4)


_ATTRIBUTES = st.lists(st.tuples(st.sampled_from(sorted(stun.ATTRIBUTES)), st.binary(max_size=24)), max_size=8)


@given(
    st.sampled_from([1, 3, 4, 6, 8, 9]), st.sampled_from([Kind.REQUEST, Kind.INDICATION]), _ATTRIBUTES, st.booleans()
)
@settings(max_examples=examples(500))
def test_no_attributes_of_an_authenticated_client_raise(
    method: int, kind: Kind, values: list[tuple[int, bytes]], authenticated: bool
) -> None:
    world = _established()
    client = Client(world, CLIENT4)
    client.nonce = parsed(world.deliver(CLIENT4, ALLOCATE)[0].datagrams[0]).get(stun.NONCE)
    attributes = [(_raw(number), value) for number, value in values]
    if authenticated and kind is Kind.REQUEST:
        data = client.encode(method, *attributes)
    else:
        data = Message(method, kind, bytes(12), tuple(attributes)).encode()

    sent = world.deliver(CLIENT4, data)

    assert len(sent) <= 1
    assert all(send.to == CLIENT4 or kind is Kind.INDICATION for send in sent)


@given(st.binary(min_size=1, max_size=300), st.integers(0, 300), st.booleans())
def test_no_bytes_from_a_peer_raise(data: bytes, segment_size: int, known: bool) -> None:
    world = _established()
    (port, _) = sorted(world.open)[0]
    source = PEER4 if known else SocketAddress("8.8.8.8", 1)

    sent = world.deliver_to_port(port, source, data, segment_size=segment_size if 0 < segment_size < len(data) else 0)

    assert b"".join(datagram[4:] for send in sent for datagram in send.datagrams) == (data if known else b"")


def test_the_largest_datagrams_raise_nothing() -> None:
    world = World()
    client = Client(world)
    port = client.allocate_dual()
    client.permit(PEER4)

    assert len(world.deliver_to_port(port, PEER4, bytes(65_507))) == 0  # no indication can hold it
    assert len(world.deliver_to_port(port, PEER4, bytes(65_000))) == 1
    client.bind(0x4000, PEER4)
    assert len(world.deliver_to_port(port, PEER4, bytes(65_507))) == 1
    assert len(world.deliver(CLIENT4, channel_data(0x4000, bytes(65_503)))) == 1
    world.deliver(CLIENT4, b"\0\1" + bytes(65_505))


def _established() -> World:
    """A relay with an allocation whose channel 0x4000 is bound to PEER4."""
    world = World()
    client = Client(world)
    client.allocate()
    client.bind(0x4000, PEER4)
    return world


def _forge(world: World, numbers: range) -> None:
    named = Message(Method.ALLOCATE, Kind.REQUEST, bytes(12), ((stun.USERNAME, "2000000000:salt"), (stun.REALM, "r")))
    requests = (ALLOCATE, named.encode(key=bytes(16)), BINDING)
    for number in numbers:
        world.now += 1 / 1000
        source = SocketAddress(f"{1 + number % 90}.{number // 250 % 250}.{number % 250}.7", 1 + number)
        world.deliver(source, requests[number % 3])


def _objects() -> Counter[str]:
    gc.collect()
    return Counter(type(instance).__name__ for instance in gc.get_objects())


def _unknown(number: int) -> stun.Attribute[bytes]:
    assert number not in stun.ATTRIBUTES
    return _raw(number)


def _raw(number: int) -> stun.Attribute[bytes]:
    return stun.Attribute(number, "raw", lambda value, _: value, lambda value, _: value)

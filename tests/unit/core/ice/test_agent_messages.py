"""Forged, misdirected and malformed messages, and messages from too many addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.ice.agent import MAX_REMOTE_ADDRESSES, Agent, Credentials
from firezone_tunnel.core.ice.candidate import Candidate
from firezone_tunnel.core.ice.checklist import MAX_PAIRS
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, parse, short_term_key
from tests.unit.core.ice.world import (
    CLIENT,
    CLIENT_HOST,
    GATEWAY,
    GATEWAY_HOST,
    STRANGER,
    World,
    nothing,
    offer_hosts,
    remote_addresses,
    stream,
)


def test_a_check_with_a_wrong_password_is_counted_and_not_answered() -> None:
    world = World()
    offer_hosts(world)

    assert not world.gateway.agent.handle_message(_check(password="wrong"), STRANGER, GATEWAY_HOST, world.now)

    assert world.gateway.agent.counters.unauthentic == 1
    assert world.gateway.agent.counters.checks_answered == 0
    assert STRANGER not in remote_addresses(world.gateway)


@pytest.mark.parametrize(
    "message",
    [
        Message(Method.BINDING, Kind.REQUEST, bytes(12)),
        Message(Method.BINDING, Kind.REQUEST, bytes(12), ((stun.USERNAME, f"{GATEWAY.ufrag}:{CLIENT.ufrag}"),)),
        Message(
            Method.BINDING,
            Kind.REQUEST,
            bytes(12),
            ((stun.USERNAME, f"{CLIENT.ufrag}:{GATEWAY.ufrag}"), (stun.PRIORITY, 1)),
        ),
        Message(Method.BINDING, Kind.INDICATION, bytes(12)),
        Message(Method.ALLOCATE, Kind.REQUEST, bytes(12)),
        Message(Method.BINDING, Kind.SUCCESS, bytes(12), ((stun.XOR_MAPPED_ADDRESS, GATEWAY_HOST),)),
    ],
)
def test_only_our_peers_checks_and_answers_to_our_checks_are_accepted(message: Message) -> None:
    agent = World().gateway.agent
    agent.add_local_candidate(Candidate.host(GATEWAY_HOST), 100.0)
    parsed = parse(message.encode(key=short_term_key(GATEWAY.password), fingerprint=True))
    assert parsed is not None

    assert not agent.handle_message(parsed, STRANGER, GATEWAY_HOST, 100.0)
    assert list(agent.transmits()) == []


def test_a_forged_answer_is_counted_and_the_real_one_still_counts() -> None:
    world = World()
    world.route = nothing
    offer_hosts(world)
    world.run(0.0)
    check = world.client.checks()[0].message
    agent = world.client.agent

    forged = _answer(check, password="wrong")
    assert not agent.handle_message(forged, GATEWAY_HOST, CLIENT_HOST, world.now)
    assert agent.nominated is None
    real = _answer(check, password=GATEWAY.password)
    assert agent.handle_message(real, GATEWAY_HOST, CLIENT_HOST, world.now)

    assert agent.counters.unauthentic == 1
    assert agent.nominated is not None


def test_an_answer_counts_once() -> None:
    world = World()
    world.route = nothing
    offer_hosts(world)
    world.run(0.0)
    answer = _answer(world.client.checks()[0].message, password=GATEWAY.password)

    assert world.client.agent.handle_message(answer, GATEWAY_HOST, CLIENT_HOST, world.now)
    assert not world.client.agent.handle_message(answer, GATEWAY_HOST, CLIENT_HOST, world.now)
    assert not world.client.agent.owns_transaction(answer.transaction_id)


def test_an_error_response_does_not_make_a_pair_succeed() -> None:
    world = World()
    world.route = nothing
    offer_hosts(world)
    world.run(0.0)
    check = world.client.checks()[0].message
    error = Message(Method.BINDING, Kind.ERROR, check.transaction_id, ((stun.ERROR_CODE, stun.ErrorCode(487)),))
    parsed = parse(error.encode(key=short_term_key(GATEWAY.password), fingerprint=True))
    assert parsed is not None

    assert world.client.agent.handle_message(parsed, GATEWAY_HOST, CLIENT_HOST, world.now)
    assert world.client.agent.nominated is None


def test_use_candidate_at_the_controlling_side_is_ignored() -> None:
    world = World()
    offer_hosts(world)
    check = _check(password=CLIENT.password, of=(CLIENT, GATEWAY), use_candidate=True)

    assert world.client.agent.handle_message(check, GATEWAY_HOST, CLIENT_HOST, world.now)

    assert world.client.agent.counters.role_conflicts == 1
    assert world.client.agent.counters.checks_answered == 0


def test_a_check_at_an_address_that_is_not_ours_is_not_answered() -> None:
    world = World()
    offer_hosts(world)

    assert world.gateway.agent.handle_message(
        _check(password=GATEWAY.password), CLIENT_HOST, SocketAddress("10.9.9.9", 1), world.now
    )

    assert world.gateway.agent.counters.checks_answered == 0
    assert world.gateway.agent.counters.unexpected == 1


def test_a_peer_that_names_or_comes_from_any_number_of_addresses_makes_no_more_than_100_pairs() -> None:
    world = World()
    for last in range(1, 4):
        world.gateway.offer(Candidate.host(SocketAddress(f"10.0.2.{last}", 52625)), signal=False)
    agent = world.gateway.agent
    for number in range(300):
        address = SocketAddress(f"203.0.{number // 250}.{number % 250 + 1}", 5000)
        check = _check(password=GATEWAY.password)
        if number % 2:
            agent.add_remote_candidate(Candidate.host(address), world.now)
        else:
            agent.handle_message(check, address, SocketAddress("10.0.2.1", 52625), world.now)

    assert len(agent.remote_candidates) <= MAX_REMOTE_ADDRESSES
    assert len({(check.source, check.destination) for check in _checks_of_a_while(world)}) <= MAX_PAIRS


def test_a_full_list_of_pairs_does_not_cost_the_path_in_use() -> None:
    world = World()
    offer_hosts(world)
    world.run(5.0)
    for number in range(300):
        address = SocketAddress(f"203.0.{number // 250}.{number % 250 + 1}", 5000)
        world.client.agent.add_remote_candidate(Candidate.host(address), world.now)
    world.run(5.0)

    assert world.client.path == (CLIENT_HOST, GATEWAY_HOST)


@given(st.binary(max_size=200), st.binary(min_size=12, max_size=12))
def test_any_stun_message_is_taken_in_without_error(body: bytes, transaction_id: bytes) -> None:
    agent = Agent(controlling=True, local=CLIENT, remote=GATEWAY, entropy=stream("any"), now=0.0)
    agent.add_local_candidate(Candidate.host(CLIENT_HOST), 0.0)
    body += bytes(-len(body) % 4)
    message = parse(b"\x00\x01" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + transaction_id + body)
    if message is not None:
        assert not agent.handle_message(message, STRANGER, CLIENT_HOST, 0.0)


def test_a_credential_does_not_show_in_a_log() -> None:
    assert "secret" not in repr(Credentials("user", "secret"))


def _check(
    *, password: str, of: tuple[Credentials, Credentials] = (GATEWAY, CLIENT), use_candidate: bool = False
) -> Message:
    attributes = [(stun.USERNAME, f"{of[0].ufrag}:{of[1].ufrag}"), (stun.PRIORITY, 1862270719)]
    if use_candidate:
        attributes.append((stun.USE_CANDIDATE, True))
    message = Message(Method.BINDING, Kind.REQUEST, bytes(12), tuple(attributes))
    parsed = parse(message.encode(key=short_term_key(password), fingerprint=True))
    assert parsed is not None
    return parsed


def _answer(check: Message, *, password: str) -> Message:
    mapped = (stun.XOR_MAPPED_ADDRESS, CLIENT_HOST)
    message = Message(Method.BINDING, Kind.SUCCESS, check.transaction_id, (mapped,))
    parsed = parse(message.encode(key=short_term_key(password), fingerprint=True))
    assert parsed is not None
    return parsed


def _checks_of_a_while(world: World) -> list[object]:
    world.run(20.0)
    return list(world.gateway.checks())

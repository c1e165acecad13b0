"""The connection to which a datagram belongs."""

from __future__ import annotations

from itertools import count
from typing import Any

import attrs

from firezone_tunnel.core.ice.agent import Agent, Credentials
from firezone_tunnel.core.ice.candidate import Candidate
from firezone_tunnel.core.sansio import Entropy, SocketAddress
from firezone_tunnel.core.snownet.directory import Directory
from firezone_tunnel.core.snownet.events import Terms
from firezone_tunnel.core.stun.message import USERNAME, Kind, Message, Method, parse
from firezone_tunnel.core.wireguard.handshake import StaticKey
from tests.unit.core.snownet.world import stream

_HOST = SocketAddress("10.0.0.1", 1)


def test_a_connection_is_found_by_key_and_by_the_first_half_of_a_username() -> None:
    directory = Directory(stream("directory"))
    first, second = _connection(1), _connection(2)
    directory.add(first)
    directory.add(second)

    assert directory.by_key(first.terms.remote_public_key) is first
    assert directory.by_stun(_request("loc1:rem1")) is first
    assert directory.by_stun(_request("loc2:other")) is second
    assert directory.by_stun(_request("rem1:loc1")) is None
    assert directory.by_stun(_request("loc1")) is first
    assert directory.by_stun(Message(Method.BINDING, Kind.REQUEST, bytes(12))) is None


def test_an_answer_finds_the_agent_of_its_check_even_if_two_agents_share_a_prefix() -> None:
    directory = Directory(stream("directory"))
    connections = [_connection(number, entropy=_numbers()) for number in (1, 2)]
    for connection in connections:
        directory.add(connection)
    assert connections[0].agent.transaction_prefix == connections[1].agent.transaction_prefix
    sent = [_check_of(connection.agent, skip=number) for number, connection in enumerate(connections)]
    assert sent[0] != sent[1]

    for connection, transaction_id in zip(connections, sent, strict=True):
        assert directory.by_stun(Message(Method.BINDING, Kind.SUCCESS, transaction_id)) is connection
    assert directory.by_stun(Message(Method.BINDING, Kind.SUCCESS, bytes(12))) is None


def test_a_removed_connection_is_no_longer_found_and_its_replacement_stays() -> None:
    directory = Directory(stream("directory"))
    old, new = _connection(1), _connection(1)
    directory.add(old)
    directory.add(new)

    directory.remove(old)
    assert directory.by_key(new.terms.remote_public_key) is new
    assert directory.by_stun(_request("loc1:rem1")) is new

    directory.remove(new)
    assert directory.by_key(new.terms.remote_public_key) is None
    assert directory.by_stun(_request("loc1:rem1")) is None


def test_an_index_belongs_to_one_session() -> None:
    repeating = iter([bytes(4), bytes(4), b"\0\0\0\x10", b"\0\0\0\x20"])
    directory = Directory(lambda size: next(repeating))
    connection = _connection(1)

    first, second = directory.allocate_index(connection), directory.allocate_index(connection)

    assert (first, second) == (0, 0x10)
    assert directory.by_index(first) is connection
    directory.release_index(first)
    assert directory.by_index(first) is None
    assert directory.by_index(second) is connection
    assert next(repeating) == b"\0\0\0\x20"


@attrs.frozen(eq=False)
class _Connection:
    """A connection, reduced to what the directory reads."""

    terms: Terms
    agent: Agent


def _connection(number: int, *, entropy: Entropy | None = None) -> Any:
    key = StaticKey.generate(stream(f"remote {number}"))
    local, remote = Credentials(f"loc{number}", "local password"), Credentials(f"rem{number}", "password")
    agent = Agent(controlling=True, local=local, remote=remote, entropy=entropy or stream(f"agent {number}"), now=0.0)
    return _Connection(Terms(key.public, bytes(32), local, remote), agent)


def _request(username: str) -> Message:
    return Message(Method.BINDING, Kind.REQUEST, bytes(12), ((USERNAME, username),))


def _check_of(agent: Agent, *, skip: int) -> bytes:
    """The transaction id of an agent's first open check, or of a later check."""
    agent.add_local_candidate(Candidate.host(_HOST), 0.0)
    for number in range(skip + 1):
        agent.add_remote_candidate(Candidate.host(SocketAddress(f"10.0.1.{number + 1}", 1)), 0.0)
        agent.handle_timeout(0.0)
    sent = [parse(transmit.payload) for transmit in agent.transmits()]
    message = sent[-1]
    assert message is not None
    return message.transaction_id


def _numbers() -> Any:
    """The same stream of bytes for every caller."""
    numbers = count()
    return lambda size: next(numbers).to_bytes(size, "big")

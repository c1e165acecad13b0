"""Recorded requests of upstream's clients of two generations get the same kind of answer from our relay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import attrs
import pytest

from firezone_tunnel.core.relay.credentials import StampSecret
from firezone_tunnel.core.relay.peer_policy import PRIVATE
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message
from tests.unit.core.relay.world import UTC, World, code_of, parsed

_VECTORS = Path(__file__).parents[3] / "data" / "vectors"
_RELAY = SocketAddress("10.99.0.1", 3478)


class Exchange(NamedTuple):
    client: SocketAddress
    request: Message
    response: Message


@pytest.mark.parametrize("session", ["v1-relayed", "v2-relayed"])
def test_every_recorded_request_gets_an_answer_of_the_recorded_kind(session: str) -> None:
    secret = _stamp_secret(session)
    credentials = StampSecret(secret)
    world = World(credentials=credentials, public_ipv4=_RELAY.host, public_ipv6=None, allow=PRIVATE)
    nonces: dict[SocketAddress, str] = {}
    relayed: dict[SocketAddress, SocketAddress] = {}
    kinds = []

    for client, request, recorded in _exchanges(session):
        assert request.raw == _with_nonce(request, request.get(stun.NONCE), credentials, relayed={}), "encoded alike"
        ours = _with_nonce(request, nonces.get(client) if request.get(stun.NONCE) else None, credentials, relayed)
        (sent,) = world.deliver(client, ours, local=_RELAY)
        answer = parsed(sent.datagrams[0])

        assert (answer.method, answer.kind, answer.transaction_id) == (
            recorded.method,
            recorded.kind,
            recorded.transaction_id,
        )
        # We never send SOFTWARE; upstream does not name the missing family.
        assert _names(answer) - {"ADDRESS-ERROR-CODE"} == _names(recorded) - {"SOFTWARE"}
        assert answer.has_integrity == recorded.has_integrity
        username = request.get(stun.USERNAME)
        if username is not None:
            assert answer.is_authentic(credentials.key(username) or b"")
        assert code_of(answer) == code_of(recorded)
        assert answer.get(stun.LIFETIME) == recorded.get(stun.LIFETIME)
        assert answer.get(stun.XOR_MAPPED_ADDRESS) == recorded.get(stun.XOR_MAPPED_ADDRESS)
        nonces[client] = answer.get(stun.NONCE) or nonces.get(client, "")
        if recorded.get(stun.XOR_RELAYED_ADDRESS) is not None:
            relayed[recorded.get(stun.XOR_RELAYED_ADDRESS)] = answer.get(stun.XOR_RELAYED_ADDRESS)
        kinds.append((answer.method, answer.kind))

    assert len(set(kinds)) == 4, kinds  # binding, refused and granted allocations, channels
    assert world.server.allocations == 2
    assert world.server.channels >= 1


def _stamp_secret(session: str) -> str:
    for row in _rows(session):
        if row["at"] == "portal" and row.get("dir") == "in" and "stamp_secret" in json.dumps(row["frame"]):
            frame = row["frame"]
            payload = frame["payload"] if isinstance(frame, dict) else frame[4]
            return str(payload["stamp_secret"])
    raise AssertionError("no stamp secret was recorded")


def _exchanges(session: str) -> Iterator[Exchange]:
    """Requests to the relay's port with the responses to them, in the order of the requests."""
    requests: dict[bytes, tuple[SocketAddress, Message]] = {}
    responses: dict[bytes, Message] = {}
    for row in _rows(session):
        if row["at"] != "relay":
            continue
        for message in _messages(bytes.fromhex(row["data"])):
            if message.kind is Kind.REQUEST and row["dst"] == str(_RELAY):
                requests.setdefault(message.transaction_id, (SocketAddress.parse(row["src"]), message))
            elif row["src"] == str(_RELAY):
                responses.setdefault(message.transaction_id, message)
    for transaction_id, (client, request) in requests.items():
        if transaction_id in responses:
            yield Exchange(client, request, responses[transaction_id])


def _messages(data: bytes) -> Iterator[Message]:
    """Split a recorded datagram: datagrams that left together were recorded in one piece."""
    while len(data) >= stun.HEADER_SIZE:
        size = stun.HEADER_SIZE + int.from_bytes(data[2:4], "big")
        message = stun.parse(data[:size])
        if message is None:
            return
        yield message
        data = data[size:]


def _with_nonce(
    request: Message, nonce: str | None, credentials: StampSecret, relayed: dict[SocketAddress, SocketAddress]
) -> bytes:
    """The request with our own nonce and relayed addresses, signed again."""
    attributes = []
    for attribute, value in request.attributes:
        if attribute == stun.NONCE:
            attributes.append((attribute, nonce))
        elif attribute == stun.XOR_PEER_ADDRESS:
            attributes.append((attribute, relayed.get(value, value)))
        else:
            attributes.append((attribute, value))
    username = request.get(stun.USERNAME)
    key = None if username is None else credentials.key(username)
    return attrs.evolve(request, attributes=tuple(attributes)).encode(key=key)


def _names(message: Message) -> set[str]:
    return {attribute.name for attribute, _ in message.attributes}


def _rows(session: str) -> Iterator[dict]:
    with (_VECTORS / f"{session}.jsonl").open() as lines:
        yield from map(json.loads, lines)


def test_the_recorded_credentials_outlive_the_clock_of_these_tests() -> None:
    for session in ("v1-relayed", "v2-relayed"):
        credentials = StampSecret(_stamp_secret(session))
        names = {exchange.request.get(stun.USERNAME) for exchange in _exchanges(session)} - {None}
        assert names
        assert all(credentials.is_current(name, UTC) for name in names if name is not None)

"""Replays of upstream's sessions: our agent sends the same checks and responses, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from firezone_tunnel.core.ice.agent import Agent, Credentials
from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind, parse_sdp
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, parse
from tests.unit.core.messages.recorded import SESSIONS, candidates, portal_frames, rows

_WITH_ICE = [session for session in SESSIONS if "iceless" not in session.stem]
_HOSTS = {"client": SocketAddress("10.20.1.1", 52625), "gateway": SocketAddress("10.20.2.1", 52625)}
_CASES = [pytest.param(session, role, id=f"{session.stem}-{role}") for session in _WITH_ICE for role in _HOSTS]


@pytest.mark.parametrize(("session", "role"), _CASES)
def test_recorded_checks_are_accepted_and_answered_as_upstream_answered_them(session: Path, role: str) -> None:
    mine, other = _credentials(session, role)
    agent = Agent(controlling=role == "client", local=mine, remote=other, entropy=bytes, now=0.0)
    agent.add_local_candidate(Candidate.host(_HOSTS[role]), 0.0)
    answers = {
        (recorded.message.transaction_id, recorded.source): recorded.message.raw
        for recorded in _ice(session, role, "out", Kind.SUCCESS)
    }
    compared = 0

    for check in _ice(session, role, "in", Kind.REQUEST):
        list(agent.transmits())
        assert agent.handle_message(check.message, check.source, check.destination, check.at)
        answer = next(agent.transmits())
        assert (answer.source, answer.destination) == (check.destination, check.source)
        recorded = answers.get((check.message.transaction_id, check.destination))
        if recorded is not None:
            assert answer.payload == recorded
            compared += 1

    assert compared >= 5
    assert agent.counters.unauthentic == agent.counters.unexpected == agent.counters.role_conflicts == 0


@pytest.mark.parametrize(("session", "role"), _CASES)
def test_our_checks_equal_upstreams_and_its_answers_verify(session: Path, role: str) -> None:
    mine, other = _credentials(session, role)
    answers = {recorded.message.transaction_id: recorded for recorded in _ice(session, role, "in", Kind.SUCCESS)}
    made = nominating = answered = 0

    for check in _ice(session, role, "out", Kind.REQUEST):
        agent, sent = _make_check(role, mine, other, check)
        assert sent == check.message.raw
        made += 1
        nominating += check.message.get(stun.USE_CANDIDATE) is not None
        answer = answers.get(check.message.transaction_id)
        if answer is not None:
            assert agent.handle_message(answer.message, answer.source, answer.destination, 2.0)
            answered += 1
            assert agent.counters.answers_received > 0
        assert agent.counters.unauthentic == agent.counters.unexpected == 0

    assert made >= 5
    assert answered >= made - 2  # the recording ends with some under way
    assert (nominating > 0) == (role == "client")


@pytest.mark.parametrize("session", _WITH_ICE, ids=lambda path: path.stem)
def test_we_would_have_signalled_the_same_candidates(session: Path) -> None:
    compared = 0
    for text in candidates(session):
        signalled = parse_sdp(text)
        assert signalled is not None
        if signalled.kind is CandidateKind.SERVER_REFLEXIVE:  # V1 doesn't add it to its agent, V2 and ours do
            continue
        ours = (
            Candidate.host(signalled.address)
            if signalled.kind is CandidateKind.HOST
            else Candidate.relayed(signalled.address)
        )
        compared += 1

        assert (ours.priority, ours.related) == (signalled.priority, signalled.related)
        assert ours.foundation[:8] == signalled.foundation[:8]
    assert compared >= 4


def test_a_recorded_check_is_not_accepted_with_other_credentials() -> None:
    mine, other = _credentials(_WITH_ICE[0], "client")
    wrong = Credentials(mine.ufrag, mine.password + "x")
    agent = Agent(controlling=True, local=wrong, remote=other, entropy=bytes, now=0.0)
    agent.add_local_candidate(Candidate.host(_HOSTS["client"]), 0.0)
    check = next(_ice(_WITH_ICE[0], "client", "in", Kind.REQUEST))

    assert not agent.handle_message(check.message, check.source, check.destination, 0.0)
    assert agent.counters.unauthentic == 1


class _Recorded(NamedTuple):
    at: float
    source: SocketAddress
    destination: SocketAddress
    message: Message


def _ice(session: Path, at: str, direction: str, kind: Kind) -> Iterator[_Recorded]:
    """The ICE binding messages of a host: messages exchanged with its peer, not with the relay."""
    for row in rows(session):
        if row["at"] != at or row.get("kind") != "stun" or row["dir"] != direction:
            continue
        source, destination = SocketAddress.parse(row["src"]), SocketAddress.parse(row["dst"])
        if 3478 in {source.port, destination.port}:
            continue
        message = parse(bytes.fromhex(row["data"]))
        assert message is not None
        if message.kind is kind:
            yield _Recorded(row["t"], source, destination, message)


def _credentials(session: Path, role: str) -> tuple[Credentials, Credentials]:
    """The credentials of the role, then of its peer."""
    flow: dict[str, Any] = next(
        frame.payload for frame in portal_frames(session) if "client_ice_credentials" in frame.payload
    )
    both = {
        name: Credentials(flow[f"{name}_ice_credentials"]["username"], flow[f"{name}_ice_credentials"]["password"])
        for name in _HOSTS
    }
    return both[role], both["gateway" if role == "client" else "client"]


def _make_check(role: str, mine: Credentials, other: Credentials, check: _Recorded) -> tuple[Agent, bytes]:
    """Make our agent send a recorded check, with the same transaction id, tie-breaker and nomination."""
    is_client = role == "client"
    wanted = check.message.transaction_id
    tie_breaker = check.message.get(stun.ICE_CONTROLLING if is_client else stun.ICE_CONTROLLED)
    assert tie_breaker is not None
    nominating = check.message.get(stun.USE_CANDIDATE) is not None
    serial = count()

    def entropy(size: int) -> bytes:
        number = next(serial)
        if size == 4:
            return wanted[:4]
        if number == 1:
            return tie_breaker.to_bytes(8, "big")
        return bytes(8) if nominating and number == 2 else wanted[4:]

    agent = Agent(controlling=is_client, local=mine, remote=other, entropy=entropy, now=0.0)
    agent.add_local_candidate(Candidate.host(check.source), 0.0)
    agent.add_remote_candidate(Candidate.host(check.destination), 0.0)
    agent.handle_timeout(0.0)
    (transmit,) = agent.transmits()
    if nominating:
        first = parse(transmit.payload)
        assert first is not None
        mapped = (stun.XOR_MAPPED_ADDRESS, check.source)
        answer = Message(stun.Method.BINDING, Kind.SUCCESS, first.transaction_id, (mapped,))
        parsed = parse(answer.encode(key=stun.short_term_key(other.password), fingerprint=True))
        assert parsed is not None
        assert agent.handle_message(parsed, check.destination, check.source, 1.0)
        agent.handle_timeout(1.0)
        (transmit,) = agent.transmits()
    assert (transmit.source, transmit.destination) == (check.source, check.destination)
    return agent, bytes(transmit.payload)

"""Our ICE agent against aioice's, in both roles, over UDP sockets on loopback."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from firezone_tunnel.core.ice.agent import Agent, AgentState, Credentials
from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind, parse_sdp
from firezone_tunnel.core.ice.checklist import DEFAULT_TIMINGS, Schedule, Timings
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import parse
from firezone_tunnel.shell.reactor.clock import boottime

pytest.importorskip("aioice")

_PEER = Path(__file__).with_name("aioice_peer.py")
_PATIENCE = 15.0  # seconds of real time after which a test fails rather than waits
_OURS = Credentials("ours", "ourpassword0123456789ab")
_QUICK = Timings(active=Schedule(0.05, 0.2, 6), idle=DEFAULT_TIMINGS.idle)  # gives up after a second


class _Aioice:
    """The other process."""

    def __init__(self, *, controlling: bool, addresses: list[str], consent_interval: float = 5.0) -> None:
        options = {"controlling": controlling, "addresses": addresses, "consent_interval": consent_interval}
        self._process = subprocess.Popen(
            [sys.executable, str(_PEER), json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.stdout = self._process.stdout
        greeting = self.hear()
        self.credentials = Credentials(greeting["username"], greeting["password"])
        self.candidates: list[str] = greeting["candidates"]

    def tell(self, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        ready, _, _ = select.select([self.stdout], [], [], _PATIENCE)
        assert ready, "aioice says nothing"
        heard: dict[str, Any] = json.loads(self.stdout.readline())
        return heard

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._process.communicate()


class _Us:
    """Our agent on one socket, with the clock that a process of ours has."""

    def __init__(
        self, peer: _Aioice, *, controlling: bool, host: str, remote: Credentials | None = None, timings: Timings
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.address = SocketAddress(host, self.socket.getsockname()[1])
        self.agent = Agent(
            controlling=controlling,
            local=_OURS,
            remote=remote or peer.credentials,
            entropy=os.urandom,
            now=boottime(),
            timings=timings,
        )
        added = self.agent.add_local_candidate(Candidate.host(self.address), boottime())
        assert added is not None
        self.candidate = added.to_sdp()
        self.received: list[bytes] = []
        self.heard: list[dict[str, Any]] = []
        self.is_mute = False
        self._peer = peer

    def learn(self, sdp: str) -> None:
        candidate = parse_sdp(sdp)
        assert candidate is not None
        assert self.agent.add_remote_candidate(candidate, boottime())

    def send(self, data: bytes) -> None:
        path = self.agent.nominated
        assert path is not None
        assert path.source == self.address
        self.socket.sendto(data, path.destination)

    def run_until(self, condition: Callable[[], bool]) -> None:
        end = boottime() + _PATIENCE
        while not condition():
            assert boottime() < end, "what was waited for did not happen"
            self._turn()

    def run(self, seconds: float) -> None:
        end = boottime() + seconds
        while boottime() < end:
            self._turn()

    def _turn(self) -> None:
        for transmit in self.agent.transmits():
            if not self.is_mute:
                self.socket.sendto(bytes(transmit.payload), transmit.destination)
        due = self.agent.next_timeout()
        wait = 0.05 if due is None else min(max(due.at - boottime(), 0.0), 0.05)
        ready, _, _ = select.select([self.socket, self._peer.stdout], [], [], wait)
        if self._peer.stdout in ready and (line := self._peer.stdout.readline()):
            self.heard.append(json.loads(line))
        if self.socket in ready:
            self._receive()
        if due is not None and due.at <= boottime():
            self.agent.handle_timeout(boottime())

    def _receive(self) -> None:
        data, source = self.socket.recvfrom(2048)
        message = parse(data)
        if message is None:
            self.received.append(data)
        elif not self.is_mute:
            self.agent.handle_message(message, SocketAddress(*source[:2]), self.address, boottime())


Start = Callable[..., tuple[_Us, _Aioice]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts both; `controlling` is ours."""
    cleanups: list[Callable[[], None]] = []

    def start_both(
        *,
        controlling: bool,
        host: str = "127.0.0.1",
        consent_interval: float = 5.0,
        timings: Timings = DEFAULT_TIMINGS,
        remote_password: str | None = None,
        told: bool = True,
    ) -> tuple[_Us, _Aioice]:
        peer = _Aioice(controlling=not controlling, addresses=[host], consent_interval=consent_interval)
        cleanups.append(peer.close)
        remote = Credentials(peer.credentials.ufrag, remote_password) if remote_password else None
        us = _Us(peer, controlling=controlling, host=host, remote=remote, timings=timings)
        cleanups.append(us.socket.close)
        if told:
            for candidate in peer.candidates:
                us.learn(candidate)
        peer.tell(username=_OURS.ufrag, password=_OURS.password, candidates=[us.candidate])
        return us, peer

    yield start_both
    for cleanup in reversed(cleanups):
        cleanup()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("controlling", [True, False])
def test_both_agree_on_a_path_and_data_passes_both_ways(start: Start, controlling: bool, host: str) -> None:
    us, peer = start(controlling=controlling, host=host)

    us.run_until(lambda: bool(us.heard) and us.agent.nominated is not None)

    path = us.agent.nominated
    assert path is not None
    assert us.heard == [{"event": "connected", "local": list(path.destination), "remote": list(us.address)}]
    assert [path.remote.to_sdp().split(" ")[4:6]] == [candidate.split(" ")[4:6] for candidate in peer.candidates]
    us.send(b"\xffhello")
    us.run_until(lambda: us.received == [b"\xffhello"])
    assert us.agent.counters.unauthentic == us.agent.counters.unexpected == us.agent.counters.role_conflicts == 0
    assert us.agent.state is AgentState.COMPLETED


@pytest.mark.parametrize("controlling", [True, False])
def test_an_address_that_only_its_checks_told_is_a_path(start: Start, controlling: bool) -> None:
    us, _ = start(controlling=controlling, told=False)

    us.run_until(lambda: bool(us.heard) and us.agent.nominated is not None)

    assert us.heard[0]["event"] == "connected"
    path = us.agent.nominated
    assert path is not None
    assert path.remote.kind is CandidateKind.PEER_REFLEXIVE
    us.send(b"\xffhello")
    us.run_until(lambda: us.received == [b"\xffhello"])


@pytest.mark.parametrize("controlling", [True, False])
def test_consent_is_given_for_as_long_as_both_live_and_ends_when_we_fall_silent(
    start: Start, controlling: bool
) -> None:
    us, _ = start(controlling=controlling, consent_interval=0.1)
    us.run_until(lambda: bool(us.heard) and us.agent.nominated is not None)
    us.run(1.5)  # a dozen questions
    us.send(b"\xffstill here")
    us.run_until(lambda: us.received == [b"\xffstill here"])
    assert [heard["event"] for heard in us.heard] == ["connected"]

    us.is_mute = True

    us.run_until(lambda: [heard["event"] for heard in us.heard] == ["connected", "closed"])


@pytest.mark.parametrize("controlling", [True, False])
def test_we_notice_that_it_is_gone(start: Start, controlling: bool) -> None:
    us, peer = start(controlling=controlling, timings=_QUICK)
    us.run_until(lambda: bool(us.heard) and us.agent.nominated is not None)
    us.run(1.0)
    assert us.agent.nominated is not None

    peer.kill()

    us.run_until(lambda: us.agent.state is AgentState.DISCONNECTED)
    assert us.agent.nominated is None


@pytest.mark.parametrize("controlling", [True, False])
def test_with_a_wrong_password_there_is_no_path(start: Start, controlling: bool) -> None:
    us, _ = start(controlling=controlling, timings=_QUICK, remote_password="wrongpassword012345678")

    us.run_until(lambda: us.agent.state is AgentState.DISCONNECTED)

    assert us.agent.counters.answers_received == 0
    assert us.agent.counters.unauthentic > 0  # its 401 are not signed with what we think is its password
    assert us.agent.nominated is None or not controlling

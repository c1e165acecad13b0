"""The size of a relay (docs/decisions.md, 23), and a flood of allocations from one address."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import select
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key
from tests.service.relay_process import PASSWORD, REALM, USER, RelayProcess, TurnClient, code_of

pytestmark = pytest.mark.serial

ALLOCATIONS = 10_000
MOST_MEMORY = 120 << 20
_AT_ONCE = 128
_DESCRIPTORS = 20_000  # two for each allocation of half of them, and as many for the clients


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Raise the descriptor limit as far as the test itself needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _DESCRIPTORS:
        pytest.skip(f"a process may have {hard} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("descriptors")
def test_two_workers_hold_ten_thousand_idle_dual_stack_allocations_in_120_mb_each(tmp_path: Path) -> None:
    relay = RelayProcess(
        tmp_path, "--workers", "2", "--log-format", "json", "--log-level", "info", "--drain-time", "0s"
    )
    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        relay.wait_ready()
        clients = [
            stack.enter_context(contextlib.closing(_Allocating(relay.port, host)))
            for host in itertools.islice(_hosts(), ALLOCATIONS)  # strangers are counted by address
        ]

        _allocate_all(clients)

        codes = [client.code for client in clients]
        assert codes.count(0) == ALLOCATIONS, {code: codes.count(code) for code in sorted(set(codes))}
        pids = [relay.process.pid, *(event["pid"] for event in relay.events("relay:worker_started"))]
        assert len(pids) == 3
        for pid in pids:
            assert _resident_bytes(pid) < MOST_MEMORY
        sockets = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids[1:]]
        assert sum(sockets) > 2 * ALLOCATIONS
        assert min(sockets) > ALLOCATIONS * 0.8
        relay.signal()
        assert relay.wait(20) == 0


def test_a_flood_of_allocations_from_one_address_ends_at_the_quota_of_its_user(tmp_path: Path) -> None:
    limits = ("--max-allocations-per-user", "20", "--max-allocations", "500")
    relay = RelayProcess(tmp_path, *limits, "--log-format", "json", "--log-level", "info", "--drain-time", "0s")
    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        relay.wait_ready()
        first = TurnClient(relay.port)
        assert code_of(first.allocate()) == 0
        before = _resident_bytes(relay.process.pid)
        flood = [stack.enter_context(contextlib.closing(_Allocating(relay.port, "127.0.0.1"))) for _ in range(300)]

        _allocate_all(flood)

        codes = [client.code for client in flood]
        assert (codes.count(0), codes.count(486)) == (19, 281)
        assert _resident_bytes(relay.process.pid) - before < 8 << 20
        assert code_of(first.request(Method.REFRESH)) == 0


class _Allocating:
    """A client that is about to get an allocation."""

    def __init__(self, relay: int, host: str) -> None:
        self.code: int | None = None
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind((host, 0))
        self.socket.connect(("127.0.0.1", relay))
        self._nonce: str | None = None

    def ask(self) -> None:
        attributes: tuple[tuple[stun.Attribute[Any], Any], ...] = (
            (stun.REQUESTED_TRANSPORT, stun.UDP),
            (stun.ADDITIONAL_ADDRESS_FAMILY, stun.FAMILY_IPV6),
            (stun.USERNAME, USER),
            (stun.REALM, REALM),
        )
        if self._nonce is not None:
            attributes += ((stun.NONCE, self._nonce),)
        self.socket.send(Message(Method.ALLOCATE, Kind.REQUEST, os.urandom(12), attributes).encode(key=_KEY))

    def hear(self) -> None:
        answer = stun.parse(self.socket.recv(2048))
        assert answer is not None
        if code_of(answer) == 401 and self._nonce is None:
            self._nonce = answer.get(stun.NONCE)
            self.ask()
            return
        self.code = code_of(answer)

    def close(self) -> None:
        self.socket.close()


def _allocate_all(clients: Sequence[_Allocating], patience: float = 60.0) -> None:
    """Run some clients at a time, until each has a final answer."""
    poll = select.epoll()
    waiting = {client.socket.fileno(): client for client in clients}
    for descriptor in waiting:
        poll.register(descriptor, select.EPOLLIN)
    remaining, asked = iter(clients), dict[int, _Allocating]()
    deadline = time.monotonic() + patience
    while waiting:
        for client in itertools.islice(remaining, _AT_ONCE - len(asked)):
            asked[client.socket.fileno()] = client
            client.ask()
        ready = poll.poll(0.5)
        for descriptor, _ in ready:
            client = waiting[descriptor]
            client.hear()
            if client.code is not None:
                del waiting[descriptor], asked[descriptor]
        if not ready:  # lost or withheld
            for client in asked.values():
                client.ask()
        assert time.monotonic() < deadline, f"{len(waiting)} of {len(clients)} have no answer"
    poll.close()


def _hosts() -> Iterator[str]:
    return (f"127.1.{third}.{last}" for third in range(256) for last in range(1, 255))


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_KEY = long_term_key(USER, REALM, PASSWORD)

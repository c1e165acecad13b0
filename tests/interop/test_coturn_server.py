"""Our allocation at coturn, on loopback. Our clock can be moved forward; coturn's own time never passes faster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firezone_tunnel.core.ice.candidate import CandidateKind
from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.channel_data import encode_channel_data, parse_channel_data
from firezone_tunnel.core.turn.events import CandidateFound, CandidateLost, Failed, FailureReason
from tests.polling import until
from tests.service.relay_process import free_port

HOST = "127.0.0.1"
USERNAME, PASSWORD, REALM = "alice", "secret", "firezone"
PATIENCE = 8.0

_TURNSERVER = shutil.which("turnserver")

pytestmark = pytest.mark.skipif(_TURNSERVER is None, reason="turnserver (coturn) is not installed")
both_realms = pytest.mark.parametrize("realm", [REALM, None], ids=["as a Firezone relay", "as a standard server"])


@both_realms
def test_an_allocation_comes_up_is_refreshed_used_and_deleted(coturn: Coturn, realm: str | None) -> None:
    with Driver(coturn, realm=realm) as ours, udp_socket() as peer:
        ours.pump_until(lambda: ours.relayed is not None)
        assert [found.kind for found in ours.found] == [
            CandidateKind.HOST,
            CandidateKind.SERVER_REFLEXIVE,
            CandidateKind.RELAYED,
        ]
        assert ours.found[0].address == ours.found[1].address == ours.local

        ours.bind(address_of(peer))
        ours.assert_data_flows(peer)

        ours.answers.clear()
        for _ in range(2):
            ours.advance(300.0)
            ours.assert_data_flows(peer)
        answered = [answer for answer in ours.answers if answer[0] == Method.REFRESH]
        assert answered == [(Method.REFRESH, None)] * 2, "success both times"
        assert (Method.CHANNEL_BIND, None) in ours.answers
        assert [error for _, error in ours.answers if error is not None] == []
        assert ours.lost == []

        deleted = ours.relayed
        assert deleted is not None
        assert not coturn.is_free(deleted)
        ours.close()
        ours.pump_until(lambda: ours.last_lifetime == 0)
        assert ours.allocation.relayed(False) is None
        coturn.wait_until_free(deleted)


@both_realms
def test_what_an_earlier_process_left_on_our_socket_is_replaced(coturn: Coturn, realm: str | None) -> None:
    with Driver(coturn, realm=realm) as ours, udp_socket() as peer:
        ours.pump_until(lambda: ours.relayed is not None)
        before = ours.relayed
        ours.begin()
        ours.pump_until(lambda: ours.relayed is not None)

        assert (Method.ALLOCATE, 437) in ours.answers
        assert ours.relayed != before
        ours.bind(address_of(peer))
        ours.assert_data_flows(peer)


@both_realms
def test_a_stale_nonce_is_replaced_while_data_flows(coturn_with_short_nonces: Coturn, realm: str | None) -> None:
    with Driver(coturn_with_short_nonces, realm=realm) as ours, udp_socket() as peer:
        ours.pump_until(lambda: ours.relayed is not None)
        ours.bind(address_of(peer))
        ours.assert_data_flows(peer)
        ours.probe_until(lambda: (Method.REFRESH, 438) in ours.answers)
        ours.pump_until(lambda: ours.answers[-1] == (Method.REFRESH, None))

        assert ours.lost == []
        ours.assert_data_flows(peer)


def test_an_allocation_that_coturn_forgot_is_replaced(coturn: Coturn) -> None:
    with Driver(coturn, realm=None) as ours:
        ours.pump_until(lambda: ours.relayed is not None)
        before = ours.relayed
        assert before is not None
        coturn.stop()
        coturn.start()
        ours.refresh()
        ours.pump_until(lambda: ours.relayed is not None and ours.relayed != before)

        assert (Method.REFRESH, 437) in ours.answers
        assert [candidate.address for candidate in ours.lost] == [before]


@both_realms
def test_a_wrong_password_is_reported(coturn: Coturn, realm: str | None) -> None:
    with Driver(coturn, realm=realm, password="wrong") as ours:
        ours.pump_until(lambda: len(ours.answers) >= 3)
        ours.advance(9.0)

        assert ours.failed == [FailureReason.NO_AUTHENTIC_RESPONSE]
        assert ours.relayed is None


@pytest.fixture
def coturn(tmp_path: Path) -> Iterator[Coturn]:
    with running(Coturn(tmp_path)) as server:
        yield server


@pytest.fixture
def coturn_with_short_nonces(tmp_path: Path) -> Iterator[Coturn]:
    with running(Coturn(tmp_path, "--stale-nonce=1")) as server:
        yield server


class Coturn:
    """A turnserver in the foreground with one user."""

    def __init__(self, directory: Path, *more: str) -> None:
        self.address = SocketAddress(HOST, free_port())
        self._log = directory / "log"
        assert _TURNSERVER is not None
        self._command = [
            *(_TURNSERVER, "-n", "--log-file", "stdout", "--simple-log", "--pidfile", str(directory / "pid")),
            *("--listening-ip", HOST, "--listening-port", str(self.address.port), "--relay-ip", HOST),
            *("--lt-cred-mech", "--user", f"{USERNAME}:{PASSWORD}", "--realm", REALM),
            *("--userdb", str(directory / "database"), "--no-cli", "--no-tls", "--no-dtls", "--no-tcp", "--no-rfc5780"),
            *("--no-tcp-relay", "--allow-loopback-peers", *more),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        with udp_socket() as probe:
            probe.settimeout(0.05)
            until(lambda: self._answers(probe), "coturn answered", PATIENCE)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def wait_until_free(self, address: SocketAddress) -> None:
        """Block until coturn has closed the socket of an allocation; it takes a second for that."""
        until(lambda: self.is_free(address), "the allocation was closed", PATIENCE)

    def is_free(self, address: SocketAddress) -> bool:
        """Whether nobody has bound this address."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attempt:
            try:
                attempt.bind(address)
            except OSError:
                return False
            return True

    def _answers(self, probe: socket.socket) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        probe.sendto(Message(Method.BINDING, Kind.REQUEST, os.urandom(12)).encode(), self.address)
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            return bool(probe.recv(2048))
        return False


class Driver:
    """Our allocation on a blocking UDP socket."""

    def __init__(self, coturn: Coturn, *, realm: str | None, password: str = PASSWORD) -> None:
        self._coturn = coturn
        self._realm = realm
        self._password = password
        self._socket = udp_socket()
        self._offset = 0.0
        self._sent = 0
        self.local = address_of(self._socket)
        self.begin()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def begin(self) -> None:
        """Be a new process on the same socket."""
        self.answers: list[tuple[int, int | None]] = []
        """Method and error code of each answer."""
        self.last_lifetime: int | None = None
        self.events: list[object] = []
        self.received: list[bytes] = []
        self.allocation = Allocation(
            "coturn",
            ipv4=self._coturn.address,
            ipv6=None,
            username=USERNAME,
            password=self._password,
            realm=self._realm,
            entropy=os.urandom,
            now=self.now,
        )
        self._flush()

    @property
    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self._offset

    @property
    def relayed(self) -> SocketAddress | None:
        return self.allocation.relayed(False)

    @property
    def found(self) -> list[object]:
        return [event.candidate for event in self.events if isinstance(event, CandidateFound)]

    @property
    def lost(self) -> list[object]:
        return [event.candidate for event in self.events if isinstance(event, CandidateLost)]

    @property
    def failed(self) -> list[FailureReason]:
        return [event.reason for event in self.events if isinstance(event, Failed)]

    def bind(self, peer: SocketAddress) -> None:
        self.allocation.bind_channel(peer, self.now)
        self._flush()

    def refresh(self) -> None:
        self.allocation.refresh(self.now)
        self._flush()

    def close(self) -> None:
        farewell = self.allocation.close()
        assert farewell is not None
        self._socket.sendto(farewell.payload, farewell.destination)

    def assert_data_flows(self, peer: socket.socket) -> None:
        """Both ways over the channel to this peer."""
        address = address_of(peer)
        channel = self.allocation.channel_to(address, self.now)
        assert channel is not None
        self._socket.sendto(encode_channel_data(channel, b"ping"), self._coturn.address)
        self.allocation.sent_channel_data(self.now)
        payload, source = peer.recvfrom(2048)
        assert (payload, SocketAddress(*source)) == (b"ping", self.relayed)
        # Its answer to our bind may still be on the way, and before it nothing is received.
        self.pump_until(lambda: self.allocation.peer_of(channel, self.now) == address)
        peer.sendto(b"pong", source)
        self.pump_until(lambda: self.received == [b"pong"])
        self.received.clear()

    def probe_until(self, condition: Callable[[], bool]) -> None:
        """Ask again and again whether the allocation is still known."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            self.refresh()
            answered = len(self.answers)
            self.pump_until(lambda before=answered: len(self.answers) > before)

    def pump_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"coturn did not do what it should: {self.answers}"
            self._serve_timers()
            self._receive(min(remaining, 0.02))

    def advance(self, seconds: float) -> None:
        """Move our clock; at every timer on the way, wait for the answers to what we sent."""
        end = self.now + seconds
        while (timeout := self.allocation.next_timeout()) is not None and timeout.at <= end:
            self._offset += max(0.0, timeout.at - self.now)
            expected = len(self.answers) - self._sent
            self._serve_timers()
            self.pump_until(lambda missing=expected: len(self.answers) - self._sent >= missing)
        self._offset += max(0.0, end - self.now)

    def _serve_timers(self) -> None:
        timeout = self.allocation.next_timeout()
        if timeout is not None and timeout.at <= self.now:
            self.allocation.handle_timeout(self.now)
            self._flush()

    def _receive(self, patience: float) -> None:
        self._socket.settimeout(patience)
        try:
            datagram, source = self._socket.recvfrom(2048)
        except (TimeoutError, ConnectionRefusedError):
            return
        data = parse_channel_data(Rows.single(memoryview(datagram)), exact=True)
        if data is not None:
            assert self.allocation.peer_of(data.number, self.now) is not None
            self.received.append(bytes(data.payloads.row(0)))
            return
        message = stun.parse(datagram)
        assert message is not None
        error = message.get(stun.ERROR_CODE)
        self.answers.append((message.method, None if error is None else error.code))
        self.last_lifetime = message.get(stun.LIFETIME)
        self.allocation.handle_message(message, SocketAddress(*source), self.local, self.now)
        self._flush()

    def _flush(self) -> None:
        for transmit in self.allocation.transmits():
            self._socket.sendto(transmit.payload, transmit.destination)
            self._sent += 1
        self.events += self.allocation.events()


@contextlib.contextmanager
def running(server: Coturn) -> Iterator[Coturn]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


def udp_socket() -> socket.socket:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.settimeout(PATIENCE)
    udp.bind((HOST, 0))
    return udp


def address_of(udp: socket.socket) -> SocketAddress:
    return SocketAddress(*udp.getsockname())

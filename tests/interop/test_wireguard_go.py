"""Our WireGuard against wireguard-go, in a network namespace of its own.

Our side is a `Peer` on a plain UDP socket whose clock can be moved forward; time never passes faster for the other.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.wireguard.cookie import CookieChecker
from firezone_tunnel.core.wireguard.handshake import (
    CookieReply,
    HandshakeInitiation,
    HandshakeResponse,
    StaticKey,
    open_static,
)
from firezone_tunnel.core.wireguard.peer import Expired, Peer, SessionEstablished
from firezone_tunnel.core.wireguard.session import Session
from tests.polling import until

THEIR_ADDRESS, OUR_ADDRESS = "10.111.0.1", "10.111.0.2"
INNER_PORT = 7000
PATIENCE = 8.0
INITIATION_INTERVAL = 0.04  # wireguard-go ignores more than 50 a second, and its timestamps stand still for 2^24 ns
PRESHARED_KEYS = [bytes(32), bytes(range(1, 33))]

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root"),
    *[
        pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")
        for name in ("wireguard-go", "wg", "ip")
    ],
]


@pytest.mark.parametrize("preshared_key", PRESHARED_KEYS, ids=["without PSK", "with PSK"])
def test_we_initiate(tunnel: Tunnel) -> None:
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 1)

    tunnel.assert_traffic_flows()
    assert tunnel.ours.peer.counters.initiations_sent == 1
    assert tunnel.ours.initiations_received == 0, "our keepalive confirmed the session"


@pytest.mark.parametrize("preshared_key", PRESHARED_KEYS, ids=["without PSK", "with PSK"])
def test_it_initiates(tunnel: Tunnel) -> None:
    tunnel.theirs.send(b"first")
    tunnel.ours.pump_until(lambda: tunnel.ours.received == [b"first"])

    tunnel.assert_traffic_flows()
    assert tunnel.ours.peer.counters.responses_sent == 1
    assert tunnel.ours.peer.counters.initiations_sent == 0


def test_another_preshared_key_establishes_nothing(tunnel: Tunnel) -> None:
    tunnel.theirs.set_peer(preshared_key=b"\7" * 32)
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.peer.counters.responses_rejected == 1)

    assert tunnel.ours.established == 0


def test_we_renew_the_session_twice(tunnel: Tunnel) -> None:
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 1)
    for renewals in (1, 2):
        delayed = tunnel.ours.seal(b"delayed")
        tunnel.ours.pump_past_initiation_limit()
        tunnel.ours.clock_offset += 120.0
        tunnel.ours.send(b"due")
        assert tunnel.theirs.receive() == b"due"
        tunnel.ours.pump_until(lambda expected=1 + renewals: tunnel.ours.established == expected)

        tunnel.assert_traffic_flows()
        tunnel.ours.transmit(delayed)
        assert tunnel.theirs.receive() == b"delayed", "the previous session still receives"

    assert tunnel.ours.initiations_received == 0


def test_both_renew_in_turn(tunnel: Tunnel) -> None:
    tunnel.theirs.send(b"theirs")
    tunnel.ours.pump_until(lambda: tunnel.ours.received == [b"theirs"])

    tunnel.ours.pump_past_initiation_limit()
    tunnel.ours.clock_offset += 180.0  # the session is dead for us: as its responder we begin one of our own
    tunnel.ours.send(b"ours")
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 2)
    assert tunnel.theirs.receive() == b"ours"
    tunnel.assert_traffic_flows()

    tunnel.theirs.forget_peer()
    tunnel.theirs.set_peer(preshared_key=tunnel.preshared_key)
    tunnel.ours.pump_past_initiation_limit()
    tunnel.theirs.send(b"theirs again")
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 3)
    tunnel.assert_traffic_flows()

    tunnel.ours.pump_past_initiation_limit()
    tunnel.ours.clock_offset += 180.0
    tunnel.ours.send(b"ours again")
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 4)
    assert tunnel.theirs.receive() == b"ours again"
    tunnel.assert_traffic_flows()
    assert not tunnel.ours.expired


def test_both_initiate_at_once(tunnel: Tunnel) -> None:
    tunnel.theirs.send(b"theirs")
    tunnel.ours.wait_for_datagram()
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.received == [b"theirs"])

    tunnel.assert_traffic_flows()


def test_empty_messages_are_keepalives_both_ways(tunnel: Tunnel) -> None:
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 1)
    tunnel.theirs.send(b"unanswered")
    tunnel.ours.pump_until(lambda: tunnel.ours.received == [b"unanswered"])

    received_before = tunnel.theirs.bytes_received()
    tunnel.ours.clock_offset += 10.0
    tunnel.ours.pump_until(lambda: tunnel.theirs.bytes_received() == received_before + 32)
    tunnel.theirs.set_peer(preshared_key=tunnel.preshared_key, persistent_keepalive=1)
    tunnel.ours.pump_until(lambda: tunnel.ours.keepalives_received >= 2)

    assert tunnel.ours.received == [b"unanswered"]


def test_our_messages_may_arrive_out_of_order_but_only_once(tunnel: Tunnel) -> None:
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 1)
    sealed = [tunnel.ours.seal(b"%d" % number) for number in range(5)]
    for number in (4, 1, 1, 0, 4, 3, 2):
        tunnel.ours.transmit(sealed[number])
    tunnel.ours.send(b"end")

    assert [tunnel.theirs.receive() for _ in range(6)] == [b"4", b"1", b"0", b"3", b"2", b"end"]


def test_its_messages_may_arrive_out_of_order_but_only_once(tunnel: Tunnel) -> None:
    tunnel.ours.initiate()
    tunnel.ours.pump_until(lambda: tunnel.ours.established == 1)
    captured: list[bytes] = []
    for number in range(5):
        tunnel.theirs.send(b"%d" % number)
        captured.append(tunnel.ours.wait_for_datagram())
        tunnel.ours.held.clear()
    for number in (4, 1, 1, 0, 4, 3, 2):
        tunnel.ours.handle(captured[number])

    assert tunnel.ours.received == [b"4", b"1", b"0", b"3", b"2"]
    assert tunnel.ours.peer.counters.replayed == 2


@pytest.fixture
def preshared_key() -> bytes:
    return PRESHARED_KEYS[1]


@pytest.fixture
def tunnel(preshared_key: bytes, tmp_path: Path) -> Iterator[Tunnel]:
    with contextlib.ExitStack() as stack:
        name = f"fzwg{os.getpid()}n{next(_numbers)}"
        stack.enter_context(namespace(name))
        yield Tunnel(stack, name, preshared_key, tmp_path)


class Tunnel:
    def __init__(self, stack: contextlib.ExitStack, name: str, preshared_key: bytes, state: Path) -> None:
        self.preshared_key = preshared_key
        outer = stack.enter_context(socket_in(name, "127.0.0.1"))
        local, remote = StaticKey.generate(os.urandom), StaticKey.generate(os.urandom)
        self.theirs = WireGuardGo(name, remote, local.public, outer.getsockname(), state)
        self.theirs.start(stack)
        self.theirs.set_peer(preshared_key=preshared_key)
        outer.connect(("127.0.0.1", self.theirs.listening_port()))
        self.ours = Driver(outer, local, remote.public, preshared_key)
        stack.callback(self.ours.peer.close)

    def assert_traffic_flows(self) -> None:
        self.ours.send(b"ping")
        assert self.theirs.receive() == b"ping"
        self.theirs.send(b"pong")
        self.ours.pump_until(lambda: self.ours.received[-1:] == [b"pong"])
        self.ours.received.clear()


class Driver:
    """Our peer on a connected UDP socket."""

    def __init__(self, outer: socket.socket, local: StaticKey, remote_public_key: bytes, preshared_key: bytes) -> None:
        self.clock_offset = 0.0
        self.established = 0
        self.expired: list[Expired] = []
        self.received: list[bytes] = []
        self.held: list[bytes] = []
        self.initiations_received = 0
        self.keepalives_received = 0
        self._outer = outer
        self._local = local
        self._cookie_checker = CookieChecker(local, os.urandom)
        self._waiting: list[bytes] = []
        self._indices: set[int] = set()
        indices = count(0x01020304)
        self.peer = Peer(
            local=local,
            remote_public_key=remote_public_key,
            preshared_key=preshared_key,
            allocate_index=lambda peer: next(indices),
            release_index=lambda index: None,
            entropy=os.urandom,
            now=self.now,
        )

    @property
    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self.clock_offset

    def initiate(self) -> None:
        self.peer.initiate(self.now, time.time())
        self._flush()

    def send(self, payload: bytes) -> None:
        """Send a packet now, or as soon as there is a session."""
        self._waiting.append(payload)
        self._flush()

    def seal(self, payload: bytes) -> bytes:
        session = self.peer.sending_session(self.now)
        assert session is not None
        return self._seal(session, payload)

    def transmit(self, datagram: bytes) -> None:
        self._outer.send(datagram)

    def wait_for_datagram(self) -> bytes:
        """Receive one without looking at it yet."""
        self._outer.settimeout(PATIENCE)
        self.held.append(self._outer.recv(2048))
        return self.held[-1]

    def pump_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            remaining = deadline - time.monotonic()
            assert remaining > 0, "the other side did not do what it should"
            timeout = self.peer.next_timeout()
            due_in = PATIENCE if timeout is None else timeout.at - self.now
            if due_in <= 0:
                self.peer.handle_timeout(self.now, time.time())
            elif self.held:
                self.handle(self.held.pop(0))
            else:
                self._outer.settimeout(max(0.001, min(remaining, due_in, 0.02)))
                with contextlib.suppress(TimeoutError):
                    self.handle(self._outer.recv(2048))
            self._flush()

    def pump_past_initiation_limit(self) -> None:
        """Go on until wireguard-go would make, and take, another initiation."""
        end = time.monotonic() + INITIATION_INTERVAL
        self.pump_until(lambda: time.monotonic() >= end)

    def handle(self, datagram: bytes) -> None:
        if datagram[0] == 4:
            self._handle_data(datagram)
            return
        match self._cookie_checker.admit(datagram, SocketAddress(*self._outer.getpeername()), self.now):
            case HandshakeInitiation() as message:
                assert open_static(self._local, message) == self.peer.remote_public_key
                self.initiations_received += 1
                assert self.peer.handle_initiation(message, self.now)
            case HandshakeResponse() as message:
                self.peer.handle_response(message, self.now)
            case CookieReply() as message:
                assert self.peer.handle_cookie_reply(message, self.now)
            case unexpected:
                pytest.fail(f"the other side sent {unexpected!r}")

    def _handle_data(self, datagram: bytes) -> None:
        index, counter = struct.unpack_from("<IQ", datagram, 4)
        session = self.peer.receiving_session(index, self.now)
        if session is None:
            return
        packet = session.open_cipher.decrypt(struct.pack("<4xQ", counter), datagram[16:], None)
        if not session.accept([counter], [True]).all():
            return
        self.peer.received_data(session, len(packet), self.now)
        if packet:
            self.received.append(bytes(IP(packet)[UDP].payload)[: IP(packet)[UDP].len - 8])
        else:
            self.keepalives_received += 1

    def _flush(self) -> None:
        for event in self.peer.events():
            if isinstance(event, SessionEstablished):
                self.established += 1
            else:
                self.expired.append(event)
        for datagram in self.peer.transmits():
            self.transmit(datagram)
        while self._waiting and (session := self.peer.sending_session(self.now)):
            self.transmit(self._seal(session, self._waiting.pop(0)))
            self.peer.sent_data(session, 1, self.now)

    def _seal(self, session: Session, payload: bytes) -> bytes:
        packet = bytes(IP(src=OUR_ADDRESS, dst=THEIR_ADDRESS) / UDP(sport=INNER_PORT, dport=INNER_PORT) / payload)
        counter = session.take_counters(1)
        header = struct.pack("<IIQ", 4, session.peer_index, counter)
        return header + session.seal_cipher.encrypt(struct.pack("<4xQ", counter), packet, None)


class WireGuardGo:
    """The other side: a wireguard-go with one peer, and a UDP socket that speaks through its tunnel."""

    def __init__(
        self, name: str, key: StaticKey, peer_public_key: bytes, endpoint: tuple[str, int], state: Path
    ) -> None:
        self._name = name
        self._key = key
        self._peer = base64.b64encode(peer_public_key).decode()
        self._endpoint = "{}:{}".format(*endpoint)
        self._state = state

    def start(self, stack: contextlib.ExitStack) -> None:
        control = Path("/var/run/wireguard", f"{self._name}.sock")
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._name, "wireguard-go", "--foreground", self._name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(control.unlink, missing_ok=True)
        stack.callback(stop, process)
        until(control.exists, "wireguard-go had a control socket", PATIENCE)
        self._wg("set", self._name, "private-key", self._file("private", bytes(self._key.private)))
        run("ip", "-n", self._name, "address", "add", f"{THEIR_ADDRESS}/24", "dev", self._name)
        run("ip", "-n", self._name, "link", "set", self._name, "up", "mtu", "1280")
        self._inner = stack.enter_context(socket_in(self._name, THEIR_ADDRESS, INNER_PORT))
        self._inner.settimeout(PATIENCE)

    def set_peer(self, *, preshared_key: bytes, persistent_keepalive: int = 0) -> None:
        self._wg(
            *("set", self._name, "peer", self._peer, "preshared-key", self._file("preshared", preshared_key)),
            *("allowed-ips", f"{OUR_ADDRESS}/32", "endpoint", self._endpoint),
            *("persistent-keepalive", str(persistent_keepalive)),
        )

    def forget_peer(self) -> None:
        self._wg("set", self._name, "peer", self._peer, "remove")

    def listening_port(self) -> int:
        return int(self._wg("show", self._name, "listen-port"))

    def bytes_received(self) -> int:
        return int(self._wg("show", self._name, "transfer").split()[1])

    def send(self, payload: bytes) -> None:
        self._inner.sendto(payload, (OUR_ADDRESS, INNER_PORT))

    def receive(self) -> bytes:
        return self._inner.recv(2048)

    def _wg(self, *arguments: str) -> str:
        return run("ip", "netns", "exec", self._name, "wg", *arguments)

    def _file(self, name: str, key: bytes) -> str:
        path = self._state / name
        path.write_bytes(base64.b64encode(key))
        return str(path)


@contextlib.contextmanager
def namespace(name: str) -> Iterator[None]:
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        run("ip", "netns", "delete", name)


def socket_in(name: str, host: str, port: int = 0) -> socket.socket:
    """A UDP socket belongs to the namespace of the thread that makes it, whoever uses it later."""
    made: list[socket.socket | OSError] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", name).open() as handle:
            if libc.setns(handle.fileno(), 0) != 0:
                made.append(OSError(ctypes.get_errno(), f"setns to {name}"))
                return
        try:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind((host, port))
            made.append(udp)
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


_numbers = count()

"""A relay as a process of its own on loopback, and a TURN client with an ordinary socket."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key

_ROOT = Path(__file__).parents[2]
USER, PASSWORD, REALM = "alice", "secret", "firezone"
PATIENCE = 5.0
RETRANSMISSION = 0.5
_FIRST_EPHEMERAL_PORT = 32_768  # net.ipv4.ip_local_port_range; allocations begin at 49152


class RelayProcess:
    """`twistd firezone-relay`, serving alice on 127.0.0.1 (and ::1)."""

    def __init__(self, directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        users = directory / "users"
        users.write_text(f"# for tests\n{USER}:{PASSWORD}\n")
        users.chmod(0o600)
        self.port = free_port()
        self.log = directory / "relay.log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))
        self._notify.settimeout(20)
        common = ["--users-file", str(users), "--listen-port", str(self.port), "--health-check-addr", "off"]
        common += ["--public-ip4-addr", "127.0.0.1", "--public-ip6-addr", "::1", "--allow-peers", "127.0.0.0/8"]
        twistd = [str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=", "firezone-relay"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*twistd, *common, "--log-level", "debug", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONPATH": str(_ROOT),
                    "NOTIFY_SOCKET": str(directory / "notify"),
                    **(environment or {}),
                },
            )

    def wait_ready(self) -> None:
        assert self._notify.recv(64) == b"READY=1", self.log.read_text()

    def events(self, message_type: str, **fields: Any) -> list[dict[str, Any]]:
        """The messages of this type and with these fields that it has logged. Requires `--log-format json`."""
        lines = self.log.read_text().splitlines(keepends=True)
        messages = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]
        return [message for message in messages if {**message, "message_type": message_type, **fields} == message]

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait_stopping(self) -> None:
        assert self._notify.recv(64) == b"STOPPING=1"

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._notify.close()


class TurnClient:
    """A blocking client with its own socket."""

    def __init__(self, relay: int, *, host: str = "127.0.0.1", username: str = USER, password: str = PASSWORD) -> None:
        self.socket = udp(host)
        self.socket.connect((host, relay))
        self._username = username
        self._key = long_term_key(username, REALM, password)
        self._nonce: str | None = None

    def request(self, method: int, *attributes: tuple[stun.Attribute[Any], Any]) -> Message:
        """Send a request, and repeat it if the nonce was missing. Every answer must be signed."""
        answer = self._ask(method, *attributes)
        if self._nonce is None:
            assert code_of(answer) == 401
            self._nonce = answer.get(stun.NONCE)
            answer = self._ask(method, *attributes)
        return answer

    def allocate(self, *attributes: tuple[stun.Attribute[Any], Any]) -> Message:
        return self.request(Method.ALLOCATE, (stun.REQUESTED_TRANSPORT, stun.UDP), *attributes)

    def allocate_dual(self) -> list[SocketAddress]:
        answer = self.allocate((stun.ADDITIONAL_ADDRESS_FAMILY, stun.FAMILY_IPV6))
        assert code_of(answer) == 0
        return answer.get_all(stun.XOR_RELAYED_ADDRESS)

    def bind(self, number: int, peer: SocketAddress) -> Message:
        return self.request(Method.CHANNEL_BIND, (stun.CHANNEL_NUMBER, number), (stun.XOR_PEER_ADDRESS, peer))

    def _ask(self, method: int, *attributes: tuple[stun.Attribute[Any], Any]) -> Message:
        credentials: tuple[tuple[stun.Attribute[Any], Any], ...] = (
            (stun.USERNAME, self._username),
            (stun.REALM, REALM),
        )
        if self._nonce is not None:
            credentials += ((stun.NONCE, self._nonce),)
        request = Message(method, Kind.REQUEST, os.urandom(12), (*attributes, *credentials))
        answer = stun.parse(self._exchange(request.encode(key=self._key)))
        assert answer is not None
        assert answer.transaction_id == request.transaction_id
        assert answer.is_authentic(self._key)
        return answer

    def _exchange(self, request: bytes) -> bytes:
        """Repeat the request until there is an answer: answers to strangers are limited per second."""
        self.socket.settimeout(RETRANSMISSION)
        try:
            for _ in range(round(PATIENCE / RETRANSMISSION)):
                self.socket.send(request)
                with contextlib.suppress(TimeoutError):
                    while (answer := self.socket.recv(2048))[8:20] != request[8:20]:
                        pass  # a second answer, to a repeated request
                    return answer
        finally:
            self.socket.settimeout(PATIENCE)
        raise TimeoutError("the relay doesn't answer")


def code_of(message: Message) -> int:
    error = message.get(stun.ERROR_CODE)
    return 0 if error is None else error.code


def udp(host: str, port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.settimeout(PATIENCE)
    return sock


def address_of(sock: socket.socket) -> SocketAddress:
    return SocketAddress(*sock.getsockname()[:2])


def free_port() -> int:
    """Return a free port. The kernel never picks it for a socket that asks for any port, such as another test's."""
    while True:
        port = random.randrange(10_000, _FIRST_EPHEMERAL_PORT)
        with contextlib.suppress(OSError), udp("127.0.0.1", port):
            return port

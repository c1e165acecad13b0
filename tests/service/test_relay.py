"""The relay with real sockets: batches both ways, taken ports, limits, and shutdown."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Method
from tests.polling import until
from tests.service.relay_process import RelayProcess, TurnClient, address_of, code_of, free_port, udp

_UDP_SEGMENT, _UDP_GRO = 103, 104  # <linux/udp.h>
_PEER = "127.0.0.3"  # an address that no interface has, and so not the relay's own

Start = Callable[..., RelayProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> RelayProcess:
            relay = RelayProcess(tmp_path, *arguments)
            stack.callback(relay.close)
            return relay

        yield start


@pytest.fixture
def relay(start: Start) -> RelayProcess:
    relay = start("--lowest-port", "50000", "--highest-port", "50999")
    relay.wait_ready()
    return relay


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_data_passes_both_ways_over_either_family(relay: RelayProcess, host: str) -> None:
    client, peer = TurnClient(relay.port, host=host), udp(_PEER)
    relayed = client.allocate_dual()
    assert [address.host for address in relayed] == ["127.0.0.1", "::1"]
    assert code_of(client.bind(0x4000, address_of(peer))) == 0

    client.socket.send(b"\x40\x00\x00\x04ping")
    ping, source = peer.recvfrom(100)
    peer.sendto(b"pong", relayed[0])

    assert (ping, SocketAddress(*source)) == (b"ping", relayed[0])
    assert client.socket.recv(100) == b"\x40\x00\x00\x04pong"


def test_a_batch_stays_a_batch_through_the_relay_in_both_directions(relay: RelayProcess) -> None:
    client, peer = TurnClient(relay.port), udp(_PEER)
    relayed = client.allocate_dual()
    client.bind(0x4000, address_of(peer))
    payloads = [bytes([number]) * 1312 for number in range(40)] + [b"last"]
    framed = [struct.pack("!HH", 0x4000, len(payload)) + payload for payload in payloads]
    for receiver in (client.socket, peer):
        # Before anything is sent: earlier datagrams would be delivered one at a time.
        receiver.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)

    _send_segmented(client.socket, b"".join(framed), 1316)
    assert _receive_batch(peer) == (b"".join(payloads), 1312)
    peer.connect(relayed[0])
    _send_segmented(peer, b"".join(payloads), 1312)
    assert _receive_batch(client.socket) == (b"".join(framed), 1316)


def test_neighbours_talk_without_the_kernel(relay: RelayProcess) -> None:
    first, second = TurnClient(relay.port), TurnClient(relay.port, host="::1")
    (_, first6), (_, second6) = first.allocate_dual(), second.allocate_dual()
    first.bind(0x4000, second6)
    second.bind(0x4001, first6)

    first.socket.send(b"\x40\x00\x00\x05hello")

    assert second.socket.recv(100) == b"\x40\x01\x00\x05hello"


def test_the_relay_relays_neither_to_itself_nor_to_the_host(relay: RelayProcess) -> None:
    client = TurnClient(relay.port)
    client.allocate_dual()

    assert code_of(client.bind(0x4000, SocketAddress("127.0.0.1", relay.port))) == 403
    assert code_of(client.bind(0x4000, SocketAddress("::1", 22))) == 403
    assert code_of(client.bind(0x4000, SocketAddress("10.0.0.1", 22))) == 403


def test_send_and_data_indications_with_dont_fragment(relay: RelayProcess) -> None:
    client, peer = TurnClient(relay.port), udp(_PEER)
    client.allocate((stun.DONT_FRAGMENT, True))
    assert code_of(client.request(Method.CREATE_PERMISSION, (stun.XOR_PEER_ADDRESS, address_of(peer)))) == 0
    attributes = ((stun.XOR_PEER_ADDRESS, address_of(peer)), (stun.DATA, b"ping"), (stun.DONT_FRAGMENT, True))

    client.socket.send(stun.Message(Method.SEND, stun.Kind.INDICATION, bytes(12), attributes).encode())
    ping, relayed = peer.recvfrom(100)
    peer.sendto(b"pong", relayed)

    assert ping == b"ping"
    indication = stun.parse(client.socket.recv(200))
    assert indication is not None
    assert indication.get(stun.DATA) == b"pong"


@pytest.mark.serial  # another test's socket could have one of the three ports
def test_a_taken_port_is_not_used_and_exhausted_ports_are_508(start: Start) -> None:
    relay = start("--lowest-port", "51000", "--highest-port", "51002")
    relay.wait_ready()
    with udp("127.0.0.1", 51000), udp("::1", 51002):
        first, second = TurnClient(relay.port), TurnClient(relay.port)

        assert [address.port for address in first.allocate_dual()] == [51001, 51001]
        answer = second.allocate((stun.ADDITIONAL_ADDRESS_FAMILY, stun.FAMILY_IPV6))

        assert code_of(answer) == 508
    assert code_of(first.request(Method.REFRESH)) == 0


def test_at_the_descriptor_limit_it_answers_508_and_serves_on(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    relay = start("--lowest-port", "52000", "--highest-port", "52999")
    resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (70, 70))  # before it looks: it is still importing
    relay.wait_ready()
    clients = [TurnClient(relay.port) for _ in range(4)]

    codes = [code_of(client.allocate((stun.ADDITIONAL_ADDRESS_FAMILY, stun.FAMILY_IPV6))) for client in clients]

    assert codes == [0, 0, 0, 508]
    assert code_of(clients[0].request(Method.REFRESH, (stun.LIFETIME, 0))) == 0
    assert len(clients[3].allocate_dual()) == 2
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_allocations_a_signal_ends_it_at_once_with_0(relay: RelayProcess, number: signal.Signals) -> None:
    relay.signal(number)

    assert relay.wait() == 0


def test_it_serves_its_clients_until_the_last_has_gone(relay: RelayProcess) -> None:
    client, peer = TurnClient(relay.port), udp(_PEER)
    client.allocate()
    client.bind(0x4000, address_of(peer))

    relay.signal()
    relay.wait_stopping()

    until(lambda: "relay:draining" in relay.log.read_text())
    client.socket.send(b"\x40\x00\x00\x04ping")
    assert peer.recv(100) == b"ping"
    assert code_of(TurnClient(relay.port).allocate()) == 508
    assert relay.process.poll() is None
    client.request(Method.REFRESH, (stun.LIFETIME, 0))
    assert relay.wait() == 0


def test_a_second_signal_ends_it_at_once(relay: RelayProcess) -> None:
    TurnClient(relay.port).allocate()
    relay.signal()
    until(lambda: "relay:draining" in relay.log.read_text())

    relay.signal()

    assert relay.wait() == 0


def test_after_the_drain_time_it_ends(start: Start) -> None:
    relay = start("--drain-time", "1s")
    relay.wait_ready()
    TurnClient(relay.port).allocate()

    relay.signal()

    assert relay.wait() == 0
    assert "relay:drained" in relay.log.read_text()


def test_an_occupied_listening_port_is_reported_and_ends_it_with_1(start: Start, tmp_path: Path) -> None:
    with udp("0.0.0.0", free_port()) as occupier:
        relay = start("--listen-port", str(address_of(occupier).port))

        assert relay.wait(20) == 1

    assert "firezone-relay: Cannot open a UDP socket" in relay.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--listen-port", "0"), 2, "--listen-port"),
        (("--allow-peers", "10.0.0.1/8"), 2, "--allow-peers"),
        (("--lowest-port", "9", "--highest-port", "8"), 1, "--lowest-port"),
        (
            ("--listen-port", "50000"),
            1,
            "--listen-port must lie outside the range from --lowest-port to --highest-port",
        ),
        (("--users-file", "/nonexistent"), 1, "/nonexistent"),
    ],
)
def test_an_invalid_configuration_is_reported_in_one_line(
    start: Start, arguments: tuple[str, ...], code: int, text: str
) -> None:
    relay = start(*arguments)

    assert relay.wait(20) == code
    assert text in relay.log.read_text().splitlines()[-1]


def test_a_refused_private_peer_is_logged_with_its_network_and_the_way_out(start: Start) -> None:
    relay = start("--drain-time", "0s", "--log-level", "info")
    relay.wait_ready()
    client = TurnClient(relay.port)
    client.allocate_dual()
    for host in ("10.77.0.1", "10.77.0.2", "127.0.0.1"):
        assert code_of(client.bind(0x4000, SocketAddress(host, 22))) == 403
    relay.signal()
    assert relay.wait() == 0

    (line,) = [line for line in relay.log.read_text().splitlines() if "relay:private_peers_refused" in line]
    assert "network=10.0.0.0/8 times=2" in line
    assert "--allow-peers 10.0.0.0/8" in line
    assert "10.77" not in relay.log.read_text()


def test_another_user_can_not_change_an_allocation(start: Start, tmp_path: Path) -> None:
    """RFC 8656, 5: from the same address, too."""
    users = tmp_path / "two"
    users.write_text("alice:secret\nbob:builder\n")
    users.chmod(0o600)
    relay = start("--users-file", str(users), "--lowest-port", "50000", "--highest-port", "50999")
    relay.wait_ready()
    alice = TurnClient(relay.port)
    bob = TurnClient(relay.port, username="bob", password="builder")
    alice.allocate_dual()
    bob.socket.close()
    bob.socket = alice.socket

    assert code_of(bob.request(Method.REFRESH, (stun.LIFETIME, 0))) == 441
    assert code_of(bob.bind(0x4000, SocketAddress(_PEER, 9))) == 441
    assert code_of(alice.request(Method.REFRESH, (stun.LIFETIME, 600))) == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o700])
def test_a_users_file_that_others_could_read_is_refused(start: Start, tmp_path: Path, mode: int) -> None:
    users = tmp_path / "shared"
    users.write_text("bob:builder\n")
    users.chmod(mode)

    relay = start("--users-file", str(users))

    assert relay.wait(20) == 1
    assert f"The users file {users} must belong to the user" in relay.log.read_text().splitlines()[-1]
    assert "builder" not in relay.log.read_text()


def test_its_log_names_no_secret(start: Start) -> None:
    relay = start("--log-format", "json", "--drain-time", "0s")
    relay.wait_ready()
    TurnClient(relay.port).allocate()
    relay.signal()
    assert relay.wait() == 0

    text = relay.log.read_text()
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert {event["message_type"] for event in events} >= {"relay:listening", "relay:ready", "relay:stopped"}
    first = next(event for event in events if event["level"] == "info")
    assert (first["message_type"], first["role"], first["port"]) == ("service:started", "relay", relay.port)
    assert "secret" not in text


def _send_segmented(sock: socket.socket, data: bytes, size: int) -> None:
    sock.sendmsg([data], [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", size))])


def _receive_batch(sock: socket.socket) -> tuple[bytes, int]:
    """The datagrams received together, and the size of each."""
    data, ancillary, _, _ = sock.recvmsg(65_536, 64)
    sizes = [struct.unpack("=I", value)[0] for _, kind, value in ancillary if kind == _UDP_GRO]
    return data, sizes[0] if sizes else len(data)

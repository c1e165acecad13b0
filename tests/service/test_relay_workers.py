"""A relay of several processes on one port: clients stay with their worker, and workers fail independently."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Method
from tests.polling import until
from tests.service.relay_process import RelayProcess, TurnClient, address_of, code_of, free_port, udp

_PEER = "127.0.0.3"
_LOWEST, _HIGHEST = 55_000, 55_999
_MIDDLE = 55_500  # the first port of the second worker
_PORTS = ("--lowest-port", str(_LOWEST), "--highest-port", str(_HIGHEST))

Start = Callable[..., RelayProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> RelayProcess:
            relay = RelayProcess(tmp_path, "--workers", "2", "--log-format", "json", *_PORTS, *arguments)
            stack.callback(relay.close)
            return relay

        yield start


@pytest.fixture
def relay(start: Start) -> RelayProcess:
    relay = start()
    relay.wait_ready()
    return relay


def test_clients_stay_with_their_worker_for_every_request_and_both_workers_have_clients(relay: RelayProcess) -> None:
    peer = udp(_PEER)
    clients = [TurnClient(relay.port, host="::1" if number % 4 == 0 else "127.0.0.1") for number in range(120)]
    relayed = [client.allocate_dual() for client in clients]
    served = [int(first.port >= _MIDDLE) for first, _ in relayed]

    for client in clients:
        assert code_of(client.bind(0x4000, address_of(peer))) == 0
        assert code_of(client.request(Method.REFRESH)) == 0
    for number, client in enumerate(clients):
        client.socket.send(b"\x40\x00\x00\x04" + number.to_bytes(4, "big"))
        assert peer.recvfrom(100) == (number.to_bytes(4, "big"), tuple(relayed[number][0]))

    assert {first.port for first, _ in relayed} == {second.port for _, second in relayed}
    assert min(served.count(0), served.count(1)) > 20


def test_data_between_workers_goes_through_the_kernel_over_both_families(relay: RelayProcess) -> None:
    first, second = _client_of(relay, 0), _client_of(relay, 1)
    for number, (mine, yours) in enumerate(zip(first.relayed, second.relayed, strict=True), 0x4000):
        assert code_of(first.client.bind(number, yours)) == 0
        assert code_of(second.client.bind(number, mine)) == 0

        first.client.socket.send(number.to_bytes(2, "big") + b"\x00\x05hello")
        assert second.client.socket.recv(100) == number.to_bytes(2, "big") + b"\x00\x05hello"


def test_the_hosts_other_ports_are_as_out_of_reach_as_ever(relay: RelayProcess) -> None:
    client = _client_of(relay, 0).client

    assert code_of(client.bind(0x4000, SocketAddress("127.0.0.1", relay.port))) == 403
    assert code_of(client.bind(0x4000, SocketAddress("127.0.0.1", _LOWEST - 1))) == 403
    assert code_of(client.bind(0x4000, SocketAddress("127.0.0.1", _HIGHEST + 1))) == 403


def test_nothing_is_reserved_for_a_client_that_may_come_to_another_worker(relay: RelayProcess) -> None:
    assert code_of(TurnClient(relay.port).allocate((stun.EVEN_PORT, True))) == 508
    assert code_of(TurnClient(relay.port).allocate((stun.EVEN_PORT, False))) == 0


def test_a_quota_is_divided_among_the_workers(start: Start) -> None:
    relay = start("--max-allocations-per-user", "5")
    relay.wait_ready()
    clients = [TurnClient(relay.port) for _ in range(60)]  # all open: no port may be used twice
    answers = [client.allocate() for client in clients]
    ports = [answer.get_all(stun.XOR_RELAYED_ADDRESS)[0].port for answer in answers if not code_of(answer)]

    assert [len([port for port in ports if port < _MIDDLE]), len([port for port in ports if port >= _MIDDLE])] == [3, 3]
    assert {code_of(answer) for answer in answers} == {0, 486}


def test_when_a_worker_dies_its_clients_recover_and_the_others_notice_nothing(start: Start) -> None:
    health = f"127.0.0.1:{free_port()}"
    relay = start("--health-check-addr", health)
    relay.wait_ready()
    assert _status(health) == 200
    lost, kept = _client_of(relay, 0), _client_of(relay, 1)
    peer = udp(_PEER)
    assert code_of(kept.client.bind(0x4000, address_of(peer))) == 0
    (first,) = relay.events("relay:worker_started", worker=0)

    os.kill(first["pid"], signal.SIGKILL)

    until(lambda: relay.events("relay:worker_lost", worker=0))
    assert _status(health) == 503
    assert "signal 9" in relay.events("relay:worker_lost")[0]["reason"]
    kept.client.socket.send(b"\x40\x00\x00\x04ping")
    assert peer.recv(100) == b"ping"
    # Its successor has its socket: what the client asks meanwhile waits there. And it knows the nonce of the first.
    answer = lost.client.request(Method.REFRESH)
    assert code_of(answer) == 437
    assert all(address.port < _MIDDLE for address in lost.client.allocate_dual())
    assert code_of(kept.client.request(Method.REFRESH)) == 0
    assert len(relay.events("relay:worker_started", worker=0)) == 2
    until(lambda: _status(health) == 200)


def test_a_worker_that_keeps_dying_is_replaced_less_and_less_often(relay: RelayProcess) -> None:
    for deaths in range(1, 4):
        until(lambda deaths=deaths: len(relay.events("relay:listening", worker=1)) == deaths)
        os.kill(relay.events("relay:worker_started", worker=1)[-1]["pid"], signal.SIGKILL)
        until(lambda deaths=deaths: len(relay.events("relay:worker_lost")) == deaths)

    assert [event["next_after"] for event in relay.events("relay:worker_lost")] == [0.1, 0.2, 0.4]


def test_a_signal_drains_all_workers(relay: RelayProcess) -> None:
    held = [_client_of(relay, number).client for number in range(2)]

    relay.signal()
    until(lambda: len(relay.events("relay:draining")) == 2)

    assert {code_of(TurnClient(relay.port).allocate()) for _ in range(20)} == {508}
    assert code_of(held[0].request(Method.REFRESH, (stun.LIFETIME, 0))) == 0
    until(lambda: len(relay.events("relay:stopped")) == 1)
    assert relay.process.poll() is None
    assert code_of(held[1].request(Method.REFRESH, (stun.LIFETIME, 0))) == 0
    assert relay.wait() == 0
    assert relay.events("relay:worker_lost") == []


def test_a_second_signal_ends_all_workers_at_once_even_if_each_process_gets_it(relay: RelayProcess) -> None:
    _client_of(relay, 0)
    workers = [event["pid"] for event in relay.events("relay:worker_started")]

    for _ in range(2):  # as a terminal and a service manager do it
        for pid in (*workers, relay.process.pid):
            with contextlib.suppress(ProcessLookupError):  # a worker without clients ends at the first signal
                os.kill(pid, signal.SIGINT)
        until(lambda: relay.events("relay:draining"))

    assert relay.wait() == 0
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def test_workers_do_not_outlive_their_parent(relay: RelayProcess) -> None:
    workers = [event["pid"] for event in relay.events("relay:worker_started")]
    assert len(workers) == 2

    relay.process.kill()
    relay.process.wait()

    until(lambda: not any(_is_running(pid) for pid in workers))


def test_a_port_that_another_relay_shares_among_its_workers_is_refused(relay: RelayProcess, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = RelayProcess(tmp_path / "second", "--workers", "2", *_PORTS, "--listen-port", str(relay.port))
    with contextlib.closing(second):
        assert second.wait(20) == 1
        assert f"Cannot open a UDP socket on 0.0.0.0:{relay.port}: Address already in use" in second.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--workers", "0"), 2, "--workers: '0' is not a number from 1 to 64"),
        (("--highest-port", str(_LOWEST)), 1, "--workers is greater"),
    ],
)
def test_invalid_numbers_are_reported(start: Start, arguments: tuple[str, ...], code: int, text: str) -> None:
    relay = start(*arguments)

    assert relay.wait(20) == code
    assert text in relay.log.read_text().splitlines()[-1]


def test_a_worker_shows_neither_token_nor_passwords(tmp_path: Path) -> None:
    relay = RelayProcess(
        tmp_path,
        *("--workers", "2", "--log-format", "json", *_PORTS, "--drain-time", "0s"),
        environment={"FIREZONE_TOKEN": "a-secret-token"},
    )
    with contextlib.closing(relay):
        relay.wait_ready()
        TurnClient(relay.port).allocate()
        for pid in [event["pid"] for event in relay.events("relay:worker_started")]:
            seen = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"a-secret-token" not in seen
        relay.signal()
        assert relay.wait() == 0
        assert len(relay.events("relay:stopped")) == 2
        assert "secret" not in relay.log.read_text()


class _Allocated:
    def __init__(self, client: TurnClient) -> None:
        self.client = client
        self.relayed = client.allocate_dual()


def _client_of(relay: RelayProcess, worker: int) -> _Allocated:
    """A client that the kernel assigned to this worker."""
    for _ in range(100):
        allocated = _Allocated(TurnClient(relay.port))
        if (allocated.relayed[0].port >= _MIDDLE) == bool(worker):
            return allocated
        allocated.client.request(Method.REFRESH, (stun.LIFETIME, 0))
    raise AssertionError(f"no client came to worker {worker}")


def _status(address: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

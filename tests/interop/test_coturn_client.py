"""coturn's test client against our relay, on loopback: it verifies signatures, counts datagrams and exits on errors."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.polling import until
from tests.service.relay_process import PASSWORD, USER, RelayProcess, free_port

_CLIENT, _PEER = shutil.which("turnutils_uclient"), shutil.which("turnutils_peer")
_PEER_HOST = "127.0.0.3"
_DATAGRAMS = 10

pytestmark = pytest.mark.skipif(_CLIENT is None or _PEER is None, reason="turnutils_uclient (coturn) is not installed")


@pytest.mark.parametrize(
    "flags",
    [
        (),  # EVEN-PORT with a reservation, channels up to 0x7FFF, rebinding
        ("-s",),  # permissions, Send and Data indications
        ("-c", "-g", "-D"),  # DONT-FRAGMENT, padded channel data
        ("-c", "-y"),  # two allocations on the same relay
        ("-c", "-y", "-x"),  # the same with IPv6 relayed addresses
        ("-c", "-Z"),  # addresses of both families, of which it refreshes one at random
    ],
    ids=" ".join,
)
def test_the_client_of_coturn_loses_nothing(relay: RelayProcess, peer_port: int, flags: tuple[str, ...]) -> None:
    user = ["-u", USER, "-w", PASSWORD, "-p", str(relay.port)]
    load = ["-n", str(_DATAGRAMS), "-m", "2", "-l", "101", "-e", _PEER_HOST, "-r", str(peer_port)]
    ended = subprocess.run(
        [str(_CLIENT), *user, *load, *flags, "127.0.0.1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    sent, received = (int(number) for number in re.findall(r"tot_(?:send|recv)_msgs=(\d+)", output)[-2:])
    assert sent == received > 0, output
    assert re.findall(r"Total lost packets (\d+)", output)[-1:] == ["0"], output


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    relay = RelayProcess(tmp_path, "--drain-time", "0s", "--lowest-port", "53000", "--highest-port", "53999")
    with contextlib.closing(relay):
        relay.wait_ready()
        yield relay


@pytest.fixture
def peer_port() -> Iterator[int]:
    port = free_port()
    with subprocess.Popen(
        [str(_PEER), "-L", _PEER_HOST, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as peer:
        until(lambda: f"{_PEER_HOST}:{port}" in _udp_sockets())
        yield port
        peer.kill()


def _udp_sockets() -> str:
    """The local addresses of all UDP sockets, as text."""
    rows = Path("/proc/net/udp").read_text().splitlines()[1:]
    pairs = [row.split()[1].split(":") for row in rows]
    return " ".join(
        f"{'.'.join(str(byte) for byte in bytes.fromhex(host)[::-1])}:{int(port, 16)}" for host, port in pairs
    )

"""Start and end of real twistd processes: exit codes, errors on stderr, logs, notifications to a service manager."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.system.hosts import Lab
from tests.system.network import Network
from tests.system.product import CLIENT_TOKEN, GATEWAY_TOKEN, Product
from tests.system.programs import Program

_ROOT = Path(__file__).parents[2]
_TWISTD = str(Path(sys.executable).with_name("twistd"))
_SECRET = "n.a-secret-token"
_SEED = f"""
[account]
name = "Test"
slug = "test"

[[sites]]
name = "HQ"

[[tokens]]
kind = "gateway"
site = "HQ"
token = "{_SECRET}"
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of the seed file and of all files that a process writes."""
    (tmp_path / "portal.toml").write_text(_SEED)
    return tmp_path


@pytest.fixture
def portal(directory: Path) -> Iterator[Program]:
    """Start a process that logs in JSON, and wait until it is ready."""
    program = _start(directory, "firezone-portal", *_PORTAL, "--log-format", "json", "--log-level", "debug")
    program.wait_ready()
    yield program
    program.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order_with_code_0(portal: Program, number: signal.Signals) -> None:
    portal.send_signal(number)

    assert portal.wait_exit() == 0
    assert "Traceback" not in portal.output()


def test_it_is_ready_when_it_serves_and_not_before(portal: Program) -> None:
    (listening,) = portal.events("portal:listening")

    with urllib.request.urlopen(f"http://127.0.0.1:{listening['port']}/healthz", timeout=5) as answer:
        assert answer.status == 200


def test_hangup_reloads_the_seed_and_an_invalid_seed_changes_nothing(portal: Program, directory: Path) -> None:
    portal.send_signal(signal.SIGHUP)
    portal.wait_for("portal:seed_reloaded")
    (directory / "portal.toml").write_text("[account")

    portal.send_signal(signal.SIGHUP)

    assert "not valid TOML" in portal.wait_for("portal:seed_rejected")["reason"]
    assert portal.is_running


def test_twistd_and_our_own_log_are_one_stream_of_json(portal: Program) -> None:
    portal.stop()

    messages = [json.loads(line) for line in portal.output().splitlines()]

    assert [message for message in messages if message.get("level") not in {"debug", "info"}] == []
    assert "twisted:logged" in {message["message_type"] for message in messages}


def test_no_core_is_dumped(portal: Program) -> None:
    limits = Path(f"/proc/{portal.pid}/limits").read_text().splitlines()

    assert [line.split()[4:6] for line in limits if line.startswith("Max core file size")] == [["0", "0"]]


@pytest.mark.parametrize(
    ("seed", "complaint"),
    [
        ("[account", "the seed file portal.toml is invalid: not valid TOML"),
        ("", "the seed file portal.toml is invalid"),
        (None, "can't read the seed file portal.toml: No such file or directory\n"),
    ],
)
def test_an_invalid_seed_is_reported_in_one_sentence_with_code_1(
    directory: Path, seed: str | None, complaint: str
) -> None:
    (directory / "portal.toml").unlink()
    if seed is not None:
        (directory / "portal.toml").write_text(seed)

    _fails(directory, "firezone-portal", *_PORTAL, code=1, complaint=complaint)


def test_a_port_in_use_is_reported_in_one_sentence_with_code_1(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        _fails(
            *(directory, "firezone-portal", "--seed", "portal.toml", "--listen", address),
            code=1,
            complaint=f"can't listen on {address}: Address already in use; choose another --listen",
        )


@pytest.mark.parametrize("content", [b"this is no database, and longer than its header would be" * 40])
def test_a_corrupt_database_is_reported_in_one_sentence_with_code_1_and_is_left_alone(
    directory: Path, content: bytes
) -> None:
    database = directory / "firezone-portal.sqlite3"
    database.write_bytes(content)

    _fails(directory, "firezone-portal", *_PORTAL, code=1, complaint="firezone-portal.sqlite3")

    assert database.read_bytes() == content


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_a_missing_token_is_reported_in_one_sentence_with_code_1(directory: Path, role: str) -> None:
    path = str(directory / "no-token")

    _fails(
        *(directory, f"firezone-{role}", "--token-path", path, "--state-dir", str(directory)),
        code=1,
        complaint=f"No token is configured: set FIREZONE_TOKEN, or put it into {path}, readable by its owner only",
    )


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_an_invalid_url_is_reported_in_one_sentence_with_code_1(directory: Path, role: str) -> None:
    _fails(
        *(directory, f"firezone-{role}", "--api-url", "portal.example", "--state-dir", str(directory)),
        code=1,
        complaint="The portal's URL 'portal.example' must begin with",
        FIREZONE_TOKEN=_SECRET,
    )


@pytest.mark.parametrize("role", ["client", "gateway"])
@pytest.mark.parametrize("name", ["tun-firezone-too-long", "tun/firezone", "tun firezone"])
def test_an_interface_name_that_is_not_valid_is_reported_before_anything_starts(
    directory: Path, role: str, name: str
) -> None:
    check = ("--check",) if role == "client" else ()

    _fails(
        *(directory, f"firezone-{role}", "--firezone-id", "x", "--interface", name, *check),
        code=2,
        complaint=f"--interface: {name!r}",
        FIREZONE_TOKEN=_SECRET,
    )


@pytest.mark.parametrize("role", ["client", "gateway", "portal"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--token", _SECRET), "option --token not recognized (see --help)"),
        ((f"--token={_SECRET}",), "option --token not recognized (see --help)"),
        ((_SECRET,), "there are options only, no further arguments (see --help)"),
        (("--log-level", "loud"), "--log-level: 'loud' is not a log level: debug, info, warn or error (see --help)"),
    ],
)
def test_a_wrong_command_line_is_reported_in_one_line_with_code_2(
    directory: Path, role: str, arguments: tuple[str, ...], complaint: str
) -> None:
    required = ("--seed", "portal.toml") if role == "portal" else ()

    _fails(directory, f"firezone-{role}", *required, *arguments, code=2, complaint=complaint)


def test_an_invalid_variable_is_reported_in_one_line_with_code_2(directory: Path) -> None:
    _fails(
        *(directory, "firezone-gateway"),
        code=2,
        complaint="FIREZONE_MAX_PARTITION_TIME: 'long' is not a duration",
        FIREZONE_MAX_PARTITION_TIME="long",
    )


@pytest.mark.parametrize("role", ["client", "gateway", "relay", "portal"])
def test_without_n_it_refuses_to_start_in_one_sentence_with_code_1(directory: Path, role: str) -> None:
    options = {"portal": _PORTAL, "relay": ("--public-ip4-addr", "192.0.2.1")}.get(role, ("--firezone-id", "x"))

    done = subprocess.run(
        [_TWISTD, "--pidfile=", f"firezone-{role}", *options],
        cwd=directory,
        env=_environment(FIREZONE_TOKEN=_SECRET),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"firezone-{role}: It runs in the foreground only: start it with twistd -n")


@pytest.mark.parametrize("role", ["client", "gateway", "portal"])
def test_help_and_version_end_with_code_0(directory: Path, role: str) -> None:
    for option, expected in (("--help", "--log-dir"), ("--version", "0.")):
        done = _run(directory, f"firezone-{role}", option)
        assert (done.returncode, expected in done.stdout) == (0, True)


def test_a_check_passes_without_connecting_and_writes_nothing_but_the_identity(directory: Path) -> None:
    state = directory / "state"
    options = ("--check", "--state-dir", str(state), "--api-url", "wss://portal.invalid/")

    done = _run(directory, "firezone-client", *options, FIREZONE_TOKEN=_SECRET)

    assert (done.returncode, done.stdout, done.stderr) == (0, "check passed\n", "")
    assert [path.name for path in state.iterdir()] == ["firezone-id.json"]
    given = _run(directory, "firezone-client", *options, "--firezone-id", "x", FIREZONE_TOKEN=_SECRET)
    assert given.returncode == 0


def test_logs_also_go_to_a_file_of_their_own(directory: Path) -> None:
    program = _start(directory, "firezone-portal", *_PORTAL, "--log-format", "json", LOG_DIR=str(directory / "logs"))
    program.wait_ready()
    assert program.stop() == 0

    latest = directory / "logs/latest"
    lines = latest.read_text().splitlines()
    assert "portal:listening" in [json.loads(line)["message_type"] for line in lines]
    assert lines == program.output().splitlines()
    assert latest.resolve().name.startswith("firezone-portal.20")
    assert stat.S_IMODE(latest.stat().st_mode) == 0o640


def test_a_log_directory_that_cannot_be_created_is_reported_in_one_sentence_with_code_1(directory: Path) -> None:
    (directory / "file").write_text("")

    _fails(
        *(directory, "firezone-portal", *_PORTAL, "--log-dir", str(directory / "file")),
        code=1,
        complaint=f"Can't create a log file in {directory / 'file'} (File exists): choose another --log-dir",
    )


@pytest.mark.parametrize("code", [0, 1])
def test_an_unread_log_does_not_stop_a_process_from_ending_with_its_code(directory: Path, code: int) -> None:
    reading, writing = os.pipe()
    _fill(writing)
    taken = socket.create_server(("127.0.0.1", 0))
    listen = f"127.0.0.1:{0 if code == 0 else taken.getsockname()[1]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, taken:
        manager.bind(str(directory / "notify"))
        manager.settimeout(20)
        process = subprocess.Popen(
            [_TWISTD, "-n", "--pidfile=", "firezone-portal", "--seed", "portal.toml", "--listen", listen],
            cwd=directory,
            env=_environment(NOTIFY_SOCKET=str(directory / "notify")),
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
        )
        os.close(writing)
        try:
            if code == 0:
                assert manager.recv(100) == b"READY=1"
                process.terminate()
            assert process.wait(15) == code
        finally:
            process.kill()
            process.wait()
            os.close(reading)


def test_a_refused_peers_token_is_not_in_the_log_at_debug_level(portal: Program) -> None:
    (listening,) = portal.events("portal:listening")
    head = (
        f"GET /gateway/websocket?token={_SECRET}x&external_id=a&public_key=b HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {_SECRET}x\r\nX-Authorization: Bearer {_SECRET}y\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", listening["port"]), 5) as connection:
        connection.sendall(head.encode())
        assert b" 401 " in connection.recv(4096).split(b"\r\n")[0]
    portal.wait_for("portal:connection_refused")
    portal.stop()

    assert "a-secret-token" not in portal.output()


@pytest.mark.namespaces
def test_no_token_is_in_any_log_at_debug_level(lab: Lab) -> None:
    network = Network(lab)
    product = Product(network, log_level="debug")
    product.start()
    programs = (product.portal, product.gateway, product.client)
    product.stop()

    for program in programs:
        output = program.output()
        assert "debug" in output
        assert [token for token in (CLIENT_TOKEN, GATEWAY_TOKEN) if token in output] == []


_PORTAL = ("--seed", "portal.toml", "--listen", "127.0.0.1:0")


def _fails(directory: Path, *command: str, code: int, complaint: str, **environment: str) -> None:
    """Check that the process ends with this code and a line on stderr that begins with its name."""
    done = _run(directory, *command, **environment)

    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{command[0]}: ")
    assert complaint in done.stderr
    assert "a-secret-token" not in done.stderr + done.stdout
    assert "Traceback" not in done.stdout


def _run(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _twistd(command),
        cwd=directory,
        env=_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _start(directory: Path, *command: str, **environment: str) -> Program:
    return Program(
        command[0],
        _twistd(command),
        environment=_environment(**environment),
        log=directory / "output.log",
        notify_socket=directory / "notify",
        working_directory=directory,
    )


def _twistd(command: Sequence[str]) -> list[str]:
    return [_TWISTD, "-n", "--pidfile=", *command]


def _environment(**more: str) -> dict[str, str]:
    """Use the sources next to the tests, wherever the plugins were installed from."""
    return {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(_ROOT), **more}


def _fill(pipe: int) -> None:
    """Fill the pipe, so that further writers have to wait."""
    os.set_blocking(pipe, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(pipe, b"x" * size)
        except BlockingIOError:
            time.sleep(0)
    os.set_blocking(pipe, True)


def test_a_wall_clock_that_steps_back_delays_no_timer() -> None:
    script = """
import time
real, shift = time.time, 0
time.time = lambda: real() + shift
from twisted.internet import reactor
from firezone_tunnel.shell.process.process import Process

def step() -> None:
    global shift
    reactor.callLater(0.1, reactor.stop)
    shift = -3600

Process(reactor, "example").install()
reactor.callWhenRunning(step)
reactor.run()
"""
    subprocess.run([sys.executable, "-c", script], cwd=_ROOT, check=True, timeout=30)

"""Missing prerequisites and invalid options end a program with one sentence; hostile input is counted and dropped."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.hosts import Host, Lab
from tests.system.namespace import inside
from tests.system.network import CLIENT, CLIENT_IPV6, GATEWAY, GATEWAY_IPV6, PORTAL, SERVER, WEB_PORT, Network
from tests.system.processes import TOKENS, said, start
from tests.system.product import CLIENT_TOKEN, PORTAL_PORT, SEED, Product
from tests.system.programs import Program
from tests.system.test_demo_path import download, host_state

pytestmark = pytest.mark.namespaces

_UDP_PORT = 52625
_HEALTH_PORT = 8080
_INTERFACE = "tun-firezone"
_MEGABYTE = 1_000_000
_DATAGRAMS = 5000
_TUN_FOR_ALL = "cd / && mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200"
_GARBAGE = ("unrecognized", "unmatched_stun", "unknown_sessions", "unknown_peers")  # counters of garbage datagrams

BOTH = pytest.mark.parametrize("role", ["client", "gateway"])


@pytest.fixture
def network(lab: Lab) -> Network:
    return Network(lab)


@pytest.fixture
def product(network: Network) -> Iterator[Product]:
    network.start_servers()
    product = Product(network)
    product.start()
    yield product
    product.stop()


# Missing prerequisites


@BOTH
@pytest.mark.parametrize(
    "instead",
    [
        pytest.param("mount --bind /dev/null /dev/net/tun", id="another device"),
        pytest.param("mount -t tmpfs -o ro tmpfs /dev/net", id="no node, and none can be made"),
        pytest.param("mount -t tmpfs -o nodev tmpfs /dev/net", id="devices are forbidden"),
    ],
)
def test_without_a_tun_device_it_ends_with_one_sentence(network: Network, role: str, instead: str) -> None:
    host = getattr(network, role)
    with unchanged(host):
        assert_ends(start(host, role, before=instead), role, "/dev/net/tun")


@BOTH
def test_without_the_right_to_change_the_network_it_ends_with_one_sentence(network: Network, role: str) -> None:
    host = getattr(network, role)
    dropped = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--")
    with unchanged(host):
        assert_ends(start(host, role, wrapper=dropped), role, "CAP_NET_ADMIN")


@BOTH
def test_a_name_that_another_interface_has_ends_it_with_one_sentence(network: Network, role: str) -> None:
    host = getattr(network, role)
    host.ip("link", "add", _INTERFACE, "type", "veth", "peer", "name", "other")
    with unchanged(host):
        assert_ends(start(host, role), role, _INTERFACE, "in use")


@pytest.mark.parametrize("second", ["client", "gateway"])
@BOTH
def test_a_second_role_on_a_host_is_refused_and_the_first_undisturbed(
    network: Network, product: Product, role: str, second: str
) -> None:
    host = getattr(network, role)
    first = f"A {role} (process {getattr(product, role).process.pid})"
    with unchanged(host):
        program = start(host, second, "--interface", "tun-second", *no_health(second))
        assert_ends(program, second, first, "stop it first")

    assert download(network, 1) == 1


def test_a_health_port_in_use_ends_the_gateway_with_one_sentence(network: Network) -> None:
    host = network.gateway
    with inside(host), socket.create_server(("0.0.0.0", _HEALTH_PORT)), unchanged(host):
        assert_ends(start(host, "gateway"), "gateway", str(_HEALTH_PORT), "--health-check-addr")


def test_where_the_udp_port_is_in_use_another_one_serves(network: Network) -> None:
    network.start_servers()
    product = Product(network)
    with occupied(network.client), occupied(network.gateway):
        product.start()

        assert download(network, _MEGABYTE) == _MEGABYTE
        for program in (product.client, product.gateway):
            bound = list(program.events("udp:bound"))
            assert [(one["preferred"], one["port"] != _UDP_PORT) for one in bound] == [(False, True)] * 2
        assert product.connection()["path"] == "direct"
        product.stop()


# Files and disks


@BOTH
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666])
def test_a_token_file_that_others_can_read_is_refused(network: Network, role: str, mode: int) -> None:
    host = getattr(network, role)
    token = host.directory / "token"
    token.write_text(TOKENS[role])
    token.chmod(mode)

    program = start(host, role, "--token-path", str(token), token="")

    assert_ends(program, role, str(token), "chmod 600")
    assert TOKENS[role] not in program.output()


@BOTH
def test_without_a_token_it_ends_with_one_sentence(network: Network, role: str) -> None:
    host = getattr(network, role)
    missing = str(host.directory / "no token")

    assert_ends(start(host, role, "--token-path", missing, token=""), role, missing, "FIREZONE_TOKEN")


@BOTH
@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\0binary", "tök€n".encode()])
def test_a_token_file_without_a_token_ends_it_with_one_sentence(network: Network, role: str, content: bytes) -> None:
    host = getattr(network, role)
    token = host.directory / "token"
    token.write_bytes(content)
    token.chmod(0o600)

    assert_ends(start(host, role, "--token-path", str(token), token=""), role, "token")


@BOTH
def test_a_state_directory_that_is_read_only_ends_it_with_one_sentence(network: Network, role: str) -> None:
    host = getattr(network, role)
    with unchanged(host):
        program = start(host, role, before=f"mount -t tmpfs -o ro tmpfs {host.state_directory}")
        assert_ends(program, role, "Read-only file system", "--state-dir")


@BOTH
@pytest.mark.parametrize(
    ("before", "user"),
    [
        pytest.param("mount -o remount,bind,ro /", "root", id="a read-only root"),
        pytest.param("mount -t tmpfs -o ro tmpfs {state}", "root", id="a read-only directory"),
        pytest.param(f"chmod 700 {{state}} && {_TUN_FOR_ALL}", "nobody", id="a directory of another user"),
        pytest.param(f"rmdir {{state}} && {_TUN_FOR_ALL}", "nobody", id="no directory"),
    ],
)
def test_with_an_identity_no_state_directory_is_needed(network: Network, role: str, before: str, user: str) -> None:
    """Strict rp_filter, and forwarding that is off, make each of them change settings of its host."""
    host = getattr(network, role)
    for name in ("all", "default", "eth0"):
        host.sysctl(f"net.ipv4.conf.{name}.rp_filter", "1")
    product = Product(network)
    product.start_portal()
    capabilities = ("--inh-caps=+net_admin", "--ambient-caps=+net_admin")
    wrapper = () if user == "root" else ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *capabilities)
    with unchanged(host):
        program = start(
            *(host, role, "--firezone-id", "known", *no_health(role)),
            before=before.format(state=host.state_directory),
            wrapper=wrapper,
        )
        program.wait_for("client:tunnel_ready" if role == "client" else "gateway:ready")
        program.wait_for("host:originals_not_stored")

        assert program.stop() == 0
    product.stop()


@BOTH
def test_a_full_disk_under_the_state_directory_ends_it_with_one_sentence(network: Network, role: str) -> None:
    host = getattr(network, role)
    with unchanged(host):
        program = start(host, role, before=full_disk(host.state_directory))
        assert_ends(program, role, "No space left", "--state-dir")


def test_a_gateway_with_an_identity_but_no_room_for_its_state_leaves_the_host_as_it_was(network: Network) -> None:
    """It must not change settings whose original values it can't save."""
    host = network.gateway
    full = (
        f"mount -t tmpfs -o size=4k tmpfs {host.state_directory}; head -c 4096 /dev/zero > {host.state_directory}/full"
    )
    with unchanged(host):
        assert_ends(start(host, "gateway", "--firezone-id", "known", before=full), "gateway", "No space left")


def test_a_full_disk_under_the_logs_does_not_stop_the_tunnel(network: Network) -> None:
    network.start_servers()
    product = Product(network)
    product.start_portal()
    product.start_gateway()
    logs = network.client.directory / "logs"
    logs.mkdir()
    full = full_disk(logs)

    client = start(network.client, "client", "--log-dir", str(logs), before=full)
    client.wait_ready()

    assert download(network, _MEGABYTE) == _MEGABYTE
    assert client.stop() == 0
    product.stop()


def test_a_portal_that_can_not_write_its_database_ends_with_one_sentence(network: Network) -> None:
    host = network.portal
    seed = host.directory / "portal.toml"
    seed.write_text(SEED)
    full = (
        f"mount -t tmpfs -o size=4k tmpfs {host.state_directory}; head -c 4096 /dev/zero > {host.state_directory}/full"
    )

    program = start(host, "portal", "--seed", str(seed), before=full)

    assert_ends(program, "portal", str(host.state_directory), "disk is full")


# Command lines and tokens


@BOTH
@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-such-option",),
        ("--log-level", "loud"),
        ("--log-format", "xml"),
        ("--max-partition-time", "soon"),
        ("--api-url",),
        ("an argument",),
        ("--token", "a-secret-token"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_one_line(
    network: Network, role: str, arguments: tuple[str, ...]
) -> None:
    program = start(getattr(network, role), role, *arguments)

    assert_ends(program, role, code=2)
    assert "a-secret-token" not in program.output()


@BOTH
@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://portal.example", "wss://", "ws://[::1", "ws://a:99999/"])
def test_a_url_that_is_none_ends_it_with_one_sentence(network: Network, role: str, url: str) -> None:
    program = start(getattr(network, role), role, FIREZONE_API_URL=url)

    assert program.wait_exit() in {1, 2}
    assert len(said(program)) == 1, program.output()


@BOTH
@pytest.mark.parametrize("name", ["sixteen-bytes-xx", "a/b", "..", "with space"])
def test_a_name_that_no_interface_can_have_ends_it_with_one_sentence(network: Network, role: str, name: str) -> None:
    host = getattr(network, role)
    with unchanged(host):
        assert_ends(start(host, role, "--interface", name), role, name, code=2)


@BOTH
def test_an_expired_token_ends_it_with_one_sentence_and_no_retry(network: Network, role: str) -> None:
    product = Product(network)
    product.start_portal()
    seed = network.portal.directory / "portal.toml"
    token = f'token = "{TOKENS[role]}"\n'
    seed.write_text(SEED.replace(token, f"{token}expires_at = 2020-01-01T00:00:00Z\n"))
    product.portal.send_signal(1)
    product.portal.wait_for("portal:seed_reloaded")
    host = getattr(network, role)

    with unchanged(host):
        program = start(host, role)
        assert_ends(program, role, "token")

    assert list(program.events("portal:retry_scheduled")) == []
    product.stop()


# Hostile input


@pytest.mark.serial
def test_a_flood_of_garbage_datagrams_is_counted_and_the_tunnel_goes_on(network: Network, product: Product) -> None:
    assert download(network, 1) == 1
    flood = threading.Thread(target=flood_with_garbage, args=(network.portal,))
    flood.start()

    assert download(network, 5 * _MEGABYTE) == 5 * _MEGABYTE
    flood.join()
    assert download(network, _MEGABYTE) == _MEGABYTE

    programs = (product.client, product.gateway)
    assert product.stop()["client"] == 0
    for program in programs:
        [closed] = program.events("tunnel:closed")
        counted = sum(
            closed.get(name, 0) for name in ("unrecognized", "unmatched_stun", "unknown_sessions", "unknown_peers")
        )
        assert counted > _DATAGRAMS // 10, closed  # the kernel may drop some of a flood
        assert list(program.events("tunnel:connection_failed")) == []
        assert [event for event in program.events() if event.get("level") in {"warning", "error"}] == []


def test_garbage_on_the_portals_port_is_refused_and_peers_notice_nothing(network: Network, product: Product) -> None:
    generator = random.Random(1)
    with inside(network.client):
        for garbage in (
            b"\0" * 1000,
            b"\xff" * 70_000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"\r\n" * 1000,
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + generator.randbytes(500),  # the beginning of a TLS handshake
            b"GET /client/websocket HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            upgrade("/client/websocket?token=" + "x" * 10_000),
            upgrade("/no/such/path"),
            *(generator.randbytes(generator.randrange(1, 3000)) for _ in range(50)),
        ):
            assert b"101 Switching" not in exchange(garbage)

    assert_portal_serves(network, product)


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_garbage_frames_on_a_websocket_end_only_that_connection(
    network: Network, product: Product, version: str
) -> None:
    generator = random.Random(2)
    with inside(network.client):
        for frames in (
            text(b"not json"),
            text(b"[" * 5000),
            text(b'{"topic":' * 2000),
            text(b"\xff\xfe"),
            text(b"[]"),
            text(b"null"),
            text(b'{"topic":1,"event":2,"payload":3,"ref":4}'),
            text(b'[null,null,"client","phx_join",' + b"[" * 900),
            text(b'["1","1","client","phx_join",{}]') * 3,
            text(b'{"topic":"client","event":"create_flow","payload":{"resource_id":[]},"ref":1}'),
            frame(2, b"binary"),
            frame(15, b"a reserved opcode"),
            frame(1, b"unmasked", is_masked=False),
            frame(9, b"x" * 126),  # a control frame that is too long
            struct.pack(">BBQ", 0x81, 0xFF, 1 << 62) + bytes(4),  # a frame with an impossible length
            *(generator.randbytes(generator.randrange(1, 500)) for _ in range(20)),
        ):
            exchange_on_websocket(frames, version)

    assert_portal_serves(network, product)


def test_a_download_goes_on_while_the_portal_is_killed_and_comes_back(network: Network, product: Product) -> None:
    assert download(network, 1) == 1
    url = f"http://{SERVER}:{WEB_PORT}/bytes?num={8 * _MEGABYTE}"
    limits = ("--limit-rate", "2M", "--max-time", "30")
    curl = network.client.spawn("curl", "curl", "-s", "-o", "/dev/null", "-w", "%{size_download}", *limits, url)
    product.client.wait_for("tunnel:connection_established")

    product.portal.kill()
    product.client.wait_for("portal:connection_lost")
    product.start_portal()

    assert curl.wait_exit() == 0
    assert curl.output() == str(8 * _MEGABYTE)
    product.client.wait_for("portal:joined")
    assert len(list(product.client.events("tunnel:connection_established"))) == 1


def assert_ends(program: Program, role: str, *words: str, code: int = 1) -> None:
    """The program ended with this exit code and one sentence that contains these words, without a traceback."""
    assert program.wait_exit() == code, program.output()
    lines = said(program)
    assert len(lines) == 1, program.output()
    assert lines[0].startswith(f"firezone-{role}: "), lines
    assert [word for word in words if word not in lines[0]] == [], lines
    assert [event for event in program.events() if "traceback" in event] == []


@contextlib.contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Check that the host's state is the same before and after the context."""
    before = _state(host)
    yield
    assert _state(host) == before


def _state(host: Host) -> list[str]:
    """The host's state without link-local addresses, which the kernel adds shortly after an interface comes up."""
    return [line for line in host_state(host) if "fe80::" not in line]


@contextlib.contextmanager
def occupied(host: Host) -> Iterator[None]:
    """Bind the preferred UDP port of clients and gateways in both families."""
    with inside(host):
        ipv4 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ipv6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with ipv4, ipv6:
        ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        ipv4.bind(("0.0.0.0", _UDP_PORT))
        ipv6.bind(("::", _UDP_PORT))
        yield


def full_disk(directory: Path) -> str:
    """Shell commands that fill up the file system of a directory."""
    return f"mount -t tmpfs -o size=4k tmpfs {directory}; head -c 4096 /dev/zero > {directory}/full"


def no_health(role: str) -> tuple[str, ...]:
    return ("--health-check-addr", "off") if role == "gateway" else ()


def flood_with_garbage(host: Host) -> None:
    """Send 5000 datagrams each to client and gateway: noise, and datagrams that look like STUN or WireGuard."""
    generator = random.Random(0)
    with inside(host):
        ipv4 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ipv6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with ipv4, ipv6:
        for number in range(_DATAGRAMS):
            garbage = _garbage(generator, number % 5)
            for udp, targets in ((ipv4, (CLIENT, GATEWAY)), (ipv6, (CLIENT_IPV6, GATEWAY_IPV6))):
                if udp is (ipv6 if number % 4 == 0 else ipv4):
                    for target in targets:
                        udp.sendto(garbage, (target, _UDP_PORT))


def _garbage(generator: random.Random, kind: int) -> bytes:
    noise = generator.randbytes(generator.randrange(1, 1400))
    if kind == 0:
        return noise
    if kind == 1:  # a STUN binding request with invalid content
        return struct.pack(">HHI", 1, len(noise) & ~3, 0x2112A442) + noise
    if kind == 2:
        return b"\1\0\0\0" + noise.ljust(144, b"x")[:144]
    if kind == 3:
        return b"\2\0\0\0" + noise.ljust(88, b"x")[:88]
    return b"\4\0\0\0" + noise.ljust(28, b"x")


def exchange(request: bytes) -> bytes:
    """Send bytes to the portal's port. Returns the response until the portal closes or is silent for 0.5 s."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection((PORTAL, PORTAL_PORT), timeout=0.5) as stream:
        stream.sendall(request)
        stream.shutdown(socket.SHUT_WR)
        while len(answer) < 1 << 20 and (more := stream.recv(65536)):
            answer += more
    return answer


def exchange_on_websocket(frames: bytes, version: str) -> None:
    """Open a WebSocket as a client, join, send these frames, and wait until the portal closes it or is silent."""
    path = f"/client/websocket?token={CLIENT_TOKEN}&external_id=hostile&name=hostile&vsn={version}"
    key = base64.b64encode(bytes(range(32))).decode().replace("+", "%2B").replace("=", "%3D")
    with socket.create_connection((PORTAL, PORTAL_PORT), timeout=0.3) as stream:
        stream.sendall(upgrade(f"{path}&public_key={key}"))
        assert b"101 Switching" in stream.recv(65536)
        join = '["1","1","client","phx_join",{}]'
        if version == "1.0.0":
            join = '{"topic":"client","event":"phx_join","payload":{},"ref":1}'
        with contextlib.suppress(OSError):
            stream.sendall(text(join.encode()) + frames)
            while stream.recv(65536):
                pass


def upgrade(target: str) -> bytes:
    agent = "Linux/6.1 connlib/1.5.12 (x86_64)"
    lines = (
        f"GET {target} HTTP/1.1",
        f"Host: {PORTAL}:{PORTAL_PORT}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        "Sec-WebSocket-Version: 13",
        f"User-Agent: {agent}",
        f"X-Authorization: Bearer {CLIENT_TOKEN}",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def text(payload: bytes) -> bytes:
    return frame(1, payload)


def frame(opcode: int, payload: bytes, *, is_masked: bool = True) -> bytes:
    """A final WebSocket frame with a zero mask (RFC 6455, section 5.2)."""
    mask = 0x80 if is_masked else 0
    size = len(payload)
    if size < 126:
        header = struct.pack(">BB", 0x80 | opcode, mask | size)
    elif size < 1 << 16:
        header = struct.pack(">BBH", 0x80 | opcode, mask | 126, size)
    else:
        header = struct.pack(">BBQ", 0x80 | opcode, mask | 127, size)
    return header + bytes(4 if is_masked else 0) + payload


def assert_portal_serves(network: Network, product: Product) -> None:
    """No program lost its connection, the portal logged no error, and a new client can connect."""
    for program in (product.client, product.gateway):
        assert list(program.events("portal:connection_lost")) == []
    assert [event for event in product.portal.events() if event.get("level") == "error"] == []
    product.restart_client()
    assert download(network, 1) == 1

"""Errors reach whoever can act on them: applications on the client's host, hosts behind it, and servers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest

from tests.system.hosts import Host, Lab
from tests.system.network import IPERF_PORT, SERVER, WEB_PORT, Network
from tests.system.product import Product

pytestmark = [pytest.mark.namespaces, pytest.mark.serial]

ROUTER, ROUTER_IPV6 = "10.21.0.2", "fd00:21::2"  # no resource covers them
FAR, FAR_IPV6 = "10.20.0.200", "fd00:20::200"
SIZE = 2_000_000


def test_a_tcp_upload_passes_a_hop_with_a_smaller_mtu_behind_the_gateway(lab: Lab) -> None:
    with _scene(lab) as network:
        far = _far_host(network, mtu=1000)
        sink = far.spawn("sink", sys.executable, "-u", "-c", _SINK)
        sink.wait_until(lambda: "listening" in sink.output(), "listening")

        sent = network.client.run(sys.executable, "-c", _UPLOAD, FAR, timeout=30)

        assert sent.stdout.strip() == str(SIZE)


def test_a_trace_shows_the_routers_behind_the_gateway(lab: Lab) -> None:
    with _scene(lab) as network:
        _far_host(network)

        for target, router in ((FAR, ROUTER), (FAR_IPV6, ROUTER_IPV6)):
            traced = network.client.run("ping", "-n", "-c", "1", "-W", "5", "-t", "2", target, check=False)
            assert f"From {router} icmp_seq=1 Time" in traced.stdout


def test_a_container_downloads_from_a_server_that_gets_no_icmp_errors(lab: Lab) -> None:
    with _scene(lab) as network:
        container = _container(network)
        network.server.run("nft", "-f", "-", stdin=_NO_ICMP_ERRORS)

        loaded = container.run("iperf3", "-c", SERVER, "-n", str(SIZE), "-R", "-J", timeout=30)

        assert '"error"' not in loaded.stdout


def test_a_connection_from_the_wrong_address_is_refused_at_once(lab: Lab) -> None:
    with _scene(lab) as network:
        bound = network.client.run(sys.executable, "-c", _BOUND, SERVER, str(WEB_PORT), timeout=30)

        assert bound.stdout.split() == ["ConnectionRefusedError", "OSError"]  # EHOSTUNREACH


@pytest.mark.parametrize("size", [60, 1200])
def test_a_burst_of_datagrams_arrives_whole_in_both_directions(lab: Lab, size: int) -> None:
    with _scene(lab) as network:
        for program in network.server.programs:
            if program.name == "iperf3":
                program.stop()
        server = network.server.spawn("burst", sys.executable, "-u", "-c", _BURST_SERVER, str(IPERF_PORT), str(size))
        server.wait_until(lambda: "bound" in server.output(), "binding the port")

        arrived = network.client.run(
            sys.executable, "-c", _BURST_CLIENT, SERVER, str(IPERF_PORT), str(size), timeout=30
        )

        server.wait_until(lambda: "up" in server.output(), "counting the burst")
        assert (server.output().split()[-1], arrived.stdout.strip()) == ("500", "500")


@contextlib.contextmanager
def _scene(lab: Lab) -> Iterator[Network]:
    """Client and gateway, connected."""
    network = Network(lab)
    network.start_servers()
    product = Product(network)
    product.start()
    network.client.run("ping", "-c", "1", "-W", "10", SERVER)
    yield network
    product.stop()


def _far_host(network: Network, *, mtu: int = 1500) -> Host:
    """A host of the resource, with a router between it and the gateway; `mtu` is that of the router's far link."""
    lab, gateway = network.lab, network.gateway
    router, far = lab.host("router", forwards=True), lab.host("far")
    lab.cable(gateway, "eth2", router, "eth0")
    lab.cable(router, "eth1", far, "eth0")
    gateway.add_address("eth2", "10.21.0.1/24", "fd00:21::1/64")
    router.add_address("eth0", f"{ROUTER}/24", f"{ROUTER_IPV6}/64")
    router.add_address("eth1", "10.22.0.1/24", "fd00:22::1/64")
    far.add_address("eth0", f"{FAR}/32", "10.22.0.2/24", f"{FAR_IPV6}/128", "fd00:22::2/64")
    gateway.ip("route", "add", f"{FAR}/32", "via", ROUTER)
    gateway.ip("-6", "route", "add", f"{FAR_IPV6}/128", "via", ROUTER_IPV6)
    router.ip("route", "add", f"{FAR}/32", "via", "10.22.0.2")
    router.ip("-6", "route", "add", f"{FAR_IPV6}/128", "via", "fd00:22::2")
    far.ip("route", "add", "default", "via", "10.22.0.1")
    far.ip("-6", "route", "add", "default", "via", "fd00:22::1")
    if mtu != 1500:
        router.ip("link", "set", "eth1", "mtu", str(mtu))
    return far


def _container(network: Network) -> Host:
    """A host behind the client's, as Docker connects one."""
    container = network.lab.host("container")
    network.lab.cable(network.client, "docker0", container, "eth0")
    network.client.add_address("docker0", "172.17.0.1/16")
    container.add_address("eth0", "172.17.0.2/16")
    container.ip("route", "add", "default", "via", "172.17.0.1")
    network.client.sysctl("net.ipv4.ip_forward", "1")
    network.client.run("nft", "-f", "-", stdin=_DOCKER_NAT)
    return container


_DOCKER_NAT = """
table ip docker {
    chain postrouting {
        type nat hook postrouting priority srcnat;
        ip saddr 172.17.0.0/16 oifname != docker0 masquerade
    }
}
"""
_NO_ICMP_ERRORS = """
table ip filter {
    chain input { type filter hook input priority filter; icmp type destination-unreachable drop; }
}
"""
_SINK = f"""
import socket
listener = socket.create_server(("0.0.0.0", {IPERF_PORT}))
print("listening")
connection, _ = listener.accept()
size = 0
while data := connection.recv(65536):
    size += len(data)
connection.sendall(str(size).encode())
"""
_UPLOAD = f"""
import socket, sys
connection = socket.create_connection((sys.argv[1], {IPERF_PORT}), 10)
connection.settimeout(15)
connection.sendall(bytes({SIZE}))
connection.shutdown(socket.SHUT_WR)
print(connection.recv(99).decode())
"""
_BOUND = """
import socket, sys
target = (sys.argv[1], int(sys.argv[2]))
try:
    socket.create_connection(target, 10, ("203.0.113.20", 0))
except OSError as error:
    print(type(error).__name__)
unconnected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
unconnected.bind(("203.0.113.20", 0))
unconnected.connect(target)
unconnected.settimeout(10)
unconnected.send(b"x")
try:
    unconnected.recv(99)
except OSError as error:
    print(type(error).__name__)
"""
_BURST_SERVER = """
import socket, sys
port, size = map(int, sys.argv[1:])
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
server.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)
server.bind(("0.0.0.0", port))
print("bound")
count = 0
_, client = server.recvfrom(9)
server.settimeout(2)
while count < 500:
    try:
        count += len(server.recv(9999)) == size
    except TimeoutError:
        break
print("up", count)
for _ in range(500):
    server.sendto(bytes(size), client)
"""
_BURST_CLIENT = """
import socket, sys
host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
client.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)
client.connect((host, port))
client.send(b"hello")
for _ in range(500):
    client.send(bytes(size))
client.settimeout(5)
count = 0
while count < 500:
    try:
        client.recv(9999)
        count += 1
    except TimeoutError:
        break
print(count)
"""

"""The network of the demo and the benchmarks: who stands where, and what the private network offers.

portal ──┐
client ──┤ internet ├── gateway ── private network: a web server and an iperf3 server
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.system.hosts import Host, Lab
from tests.system.programs import NotReady, Program

PORTAL = "203.0.113.10"  # RFC 5737 and RFC 3849: addresses for documentation
CLIENT = "203.0.113.20"
GATEWAY = "203.0.113.30"
CLIENT_IPV6 = "2001:db8:113::20"
GATEWAY_IPV6 = "2001:db8:113::30"
PRIVATE_NETWORK = "10.20.0.0/24"
PRIVATE_NETWORK_IPV6 = "fd00:20::/64"
SERVER = "10.20.0.100"
SERVER_IPV6 = "fd00:20::100"
WEB_PORT = 80
IPERF_PORT = 5201

_INTERNET_ROUTERS = ("203.0.113.1", "2001:db8:113::1")
_TCP_LISTEN = "0A"  # state column of /proc/net/tcp, proc(5)


class Network:
    """The four hosts, plugged in and addressed; the private network's servers run.

    The server knows no route beyond its own network: what reaches it came masqueraded by the gateway.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.internet = lab.switch("internet")
        self.internet.route(f"{_INTERNET_ROUTERS[0]}/24", f"{_INTERNET_ROUTERS[1]}/64")
        self.portal = self._on_the_internet("portal", f"{PORTAL}/24", "2001:db8:113::10/64")
        self.client = self._on_the_internet("client", f"{CLIENT}/24", f"{CLIENT_IPV6}/64")
        self.gateway = self._on_the_internet("gateway", f"{GATEWAY}/24", f"{GATEWAY_IPV6}/64")
        self.server = lab.host("server")
        lab.cable(self.gateway, "eth1", self.server, "eth0")
        self.gateway.add_address("eth1", "10.20.0.1/24", "fd00:20::1/64")
        self.server.add_address("eth0", f"{SERVER}/24", f"{SERVER_IPV6}/64")

    def start_servers(self) -> None:
        """Start the web server and the iperf3 server; returns once both listen."""
        script = str(Path(__file__).with_name("web_server.py"))
        web = self.server.spawn("web", sys.executable, script, str(WEB_PORT))
        iperf = self.server.spawn("iperf3", "iperf3", "--server", "--port", str(IPERF_PORT))
        web.wait_ready()
        _wait_listening(iperf, IPERF_PORT)

    def _on_the_internet(self, name: str, *addresses: str) -> Host:
        host = self.lab.host(name)
        self.internet.plug(host, *addresses, gateways=_INTERNET_ROUTERS)
        return host


def _wait_listening(program: Program, port: int, timeout: float = 10.0) -> None:
    """Block until somebody listens on that TCP port on the program's host, without connecting to it."""
    deadline = time.monotonic() + timeout
    while not _is_listening(program.pid, port):
        if not program.is_running or time.monotonic() > deadline:
            raise NotReady(f"{program.name} does not listen on port {port}:\n{program.output()}")
        time.sleep(0.01)


def _is_listening(pid: int, port: int) -> bool:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == _TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False

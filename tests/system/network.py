"""The network of the demo and the benchmarks: its hosts, addresses and servers.

portal ─────────┐            ┌── relay
client ── NAT ──┤  internet  ├── NAT ── gateway ── private network: a web server and an iperf3 server

By default there are no NATs: client and gateway have public addresses.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.system import nat as nats
from tests.system.hosts import Host, Lab, Switch

PORTAL = "203.0.113.10"  # RFC 5737 and RFC 3849: addresses for documentation
CLIENT = "203.0.113.20"
GATEWAY = "203.0.113.30"
PORTAL_IPV6 = "2001:db8:113::10"
CLIENT_IPV6 = "2001:db8:113::20"
GATEWAY_IPV6 = "2001:db8:113::30"
RELAYS = {"relay": ("203.0.113.40", "2001:db8:113::40"), "relay2": ("203.0.113.41", "2001:db8:113::41")}
"""The public addresses of each relay's host."""
PRIVATE_NETWORK = "10.20.0.0/24"
PRIVATE_NETWORK_IPV6 = "fd00:20::/64"
SERVER = "10.20.0.100"
SERVER_IPV6 = "fd00:20::100"
WEB_PORT = 80
IPERF_PORT = 5201

_CLIENT_PLACE = nats.Place(CLIENT, CLIENT_IPV6, 20)
_GATEWAY_PLACE = nats.Place(GATEWAY, GATEWAY_IPV6, 30)
_OTHER_IPV4 = "198.51.100"  # prefix of another provider's addresses
_OTHER_IPV6 = "2001:db8:51"
_TCP_LISTEN = "0A"  # state column of /proc/net/tcp, proc(5)


class Network:
    """All hosts, with links and addresses. `start_servers` starts the private network's servers.

    The server has no route out of its own network, so it only gets packets masqueraded by the gateway.
    """

    def __init__(self, lab: Lab, nat: str = "none") -> None:
        """`nat` is the NAT of client and gateway: one kind for both, or `client,gateway`; see `tests.system.nat`.

        Raises: ValueError.
        """
        self.lab = lab
        self.internet = lab.switch("internet")
        self.internet.route(f"{nats.INTERNET_ROUTERS[0]}/24", f"{nats.INTERNET_ROUTERS[1]}/64")
        self.portal = self._on_the_internet("portal", PORTAL, PORTAL_IPV6)
        self.server = lab.host("server")
        self._other_provider: Switch | None = None
        self._connect_sites(nat)

    def relay(self, name: str = "relay") -> Host:
        """The host of a relay of RELAYS, on the internet. The first call creates it."""
        return self.lab.hosts.get(name) or self._on_the_internet(name, *RELAYS[name])

    def replace_sites(self, nat: str) -> None:
        """Replace the client, the gateway and their NATs by new hosts, behind NATs of another kind.

        The portal, the relays and the server remain, with their programs.

        Raises: ValueError.
        """
        for host in (self.client, *self.client_nats, self.gateway, *self.gateway_nats):
            self.lab.remove(host)
        for host in self.lab.hosts.values():
            host.ip("neigh", "flush", "all")  # the new hosts have the same addresses
        self._connect_sites(nat)

    def portal_host(self, host: Host) -> str:
        """The portal's address for URLs, of a family that the host has."""
        has_ipv4 = host not in (self.client, self.gateway) or self._kind(host) != "v6"
        return PORTAL if has_ipv4 else f"[{PORTAL_IPV6}]"

    def roam(self, host: Host) -> None:
        """Take the host's eth0 down, and connect it to another provider's network by a new interface.

        The new addresses and default routes are set when this returns.
        """
        provider = self._other_provider or self._build_other_provider()
        number = (_CLIENT_PLACE if host is self.client else _GATEWAY_PLACE).number
        host.ip("link", "set", "eth0", "down")
        addresses = (f"{_OTHER_IPV4}.{number}/24", f"{_OTHER_IPV6}::{number}/64")
        provider.plug(host, *addresses, interface="wlan0", gateways=(f"{_OTHER_IPV4}.1", f"{_OTHER_IPV6}::1"))

    def start_servers(self) -> None:
        """Start the web server and the iperf3 server. Returns when both are listening."""
        script = str(Path(__file__).with_name("web_server.py"))
        web = self.server.spawn("web", sys.executable, script, str(WEB_PORT))
        iperf = self.server.spawn("iperf3", "iperf3", "--server", "--port", str(IPERF_PORT))
        web.wait_ready()
        iperf.wait_until(
            lambda: iperf.is_running and _is_listening(iperf.pid, IPERF_PORT), f"listening on port {IPERF_PORT}"
        )

    def _connect_sites(self, nat: str) -> None:
        self.nat = nats.Pair.parse(nat)
        self.client = self.lab.host("client")
        self.gateway = self.lab.host("gateway")
        self.client_nats = nats.connect(self.lab, self.client, self.internet, _CLIENT_PLACE, self.nat.client)
        self.gateway_nats = nats.connect(self.lab, self.gateway, self.internet, _GATEWAY_PLACE, self.nat.gateway)
        self.lab.cable(self.gateway, "eth1", self.server, "eth0")
        self.gateway.add_address("eth1", "10.20.0.1/24", "fd00:20::1/64")
        self.server.add_address("eth0", f"{SERVER}/24", f"{SERVER_IPV6}/64")

    def _on_the_internet(self, name: str, *addresses: str) -> Host:
        host = self.lab.host(name)
        nats.plug(host, self.internet, *addresses)
        return host

    def _kind(self, host: Host) -> str:
        return self.nat.client if host is self.client else self.nat.gateway

    def _build_other_provider(self) -> Switch:
        """Create another provider's network, connected to the internet by a cable between the routers."""
        self._other_provider = provider = self.lab.switch("provider")
        provider.route(f"{_OTHER_IPV4}.1/24", f"{_OTHER_IPV6}::1/64")
        near, far = provider.host, self.internet.host
        self.lab.cable(near, "uplink", far, "provider")
        near.add_address("uplink", "192.0.2.1/30", "2001:db8:2::1/64")
        far.add_address("provider", "192.0.2.2/30", "2001:db8:2::2/64")
        for next_hop in ("192.0.2.2", "2001:db8:2::2"):
            near.ip("route", "add", "default", "via", next_hop)
        far.ip("route", "add", f"{_OTHER_IPV4}.0/24", "via", "192.0.2.1")
        far.ip("route", "add", f"{_OTHER_IPV6}::/64", "via", "2001:db8:2::1")
        return provider


def _is_listening(pid: int, port: int) -> bool:
    """Whether a process listens on this TCP port in the network namespace of `pid`, without connecting to it."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == _TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False

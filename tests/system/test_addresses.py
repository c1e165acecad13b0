"""Addresses of the client's host come, rotate and go, and its way to the internet is a VPN, while traffic flows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tests.system.hosts import Host, Lab
from tests.system.namespace import inside
from tests.system.nat import plug
from tests.system.network import CLIENT, CLIENT_IPV6, SERVER, WEB_PORT, Network
from tests.system.product import Product
from tests.system.traffic import Download, Ping

pytestmark = [pytest.mark.namespaces, pytest.mark.serial]

ROAMING = 2.0  # seconds: docs/decisions.md, 3
_NEWER = "2001:db8:113::77"
_RESETS = {"network:moved", "client:reset", "tunnel:connection_failed", "portal:connection_lost"}


@pytest.mark.parametrize("nat", ["none", "v6-v4"])
def test_what_does_not_change_the_way_out_resets_nothing(lab: Lab, nat: str) -> None:
    """In the pair `v6-v4` the path leads through a relay that knows the client by its IPv6 address."""
    with _scene(lab, nat) as (network, product, ping, download):
        client = network.client

        client.ip("link", "add", "docker0", "type", "bridge")
        client.add_address("docker0", "172.17.0.1/16", "fd00:17::1/64")
        client.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        for name in ("docker0", "veth0", "veth1"):
            client.ip("link", "set", name, "up")
        client.ip("address", "add", f"{_NEWER}/64", "dev", "eth0")  # the kernel prefers it from now on
        client.ip("route", "add", "192.0.2.0/24", "dev", "docker0")
        time.sleep(5)

        _assert_nothing_was_lost(product, ping, download)
        offered = {address.split("%")[0] for event in product.client.events() for address in event.get("hosts", ())}
        assert not offered & {"172.17.0.1", "fd00:17::1"}


@pytest.mark.parametrize(("nat", "lost"), [("none", 0), ("v6-v4", 10)])
def test_a_privacy_address_that_rotates_resets_nothing(lab: Lab, nat: str, lost: int) -> None:
    """A relay gives its allocation to one address: another costs a moment."""
    with _scene(lab, nat) as (network, product, ping, download):
        client = network.client

        client.ip("address", "add", f"{_NEWER}/64", "dev", "eth0")
        time.sleep(4)
        client.ip("address", "change", f"{CLIENT_IPV6}/64", "dev", "eth0", "preferred_lft", "0")
        time.sleep(4)

        _assert_nothing_was_lost(product, ping, download, tolerated=lost)


@pytest.mark.parametrize("nat", ["none", "none,cone"])
def test_a_vpn_that_takes_all_traffic_is_a_way_to_a_direct_path(lab: Lab, nat: str) -> None:
    with _vpn(lab, nat) as (network, _):
        product = Product(network, relays=("relay",))
        product.start()
        with Ping(network.client, SERVER), Download(network.client, SERVER, WEB_PORT) as download:
            product.wait_path("direct")
            download.wait_for_more()
        assert str(product.path()["local"]).startswith(f"{Vpn.CLIENT}:")
        product.stop()


def test_a_vpn_that_comes_and_goes_is_another_network(lab: Lab) -> None:
    with _vpn(lab, "none", is_up=False) as (network, vpn):
        product = Product(network, relays=("relay",))
        product.start()
        with Ping(network.client, SERVER) as ping, Download(network.client, SERVER, WEB_PORT) as download:
            for change, local in ((vpn.connect, Vpn.CLIENT), (vpn.disconnect, CLIENT)):
                change()
                began = time.time()
                assert ping.wait_steady(began) < ROAMING
                download.wait_for_more()
                product.wait_settled()
                assert product.path()["path"] == "direct"
                assert str(product.path()["local"]).startswith(f"{local}:")
        product.stop()


class Vpn:
    """A full tunnel: all packets but its own leave through a TUN device, by a rule that is looked at after ours.

    Its other end is a router on the internet with a masquerade. The packets go from device to device in this process.
    """

    CLIENT = "10.8.0.2"
    ROUTER = "10.8.0.1"
    PUBLIC = "203.0.113.50"
    TABLE, MARK, PRIORITY = "51820", "0xca6c", "32764"  # as wg-quick has them

    def __init__(self, network: Network) -> None:
        self._client = network.client
        self._router = network.lab.host("vpn", forwards=True)
        plug(self._router, network.internet, self.PUBLIC)
        self._router.run("nft", "-f", "-", stdin=_MASQUERADE)
        self._devices = [_open_tun(host, "vpn0") for host in (self._client, self._router)]
        self._ended, self._end = os.pipe()
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()
        self._router.ip("address", "add", self.ROUTER, "peer", f"{self.CLIENT}/32", "dev", "vpn0")
        self._router.ip("link", "set", "vpn0", "up")

    def connect(self) -> None:
        self._client.ip("address", "add", self.CLIENT, "peer", f"{self.ROUTER}/32", "dev", "vpn0")
        self._client.ip("link", "set", "vpn0", "up")
        self._client.ip("route", "add", "default", "dev", "vpn0", "table", self.TABLE)
        self._client.ip("rule", "add", "not", "fwmark", self.MARK, "table", self.TABLE, "priority", self.PRIORITY)

    def disconnect(self) -> None:
        self._client.ip("rule", "delete", "priority", self.PRIORITY)
        self._client.ip("link", "set", "vpn0", "down")
        self._client.ip("address", "flush", "dev", "vpn0")

    def close(self) -> None:
        os.close(self._end)
        self._carrier.join()
        for fd in (*self._devices, self._ended):
            os.close(fd)

    def _carry(self) -> None:
        first, second = self._devices
        other = {first: second, second: first}
        while True:
            for fd in select.select([*self._devices, self._ended], [], [])[0]:
                if fd == self._ended:
                    return
                with contextlib.suppress(OSError):  # the other end is down
                    os.write(other[fd], os.read(fd, 65536))


def _open_tun(host: Host, name: str) -> int:
    with inside(host):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


@contextlib.contextmanager
def _vpn(lab: Lab, nat: str, *, is_up: bool = True) -> Iterator[tuple[Network, Vpn]]:
    network = Network(lab, nat)
    network.start_servers()
    network.client.ip("-6", "address", "flush", "dev", "eth0")  # or else a direct path would bypass the VPN
    vpn = Vpn(network)
    try:
        if is_up:
            vpn.connect()
        yield network, vpn
    finally:
        vpn.close()


@contextlib.contextmanager
def _scene(lab: Lab, nat: str) -> Iterator[tuple[Network, Product, Ping, Download]]:
    network = Network(lab, nat)
    network.start_servers()
    product = Product(network, relays=("relay",), log_level="debug")
    product.start()
    with Ping(network.client, SERVER) as ping, Download(network.client, SERVER, WEB_PORT) as download:
        download.wait_for_more()
        product.wait_settled()
        yield network, product, ping, download
    product.stop()


def _assert_nothing_was_lost(product: Product, ping: Ping, download: Download, *, tolerated: int = 0) -> None:
    ping.wait_steady(time.time())
    download.wait_for_more()
    numbers = [answer.number for answer in ping.answers()]
    missing = numbers[-1] - len(numbers)
    print(f"{missing} pings were lost")
    assert missing <= tolerated
    for program in (product.client, product.gateway):
        assert not {event.get("message_type") for event in program.events()} & _RESETS


_TUNSETIFF = 0x400454CA  # <linux/if_tun.h>
_IFF_TUN = 0x1
_IFF_NO_PI = 0x1000
_MASQUERADE = """
table inet test {
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "eth0" masquerade
    }
    chain input {
        type filter hook input priority filter
        iifname "eth0" udp dport > 1023 ct state new drop
    }
}
"""

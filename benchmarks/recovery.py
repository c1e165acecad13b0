"""The length of interruptions after failures, measured by pings at 20 Hz during a download."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.cases import OURS, Figures
from benchmarks.experiment import Wanted, network
from tests.system.network import RELAYS, SERVER, WEB_PORT, Network
from tests.system.product import Product
from tests.system.traffic import PING_INTERVAL, Answer, Download, Ping

_REJOINED_WITHIN = 15.0  # seconds after the portal is running again


class NotInterrupted(Exception):
    """The failed component was not in use, so there was no interruption to measure."""


class Recovery:
    """One event: the time from its start until traffic is stable again."""

    competitor = OURS

    def __init__(self, case: str) -> None:
        self.title = case
        self.cases = frozenset({case})
        self._case = case

    def run(self, wanted: Wanted) -> Figures:
        event = _EVENTS[self._case]
        with network(event.nat) as hosts:
            product = Product(hosts, relays=event.relays)
            product.start()
            with Download(hosts.client, SERVER, WEB_PORT) as download, Ping(hosts.client, SERVER) as ping:
                download.wait_for_more()
                product.wait_settled()  # before that, ICE may still switch away from the relay that is about to fail
                began = time.time()
                event.happen(hosts, product)
                ping.wait_steady(time.time())
                if event.keeps_connections:
                    download.wait_for_more()
                silence = silence_in(ping.answers(), since=began)
            if event.must_interrupt and not silence:
                raise NotInterrupted(f"{self._case}: no ping was missed, so the relay was not in use")
            for relay in event.relays:
                if product.relay(relay).is_running:
                    product.relay(relay).send_signal(signal.SIGCONT)  # a stopped process does not handle SIGTERM
            product.stop()
        return {self._case: [silence]}


def silence_in(answers: Sequence[Answer], *, since: float) -> float:
    """The longest time between two replies in seconds, minus the usual interval; 0 if no reply was missed."""
    before = [answer.arrived_at for answer in answers if answer.arrived_at < since]
    after = [answer.arrived_at for answer in answers if answer.arrived_at >= since]
    arrivals = sorted([max(before, default=since), *after])
    longest = max((later - earlier for earlier, later in pairwise(arrivals)), default=0.0)
    return longest - PING_INTERVAL if longest > 2 * PING_INTERVAL else 0.0


def _roam(hosts: Network, product: Product) -> None:
    hosts.roam(hosts.client)


def _kill_relay(hosts: Network, product: Product) -> None:
    product.relay(_relay_in_use(product)).kill()


def _silence_relay(hosts: Network, product: Product) -> None:
    product.relay(_relay_in_use(product)).send_signal(signal.SIGSTOP)


def _restart_gateway(hosts: Network, product: Product) -> None:
    product.restart_gateway()


def _restart_portal(hosts: Network, product: Product) -> None:
    """Kill and restart the portal, and wait until all programs have rejoined it."""
    product.portal.kill()
    product.start_portal()
    product.wait_rejoined(_REJOINED_WITHIN)


class _Event(NamedTuple):
    happen: Callable[[Network, Product], None]
    nat: str
    relays: tuple[str, ...] = ("relay",)
    must_interrupt: bool = False
    """The event must interrupt the traffic: a silence of 0 means that the measurement is invalid."""
    keeps_connections: bool = True
    """The TCP connection must survive."""


_EVENTS = {
    "recover-roaming": _Event(_roam, "cone"),
    "recover-relay-death": _Event(_kill_relay, "symmetric", tuple(RELAYS), must_interrupt=True),
    "recover-relay-silent": _Event(_silence_relay, "symmetric", tuple(RELAYS), must_interrupt=True),
    "recover-gateway-restart": _Event(
        _restart_gateway,
        "cone",
        keeps_connections=False,  # without masquerading, the gateway's host resets the server's connections
    ),
    "recover-portal-restart": _Event(_restart_portal, "symmetric"),
}


def _relay_in_use(product: Product) -> str:
    """The relay whose address the client uses to send to the gateway."""
    host = product.path()["local"].rpartition(":")[0].strip("[]")
    return next(name for name, addresses in RELAYS.items() if host in addresses)

"""What breaks on the way is noticed as a silence: how long it is, by a ping of 20 Hz, while a download goes on."""

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

_REJOINED_WITHIN = 15.0  # seconds, after the portal is back


class NothingBroke(Exception):
    """What was broken was not in use, so there is nothing to recover from and nothing to measure."""


class Recovery:
    """One event, from traffic that flows to traffic that flows again."""

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
                product.wait_settled()  # until then ICE may still leave the relay that is about to break
                began = time.time()
                event.happen(hosts, product)
                ping.wait_steady(time.time())
                if event.keeps_connections:
                    download.wait_for_more()
                silence = silence_in(ping.answers(), since=began)
            if event.must_interrupt and not silence:
                raise NothingBroke(f"{self._case}: no ping was missed, so the relay was not in use")
            for relay in event.relays:
                if product.relay(relay).is_running:
                    product.relay(relay).send_signal(signal.SIGCONT)  # a stopped one can't be asked to end
            product.stop()
        return {self._case: [silence]}


def silence_in(answers: Sequence[Answer], *, since: float) -> float:
    """The longest time between two answers, less what is usual: seconds; 0 where no answer was missed."""
    before = [answer.arrived_at for answer in answers if answer.arrived_at < since]
    arrivals = sorted([max(before, default=since), *(one.arrived_at for one in answers if one.arrived_at >= since)])
    longest = max((later - one for one, later in pairwise(arrivals)), default=0.0)
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
    """Killed and started again; over when everybody has joined it again."""
    product.portal.kill()
    product.start_portal()
    product.wait_rejoined(_REJOINED_WITHIN)


class _Event(NamedTuple):
    happen: Callable[[Network, Product], None]
    nat: str
    relays: tuple[str, ...] = ("relay",)
    must_interrupt: bool = False
    """Traffic can't go on without a pause: a silence of 0 says that something else was measured."""
    keeps_connections: bool = True
    """The TCP connection must survive."""


_EVENTS = {
    "recover-roaming": _Event(_roam, "cone"),
    "recover-relay-death": _Event(_kill_relay, "symmetric", tuple(RELAYS), must_interrupt=True),
    "recover-relay-silent": _Event(_silence_relay, "symmetric", tuple(RELAYS), must_interrupt=True),
    "recover-gateway-restart": _Event(
        _restart_gateway,
        "cone",
        keeps_connections=False,  # without its masquerade, the gateway's host resets what the server goes on sending
    ),
    "recover-portal-restart": _Event(_restart_portal, "symmetric"),
}


def _relay_in_use(product: Product) -> str:
    """The relay that gave the client the address from which its datagrams come to the gateway."""
    host = product.path()["local"].rpartition(":")[0].strip("[]")
    return next(name for name, addresses in RELAYS.items() if host in addresses)

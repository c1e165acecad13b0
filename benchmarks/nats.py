"""The time to the first byte through every kind of NAT, including the connection setup."""

from __future__ import annotations

from benchmarks import load
from benchmarks.cases import OURS, Figures
from benchmarks.experiment import Wanted, network
from tests.system.product import Product

_FIRST_BYTES = 3  # new clients per round


class FirstByte:
    """Client and gateway behind NATs of this kind or pair of kinds, with one relay."""

    competitor = OURS

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._case = f"nat-first-byte-{kind}"
        self.title = f"NAT {kind}"
        self.cases = frozenset({self._case})

    def run(self, wanted: Wanted) -> Figures:
        with network(self._kind) as hosts:
            product = Product(hosts, relays=("relay",))
            product.start()
            times = [load.first_byte_ms(hosts.client)]
            for _ in range(_FIRST_BYTES - 1):
                product.restart_client()
                times.append(load.first_byte_ms(hosts.client))
            product.stop()
        return {self._case: times}

"""Programs that outlast a test: most of a test's processor time would go into their start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.hosts import Lab
from tests.system.network import Network
from tests.system.product import Product


@pytest.fixture(scope="session")
def center(shared_lab: Lab) -> Iterator[Product]:
    """The portal, a relay and the private network's servers.

    They serve one client and one gateway after the other: `Network.replace_sites`, `Product.start_sites`.
    """
    network = Network(shared_lab, "v6-v4")  # so that the portal listens on addresses of both families
    network.start_servers()
    product = Product(network, relays=("relay",))
    product.start_portal()
    product.start_relay()
    yield product
    product.stop()

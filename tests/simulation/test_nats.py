"""Every pair of NATs connects, directly if possible, and then within three seconds (docs/decisions.md, 8)."""

from __future__ import annotations

import itertools

import pytest

from firezone_tunnel.core.snownet.events import ConnectionFailed, Role
from tests.simulation.internet import Internet, exchange, way
from tests.simulation.nat import KINDS, expected_way
from tests.unit.core.snownet.world import assert_no_slot_is_lost, datagram


@pytest.mark.parametrize(("client_nat", "gateway_nat"), list(itertools.product(KINDS, KINDS)))
def test_every_pair_of_nats_connects_as_expected_and_loses_no_packet(client_nat: str, gateway_nat: str) -> None:
    internet = Internet()
    internet.relay(), internet.relay()
    client = internet.host_behind(client_nat, Role.CLIENT)
    gateway = internet.host_behind(gateway_nat, Role.GATEWAY)
    internet.run(1.0)
    internet.introduce(client, gateway)
    start = internet.now
    client.send(gateway, datagram("first"))

    internet.run_until(lambda: bool(gateway.texts()), within=1.0)
    for number in range(60):
        client.send(gateway, datagram(str(number)))
        internet.run(0.05)
    assert internet.now - start < 4.1
    expected = expected_way(client_nat, gateway_nat)
    assert (way(client, gateway), way(gateway, client)) == (expected, expected)
    internet.run(30.0)

    assert gateway.texts() == ["first", *map(str, range(60))]
    exchange(internet, client, gateway, within=1.0)
    assert (way(client, gateway), way(gateway, client)) == (expected, expected)
    assert client.of(ConnectionFailed) == gateway.of(ConnectionFailed) == []
    assert_no_slot_is_lost([client, gateway])

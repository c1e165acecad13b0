"""A change costs what it changes, not what there is: the same number of calls in tables of every size.

Calls are counted because time is not the same on a busy machine. `benchmarks/core_changes.py` has the times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count

import attrs
import pytest

from benchmarks.core_changes import Change, Grant, access, client_with, gateway_with
from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.tunnel.client import ClientTunnel
from firezone_tunnel.core.tunnel.gateway import GatewayTunnel
from tests.unit.core.tunnel.world import datagram, joined

LARGER = 16
TOLERANCE = 1.5  # a binary search has a few steps more
Action = Callable[[], object]


@pytest.mark.parametrize("seconds_between", [1.0, 0.001])
def test_a_resource_that_moves_costs_a_client_the_same_however_many_it_has(seconds_between: float) -> None:
    assert_same_cost(lambda size: Change(client_with(size), seconds_between=seconds_between).next, 500)


@pytest.mark.parametrize(
    "changes",
    [
        {"filters": [Filter(protocol="icmp")]},
        {"rid": "another"},  # of the same network
        {"address": "0.0.0.0/0"},
        {"address": "fd00::/64"},
    ],
)
def test_a_resource_that_changes_and_goes_costs_a_client_the_same_however_many_it_has(
    changes: dict[str, object],
) -> None:
    def prepare(size: int) -> Action:
        client = client_with(size)
        before = access(7)
        after = attrs.evolve(before, **changes)

        def change() -> None:
            for message in (
                to_client.ResourceChanged(resource=after.for_client()),
                to_client.ResourceDeleted(id=after.rid),
                to_client.ResourceChanged(resource=before.for_client()),
            ):
                drain(client.tunnel, message, client.world.now)

        return change

    assert_same_cost(prepare, 500)


def test_a_flow_costs_a_client_the_same_however_many_its_gateway_serves() -> None:
    def prepare(size: int) -> Action:
        world, client, _ = joined(*(attrs.evolve(access(number), filters=[]) for number in range(size + 10)))
        numbers = count()

        def flow() -> None:
            number = next(numbers)
            packet = datagram("hello", f"10.100.{number >> 8}.{number & 255}")
            client.tunnel.handle_packets([packet], world.now, world.utc)
            drain(client.tunnel, world.portal.flow(client, str(number))[1], world.now)

        for _ in range(size):
            flow()
        return flow

    assert_same_cost(prepare, 60)


def test_a_flow_costs_a_gateway_the_same_however_many_the_client_has() -> None:
    assert_same_cost(lambda size: Grant(size).next, 60)


@pytest.mark.parametrize("kind", ["filters", "expiry"])
def test_an_update_costs_a_gateway_the_same_however_many_the_client_has(kind: str) -> None:
    def prepare(size: int) -> Action:
        world, client, gateway = gateway_with(size)
        one = access(7)
        expiries = count(int(world.utc) + 10)

        def update() -> None:
            message: to_gateway.FromPortal = to_gateway.ResourceUpdated(resource=one.for_gateway())
            if kind == "expiry":
                message = to_gateway.ExpiryUpdated(
                    client_id=client.name, resource_id=one.rid, expires_at=next(expiries)
                )
            drain(gateway.tunnel, message, world.now)

        return update

    assert_same_cost(prepare, 60)


def test_an_update_costs_a_gateway_nothing_for_clients_without_the_resource() -> None:
    def prepare(size: int) -> Action:
        world, _, gateway = gateway_with(1)
        world.portal.add(access(1))
        for number in range(2, size):
            gateway.hear(world.portal.flow(world.add_client(f"client {number}", number), "1")[0])
        return lambda: drain(gateway.tunnel, to_gateway.ResourceUpdated(resource=access(0).for_gateway()), world.now)

    assert_same_cost(prepare, 6)


def assert_same_cost(prepare: Callable[[int], Action], size: int) -> None:
    """`prepare(size)` makes a table of so many entries, and returns the action to measure on it."""
    small, large = calls(prepare(size)), calls(prepare(size * LARGER))

    assert large < TOLERANCE * small, f"{small} calls with {size} entries, {large} with {LARGER} times as many"


def calls(action: Action) -> int:
    """The fewest calls of functions, Python's and C's, that one of several actions makes."""
    return min(_calls(action) for _ in range(5))


def _calls(action: Action) -> int:
    made = 0

    def count_call(_frame: object, event: str, _argument: object) -> None:
        nonlocal made
        made += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        action()
    finally:
        sys.setprofile(before)
    return made


def drain(tunnel: ClientTunnel | GatewayTunnel, message: object, now: float) -> None:
    """Handle a message, and drop the output."""
    tunnel.handle_message(message, now, now)  # type: ignore[arg-type]
    list(tunnel.events())
    for transmit in tunnel.transmits():
        transmit.release()

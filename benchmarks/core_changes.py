"""Changes of what a client or a gateway knows, without I/O, in tables of the size that large accounts have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from benchmarks.core_steps import Case
from firezone_tunnel.core.messages import client as to_client
from firezone_tunnel.core.messages import gateway as to_gateway
from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.tunnel.gateway import FlowAuthorized, FlowEnded
from tests.unit.core.tunnel.world import Access, Client, Gateway, World, datagram, joined

RESOURCES = 10_000
GRANTED = 1_000


def change_cases() -> Iterator[Case]:
    for seconds, name in ((1.0, "a lone change"), (0.001, "one change of 1,000 a second")):
        change = Change(client_with(RESOURCES), seconds_between=seconds)
        yield Case(f"client, {RESOURCES:,} resources: {name}", change.next)
    yield Case(f"gateway, {GRANTED:,} resources: grant and revoke", Grant(GRANTED).next)


class Change:
    """A resource of a client is elsewhere with each call; the reports that are due are read, and a packet passes."""

    def __init__(self, client: Client, *, seconds_between: float) -> None:
        self._client = client
        self._seconds = seconds_between
        self._now = client.world.now
        self._numbers = count()

    def next(self) -> None:
        tunnel = self._client.tunnel
        self._now += self._seconds
        moved = access(next(self._numbers) & 0xFFFF, "10.200", rid="moving").for_client()
        tunnel.handle_message(to_client.ResourceChanged(resource=moved), self._now, self._now)
        list(tunnel.events())
        tunnel.handle_packets([_PACKET], self._now, self._now)


class Grant:
    """A client of a gateway gets a flow and loses it again with each call."""

    def __init__(self, granted: int) -> None:
        self._world, client, self._gateway = gateway_with(granted)
        one_more = self._world.portal.add(access(granted))
        self._flow, _ = self._world.portal.flow(client, one_more.rid)
        self._end = to_gateway.RejectAccess(client_id=client.name, resource_id=one_more.rid)

    def next(self) -> None:
        tunnel, now, utc = self._gateway.tunnel, self._world.now, self._world.utc
        tunnel.handle_message(self._flow, now, utc)
        tunnel.handle_message(self._end, now, utc)
        assert {FlowAuthorized, FlowEnded} <= {type(event) for event in tunnel.events()}
        for transmit in tunnel.transmits():
            transmit.release()


def client_with(resources: int) -> Client:
    world, client, _ = joined(_NET)
    client.hear(
        to_client.Init(
            interface=client.interface,
            resources=[_NET.for_client(), *(access(number).for_client() for number in range(resources - 1))],
        )
    )
    world.run(1)
    return client


def gateway_with(resources: int) -> tuple[World, Client, Gateway]:
    """A gateway and a client of it that may use so many resources, each for a limited time."""
    world, client, gateway = joined()
    for number in range(resources):
        world.portal.add(access(number, expires_at=int(world.utc) + 3600 + number))
        gateway.hear(world.portal.flow(client, str(number))[0])
    return world, client, gateway


def access(number: int, prefix: str = "10.100", *, rid: str | None = None, expires_at: int | None = None) -> Access:
    """A resource of one address and one port. `number` is below 65,536, and its id by default."""
    port = Filter(protocol="tcp", port_range_start=number, port_range_end=number)
    address = f"{prefix}.{number >> 8}.{number & 255}/32"
    return Access(rid or str(number), address, "gateway", [port], expires_at=expires_at)


_NET = Access("net", "10.20.0.0/24", "gateway")
_PACKET = datagram("hello")

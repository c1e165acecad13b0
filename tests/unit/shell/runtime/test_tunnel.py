"""Between the core and the transports: portions, and exceptions of the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.packet.superpacket import SuperPacket
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import LayerCounters, NodeCounters
from firezone_tunnel.core.tunnel.client import ClientCounters
from firezone_tunnel.errors import FirezoneError, InternalError, PlatformError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.runtime.tunnel import TunnelService

PEER, OURS = SocketAddress("192.0.2.1", 1), SocketAddress("192.0.2.2", 2)


class FailingCore:
    """Fails while `fails` is set, and records its input otherwise."""

    def __init__(self) -> None:
        self.counters = ClientCounters()
        self.node = attrs.make_class("Node", ["counters", "layers"])(NodeCounters(), LayerCounters())
        self.portions: list[list[SuperPacket]] = []
        self.datagrams = 0
        self.fails = False

    def handle_packets(self, packets: list[SuperPacket], now: float, utc_now: float) -> list[SuperPacket]:
        if self.fails:
            raise KeyError("a bug")
        self.portions.append(packets)
        return []

    def handle_datagrams(self, batch: DatagramBatch, now: float, utc_now: float) -> list[SuperPacket]:
        if self.fails:
            raise RecursionError("a bug")
        self.datagrams += batch.count
        return []

    def transmits(self) -> Iterator[Any]:
        return iter(())

    events = transmits

    def next_timeout(self) -> None:
        return None

    def set_local_addresses(self, addresses: Sequence[SocketAddress], now: float) -> None: ...

    def close(self, now: float) -> None: ...


@pytest.fixture
def core() -> FailingCore:
    return FailingCore()


@pytest.fixture
def tunnel(core: FailingCore) -> Iterator[TunnelService]:
    tunnel = _tunnel(core)
    yield tunnel
    tunnel.stopService()


def test_a_failure_over_one_batch_is_logged_and_the_next_batch_is_handled(
    core: FailingCore, tunnel: TunnelService, logged: list[dict[str, Any]]
) -> None:
    core.fails = True
    tunnel.batch_received(_batch())
    tunnel.packets_received([_packet(run=False)])

    core.fails = False
    tunnel.batch_received(_batch())
    tunnel.packets_received([_packet(run=False)])

    assert core.datagrams == 1
    assert len(core.portions) == 1
    failures = [message for message in logged if message["message_type"] == "tunnel:callback_failed"]
    assert ["handle_datagrams" in message["traceback"] for message in failures] == [True, False]
    assert all("a bug" in message["traceback"] for message in failures)


def test_failures_do_not_fill_the_log(core: FailingCore, tunnel: TunnelService, logged: list[dict[str, Any]]) -> None:
    core.fails = True

    for _ in range(1000):
        tunnel.batch_received(_batch())

    assert len([message for message in logged if message["message_type"] == "tunnel:callback_failed"]) == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [(ConnectionLost("the network interface was removed"), PlatformError), (KeyError("a bug"), InternalError)],
)
def test_a_lost_transport_is_reported_once_by_the_owner(
    core: FailingCore, logged: list[dict[str, Any]], reason: Exception, kind: type[FirezoneError]
) -> None:
    lost: list[FirezoneError] = []
    tunnel = TunnelService(reactor, core, open_device=[].append, on_event=[].append, on_lost=lost.append, mark=None)

    tunnel.lost(Failure(reason))
    tunnel.lost(Failure(ConnectionDone()))

    (error,) = lost
    assert type(error) is kind
    assert str(reason) in str(error)
    assert logged == []


def test_dropped_packets_are_logged_at_the_end(core: FailingCore, logged: list[dict[str, Any]]) -> None:
    log.set_threshold(log.DEBUG)
    core.node.counters.unrecognized = 3
    core.node.layers.wireguard.forged = 2
    _tunnel(core).stopService()

    (closed,) = [message for message in logged if message["message_type"] == "tunnel:closed"]
    assert (closed["unrecognized"], closed["wireguard"]) == (3, {"forged": 2})
    assert "ice" not in closed


@given(st.lists(st.booleans(), min_size=1, max_size=64))
def test_packets_come_in_order_with_no_more_runs_at_once_than_buffers_hold(are_runs: list[bool]) -> None:
    core = FailingCore()
    tunnel = _tunnel(core)
    packets = [_packet(run=run) for run in are_runs]

    tunnel.packets_received(packets)
    tunnel.stopService()

    assert [packet for portion in core.portions for packet in portion] == packets
    assert all(sum(bool(packet.segment_size) for packet in portion) <= 3 for portion in core.portions)


def _tunnel(core: FailingCore) -> TunnelService:
    ignore = [].append
    return TunnelService(reactor, core, open_device=ignore, on_event=ignore, on_lost=ignore, mark=None)


def _batch() -> DatagramBatch:
    return DatagramBatch.received(receive_buffer(), 40, 40, PEER, OURS)


def _packet(*, run: bool) -> SuperPacket:
    packet = SuperPacket()
    packet.segment_size = 1000 if run else 0
    return packet

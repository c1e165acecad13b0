"""Lines that come in pieces, and messages between a relay and its workers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.apps.relay import worker_messages
from firezone_tunnel.apps.relay.config import EngineConfig, Secrets
from firezone_tunnel.apps.relay.worker_messages import (
    Begin,
    Drain,
    Lines,
    Order,
    StopDraining,
    WorkerFailed,
    WorkerServing,
    decode_order,
    decode_report,
    encode,
)
from firezone_tunnel.core.relay.allocator import RelayConfig
from firezone_tunnel.core.relay.credentials import StaticUsers
from firezone_tunnel.core.sansio import SocketAddress

_CONFIG = EngineConfig(
    RelayConfig(public_ipv4="9.1.1.1", workers=2, worker=1, max_allocations=7),
    own_hosts=("9.1.1.2", "::1"),
    allow_peers=("10.0.0.0/8", "fc00::/7"),
    drain_time=2.5,
)


@given(st.lists(st.binary(max_size=20)), st.lists(st.integers(1, 10)))
def test_lines_are_the_same_however_they_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    lines, data = Lines(), b"\n".join(parts)
    got: list[bytes] = []

    for size in [*cuts, len(data)]:
        got += lines.feed(data[:size])
        data = data[size:]

    assert got == [line for line in b"\n".join(parts).split(b"\n")[:-1] if line]


def test_a_line_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_messages, "MAX_LINE", 10)
    lines = Lines()

    assert list(lines.feed(b"12345678")) == []
    assert list(lines.feed(b"901")) == []
    assert list(lines.feed(b"rest\nnext\n")) == [b"rest", b"next"]


@pytest.mark.parametrize(
    "order",
    [
        Begin(config=_CONFIG, secrets=Secrets.new(), sockets=2, log_level=10),
        Begin(config=_CONFIG, secrets=Secrets.new({"alice": "a\nb"}, "example.org"), sockets=1, log_level=40),
        Drain(),
        StopDraining(),
    ],
    ids=lambda order: type(order).__name__,
)
def test_orders_arrive_as_they_were_given(order: Order) -> None:
    line = encode(order)

    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_order(line) == order


@pytest.mark.parametrize("report", [WorkerServing(), WorkerFailed("it broke")])
def test_reports_arrive_as_they_were_made(report: worker_messages.Report) -> None:
    assert decode_report(encode(report)) == report


@given(st.binary(max_size=50))
def test_lines_that_are_not_messages_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_report(b"x" + data)


def test_secrets_do_not_show() -> None:
    secrets = Secrets.new({"alice": "wonderland"})

    assert "wonderland" not in repr(Begin(config=_CONFIG, secrets=secrets, sockets=1, log_level=10))
    assert secrets.stamp_secret not in repr(secrets)


def test_listed_users_go_before_the_stamp_secret() -> None:
    assert isinstance(Secrets.new({"alice": "wonderland"}).credentials(), StaticUsers)
    assert Secrets.new().credentials().key("2000000000:salt") is not None
    assert Secrets.new().stamp_secret != Secrets.new().stamp_secret


def test_the_policy_knows_the_ports_of_all_workers() -> None:
    policy = _CONFIG.policy()

    assert policy.permits(SocketAddress("9.1.1.1", 49_152))
    assert not policy.permits(SocketAddress("9.1.1.2", 49_152))
    assert policy.permits(SocketAddress("10.1.1.1", 22))
    assert not policy.permits(SocketAddress("192.168.1.1", 22))

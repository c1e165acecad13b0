"""The relay registry: selection and debounce, with a simulated clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.portal.account import PeerRole, Token
from firezone_tunnel.core.portal.devices import DeviceSession
from firezone_tunnel.core.portal.presence import SwapCounter
from firezone_tunnel.core.portal.relay_registry import RelayRegistry, RelaySession
from firezone_tunnel.core.sansio import SocketAddress
from tests.unit.core.portal.worlds import Heard, session

_TOKEN = Token("relay", PeerRole.RELAY, "hash", "account", None)


def test_a_burst_is_reported_once_a_second_after_it_began() -> None:
    registry = RelayRegistry()
    client = session(PeerRole.CLIENT, "c1")
    registry.join(_relay(0), 0.0)
    registry.assign(client)
    for number in range(1, 4):
        registry.join(_relay(number), 10.0 + number / 10)
        registry.urgent_updates([client])

    timeout = registry.next_timeout()
    assert timeout is not None
    assert registry.settled_updates([client], timeout.at - 0.01) == []
    ((receiver, news),) = registry.settled_updates([client], timeout.at)
    assert receiver is client
    assert (news.disconnected_ids, len(news.connected)) == ([], 2)
    assert registry.next_timeout() is None
    assert registry.settled_updates([client], 100.0) == []


def test_a_restart_is_reported_together_with_other_lost_relays() -> None:
    registry, client = RelayRegistry(), session(PeerRole.CLIENT, "c1")
    first, second = _relay(1), _relay(2)
    registry.join(first, 0.0)
    registry.join(second, 0.0)
    registry.assign(client)

    registry.leave(second, 5.0)
    registry.join(_relay(1, secret="new"), 5.1)
    ((_, news),) = registry.urgent_updates([client])

    assert sorted(news.disconnected_ids) == ["r1", "r2"]
    assert [relay.id for relay in news.connected] == ["r1"]
    assert registry.settled_updates([client], 50.0) == []


def test_an_older_connection_that_ends_takes_nothing_away() -> None:
    registry = RelayRegistry()
    older, newer = _relay(1), _relay(1)
    registry.join(older, 0.0)

    assert registry.join(newer, 1.0) is older
    registry.leave(older, 2.0)

    assert registry.all() == [newer]


def test_a_clients_credentials_end_with_its_token_and_a_gateways_never() -> None:
    registry = RelayRegistry()
    registry.join(_relay(1), 0.0)
    token = Token("token", PeerRole.CLIENT, "hash", "actor", 1_900_000_000)

    (for_client,) = registry.assign(session(PeerRole.CLIENT, "c1", token=token))
    (for_gateway,) = registry.assign(session(PeerRole.GATEWAY, "g1", token=token))

    assert (for_client.expires_at, for_gateway.expires_at) == (1_900_000_000, 2145916800)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from("ab")), max_size=30))
def test_every_peer_always_ends_with_relays_that_are_connected(course: list[tuple[bool, int, str]]) -> None:
    registry, client = RelayRegistry(), session(PeerRole.CLIENT, "c1")
    connected: dict[int, RelaySession] = {}
    known: dict[str, str] = {}
    for now, (joins, number, secret) in enumerate(course):
        if joins:
            connected[number] = _relay(number, secret=secret)
            registry.join(connected[number], float(now))
        elif number in connected:
            registry.leave(connected.pop(number), float(now))
        _apply(registry.urgent_updates([client]), known)
        if now % 3 == 0:
            _apply(registry.settled_updates([client], float(now)), known)
    _apply(registry.settled_updates([client], 1000.0), known)

    there = {relay.id: relay.stamp_secret for relay in connected.values()}
    assert len(known) == min(2, len(there))
    assert {id_: there[id_] for id_ in known} == client.relays


def test_more_than_three_swaps_in_a_minute_are_too_many() -> None:
    swaps = SwapCounter()

    assert [swaps.note("d1", now) for now in (0, 10, 20, 30, 40)] == [False, False, False, True, True]
    assert swaps.is_excessive("d1", 69)
    assert not swaps.is_excessive("d1", 91)
    assert [swaps.note("d2", now) for now in (0, 30, 60, 90, 120)] == [False] * 5
    swaps.forget_old(500)
    assert not swaps.note("d1", 501)


def _apply(news: list[tuple[DeviceSession, object]], known: dict[str, str]) -> None:
    """Apply `relays_presence` as a client does (docs/protocol/portal-protocol.md, 2.0)."""
    for _, presence in news:
        for id_ in presence.disconnected_ids:
            known.pop(id_, None)
        for relay in presence.connected:
            known[relay.id] = relay.password


def _relay(number: int, *, secret: str = "secret") -> RelaySession:
    return RelaySession(f"r{number}", _TOKEN, (SocketAddress(f"192.0.2.{number}", 3478),), Heard(), secret)

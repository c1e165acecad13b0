"""Grants, the choice of a gateway, and requests that wait for a gateway."""

from __future__ import annotations

import attrs
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.client import CreateFlow
from firezone_tunnel.core.messages.common import Generation
from firezone_tunnel.core.portal.account import Account, PeerRole, Token, token_hash
from firezone_tunnel.core.portal.changes import StoredFlow, judge
from firezone_tunnel.core.portal.conditions import Circumstances
from firezone_tunnel.core.portal.devices import DeviceSession
from firezone_tunnel.core.portal.flows import Failure, FlowAuthorizer, Grant, PendingFlow, grant
from firezone_tunnel.core.portal.presence import Presence
from tests.unit.core.portal.worlds import account, heard, session

_NOW, _UTC = 1000.0, 1_800_000_000.0


@attrs.frozen
class _Until:
    """A condition that holds until then."""

    end: int | None
    property_name: str = "current_utc_datetime"

    def holds(self, circumstances: Circumstances) -> bool:
        return self.end is None or circumstances.utc_now < self.end

    def ends_at(self, circumstances: Circumstances) -> int | None:
        return self.end


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(0, 20)), max_size=3), max_size=4))
def test_the_policy_that_lasts_longest_is_granted(ends: list[list[int | None]]) -> None:
    world = account(*(tuple(_Until(end) for end in conditions) for conditions in ends))
    forever = 10**9
    lasting = [min((forever if end is None else end for end in conditions), default=forever) for conditions in ends]
    conforming = [end for end in lasting if end > 10]

    granted = grant(world, world.actors["actor"], world.resources["lab"], Circumstances("192.0.2.7", 10.0))

    if conforming:
        assert isinstance(granted, Grant)
        assert (forever if granted.expires_at is None else granted.expires_at) == max(conforming)
    else:
        assert granted == (Failure("forbidden", ("current_utc_datetime",)) if ends else Failure("not_found"))


def test_a_flow_ends_with_the_policy_or_the_token_whichever_is_first() -> None:
    for policy, token, expected in ((5, 9, 5), (9, 5, 5), (None, 9, 9), (5, None, 5), (None, None, None)):
        ends = [None if end is None else int(_UTC) + end for end in (policy, token, expected)]
        world = account((_Until(ends[0]),), expires_at=ends[1])

        pending = _request(_book(), world, _online(session(PeerRole.GATEWAY, "g1")), _client(world))

        assert isinstance(pending, PendingFlow)
        assert pending.flow.expires_at == ends[2]


def test_every_gateway_of_the_site_is_chosen_at_times() -> None:
    world = account(())
    presence = _online(*(session(PeerRole.GATEWAY, f"g{number}") for number in range(4)))

    chosen = []
    for number in range(4):
        pending = _request(_book(number), world, presence, _client(world))
        assert isinstance(pending, PendingFlow)
        chosen.append(pending.flow.gateway_id)

    assert chosen == ["g0", "g1", "g2", "g3"]


def test_gateways_that_have_not_joined_are_offline() -> None:
    world, gateway = account(()), session(PeerRole.GATEWAY, "g1")
    gateway.is_joined = False

    assert _request(_book(), world, _online(gateway), _client(world)) == Failure("offline")


def test_an_old_gateway_is_not_found_by_a_v1_client_and_mismatches_for_a_v2_client() -> None:
    world, presence = account(()), _online(session(PeerRole.GATEWAY, "g1", agent="connlib/1.3.0"))

    assert _request(_book(), world, presence, _client(world)) == Failure("not_found")
    v2 = _client(world, Generation.V2)
    assert _request(_book(), world, presence, v2) == Failure("version_mismatch")


def test_a_request_waits_15_seconds_for_its_gateway() -> None:
    world, book = account(()), _book()
    pending = _request(book, world, _online(session(PeerRole.GATEWAY, "g1")), _client(world))

    timeout = book.next_timeout()
    assert timeout is not None
    assert timeout.at == _NOW + 15
    assert list(book.overdue(_NOW + 14.9)) == []
    assert list(book.overdue(_NOW + 15)) == [pending]
    assert book.next_timeout() is None


def test_the_requests_of_a_lost_connection_are_forgotten() -> None:
    world, book = account(()), _book()
    client = _client(world)
    _request(book, world, _online(session(PeerRole.GATEWAY, "g1")), client)

    book.forget(client)

    assert book.next_timeout() is None


def test_only_the_gateways_own_connection_may_answer() -> None:
    world, book, gateway = account(()), _book(), session(PeerRole.GATEWAY, "g1")
    pending = _request(book, world, _online(gateway), _client(world))
    assert isinstance(pending, PendingFlow)
    book.admit(world, pending)
    (_, payload) = heard(gateway)[0]

    newer = session(PeerRole.GATEWAY, "g1")
    assert book.answered(newer, payload["ref"]) is None
    assert book.answered(gateway, payload["ref"]) is pending
    assert book.answered(gateway, payload["ref"]) is None


def test_a_stored_flow_is_judged_by_the_present_configuration() -> None:
    world = account(())
    pending = _request(_book(), world, _online(session(PeerRole.GATEWAY, "g1")), _client(world))
    assert isinstance(pending, PendingFlow)
    stored = StoredFlow(pending.flow, actor_id="actor", remote_ip="192.0.2.7", site_id="site")
    end = int(_UTC) + 60

    assert judge(world, stored, _UTC) == stored.flow
    assert judge(account((), address="10.1.0.0/16"), stored, _UTC) is None
    assert judge(account(), stored, _UTC) is None
    assert judge(attrs.evolve(world, tokens={}), stored, _UTC) is None
    assert judge(attrs.evolve(world, actors={}), stored, _UTC) is None
    assert judge(world, attrs.evolve(stored, site_id="another"), _UTC) is None
    assert judge(world, attrs.evolve(stored, actor_id="another"), _UTC) is None
    assert judge(account((_Until(0),)), stored, _UTC) is None
    assert judge(account((), expires_at=end), stored, _UTC) == attrs.evolve(stored.flow, expires_at=end)
    assert judge(account((_Until(0),), ()), stored, _UTC) == attrs.evolve(stored.flow, policy_id="policy-1")
    assert judge(account((_Until(end),), ()), stored, _UTC) == attrs.evolve(stored.flow, expires_at=end)


def _book(number: int = 0) -> FlowAuthorizer:
    return FlowAuthorizer(reference_key=bytes(32), ingest_key=bytes(32), entropy=number.to_bytes)


def _client(world: Account, generation: Generation = Generation.V1) -> DeviceSession:
    (token,) = world.tokens.values()
    assert token == Token("token", PeerRole.CLIENT, token_hash("client"), "actor", token.expires_at)
    return session(PeerRole.CLIENT, "c1", generation=generation, token=token)


def _online(*sessions: DeviceSession) -> Presence:
    presence = Presence()
    for arriving in sessions:
        presence.arrive(arriving)
    return presence


def _request(book: FlowAuthorizer, world: Account, presence: Presence, client: DeviceSession) -> PendingFlow | Failure:
    message = CreateFlow(resource_id="lab", connected_gateway_ids=[])
    return book.request(world, presence, client, message, new_id="f1", now=_NOW, utc_now=_UTC)

"""Every message that the portal sends is one that docs/protocol/portal-messages.md allows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.sansio import SocketAddress
from tests.hypothesis_profiles import examples
from tests.unit.apps.portal.message_table import MessageTable, Receiver, Violation, frames_in, read_table
from tests.unit.apps.portal.seeds import DENIED, INTERNET, LAB, SEEDS, TURN_SERVER, WIKI, Seed
from tests.unit.apps.portal.world import OURS, Peer, World

_VECTORS = sorted((Path(__file__).parents[3] / "data/vectors").glob("*.jsonl"))
_AGENTS: dict[str, list[str | None]] = {
    "client": [*[None] * 4, OURS, "headless-client/1.5.8 (x86_64)", "Windows/10 gui-client/1.5.7", "connlib/1.2.0"],
    "gateway": [*[None] * 4, OURS, "connlib/1.3.0", "gateway/1.4.0"],
    "relay": [None],
}
_UNKNOWN_ID = "0a6e2f91-4c1d-4f5e-b1b2-6e8f9d3c1a05"
_EXPIRY = {"client_id": _UNKNOWN_ID, "resource_id": _UNKNOWN_ID, "expires_at": 1}
_CANDIDATE = "candidate:1 1 udp 2113929471 192.0.2.5 51820 typ host"


def test_recorded_sessions_fit_the_table() -> None:
    table = read_table()

    assert len(_VECTORS) >= 5
    for path in _VECTORS:
        for row in frames_in(path.read_text()):
            table.check_frame(row["frame"], Receiver(row["peer"], int(path.name[1])))


def test_the_portal_sends_every_row_of_the_table() -> None:
    table = read_table()

    _send_everything(table, v2=False)
    _send_everything(table, v2=True)
    _send_everything(table, v2=False, client_agent="Debian/12 headless-client/1.5.8 (x86_64)")
    _send_everything(table, v2=False, client_agent=OURS, gateway_agent=OURS)

    assert sorted(map(str, table.rows() - table.seen)) == []


@settings(max_examples=examples(100))
@given(st.data())
def test_whatever_the_seed_and_the_course_every_message_fits_the_table(data: st.DataObject) -> None:
    with _world(read_table(), data.draw(SEEDS)) as world:
        for role in ("relay", "gateway", "client"):
            _join(world, role, data)
        _ask(world)
        _answer_all(world)
        for _ in range(10):
            _step(world, data)

        assert world.crashes == 0


def test_an_address_that_peers_cannot_parse_is_refused_where_it_comes_from() -> None:
    """One such address would make every client and gateway drop the `init` that lists it."""
    with _world(read_table(), Seed().text()) as world:
        assert world.connect("relay", ipv6="fe80::1%eth0") is None
        assert world.refused[-1].code == "invalid_connect_params"
    for text in ("[fe80::1%eth0]:3478", "192.0.2.1%eth0:3478"):
        with pytest.raises(ValueError, match="not an address and port"):
            SocketAddress.parse(text)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"event": "surprise"}, "not in the table"),
        ({"colour": 1}, "lacks"),
        ({"ref": 1.5, "payload": _EXPIRY}, "ref is not ref"),
        ({"payload": None}, "payload is null"),
        ({"payload": {}}, "lacks client_id"),
        ({"payload": {**_EXPIRY, "client_id": "x"}}, "client_id is not UUID"),
        ({"payload": {**_EXPIRY, "expires_at": None}}, "expires_at is null"),
        ({"payload": {**_EXPIRY, "expires_at": 1.0}}, "expires_at is not Unix"),
        ({"payload": {**_EXPIRY, "name": "x"}}, r"has \['name'\]"),
    ],
)
def test_a_message_that_does_not_fit_is_found(change: dict[str, Any], complaint: str) -> None:
    frame = {"topic": "gateway", "event": "access_authorization_expiry_updated", "payload": {}, "ref": None} | change

    with pytest.raises(Violation, match=complaint):
        read_table().check_frame(frame, Receiver("gateway", 1))


@contextmanager
def _world(table: MessageTable, seed: str) -> Iterator[World]:
    """A portal that must not have violated the table when the test is done with it."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), table, seed)
        try:
            yield world
            assert world.violations == []
        finally:
            world.close()


def _send_everything(
    table: MessageTable, *, v2: bool, client_agent: str | None = None, gateway_agent: str | None = None
) -> None:
    """Let a portal send everything that it can send to peers of one generation."""
    seed = Seed(dns='search_domain = "corp.example"\nupstream_doh = ["https://dns.example/"]', turn_server=TURN_SERVER)
    with _world(table, seed.text()) as world:
        options: dict[str, dict[str, Any]] = {
            "relay": {"v2": v2, "ipv6": "2001:db8::10"},
            "gateway": {"v2": v2, "agent": gateway_agent},
            "client": {"v2": v2, "agent": client_agent},
        }
        peers = {role: _joined(world, role, **one) for role, one in options.items()}
        _use(peers["client"], peers["gateway"])
        for changed in (
            attrs.evolve(seed, resources=(attrs.evolve(LAB, body=LAB.body + '\nfilters = ["udp"]'), WIKI, INTERNET)),
            attrs.evolve(seed, dns='upstream = ["10.0.0.53"]'),
            attrs.evolve(seed, slug="acme2"),
            attrs.evolve(seed, ends=("expires_at = 2040-01-01T00:00:00Z", "", "")),
            attrs.evolve(seed, turn_server=TURN_SERVER + 'realm = "corp"'),
            attrs.evolve(seed, resources=(attrs.evolve(LAB, policies=(DENIED,)), WIKI)),
        ):
            world.reload(seed.text())
            world.reload(changed.text())
        peers["client"].say("request_authorization" if v2 else "create_flow", _flow(_UNKNOWN_ID))
        peers["relay"].close()
        world.advance(2.0)
        world.connect("client", v2=v2, token="unknown")
        for end in (_leave, _crash, _lose_token):
            world.reload(seed.text())
            for role, one in options.items():
                end(world, _joined(world, role, **one))


def _joined(world: World, role: str, **options: Any) -> Peer:
    peer = world.join(role, **options)
    assert peer is not None
    return peer


def _use(client: Peer, gateway: Peer) -> None:
    """Flows for all resources, candidates both ways, and messages that the portal refuses."""
    ids = [resource["id"] for resource in client.received("init")[0]["resources"]]
    for id_ in ids:
        client.say(_request(client), _flow(id_))
        _answer(gateway)
    client_id = gateway.received("authorize_flow", "create_authorization")[0]["client"]["id"]
    gateway_id = client.received("flow_created", "authorization_created")[0]["gateway_id"]
    for event in ("broadcast_ice_candidates", "broadcast_invalidated_ice_candidates"):
        client.say(event, {"gateway_ids": [gateway_id], "candidates": [_CANDIDATE]})
        gateway.say(event, {"client_ids": [client_id], "candidates": [_CANDIDATE]})
    client.say("surprise", {})


def _leave(world: World, peer: Peer) -> None:
    peer.say("phx_leave", {})
    assert peer.received("phx_close")


def _crash(world: World, peer: Peer) -> None:
    """Let the handler of a peer's messages fail, as only a fault in the portal could."""

    async def fail(message: object) -> None:
        raise RuntimeError

    assert peer.connection is not None
    peer.connection.channel.handle = fail  # type: ignore[method-assign, union-attr]
    peer.say("surprise", {})
    assert peer.received("phx_error")


def _lose_token(world: World, peer: Peer) -> None:
    world.reload(Seed(roles=()).text())
    assert peer.received("disconnect")
    world.reload(Seed().text())


def _step(world: World, data: st.DataObject) -> None:
    """Something that may happen to a portal."""
    match data.draw(st.sampled_from(["join", "ask", "answer", "talk", "junk", "reload", "wait", "lose"])):
        case "join":
            _join(world, data.draw(st.sampled_from(["relay", "gateway", "client"])), data)
        case "ask":
            _ask(world)
        case "answer":
            _answer_all(world)
        case "talk":
            _talk(world, data)
        case "junk" if world.peers:
            peer = data.draw(st.sampled_from(world.peers))
            event = data.draw(st.sampled_from(["surprise", "phx_leave", "phx_join", "create_flow", "no_relays"]))
            peer.say(event, data.draw(st.sampled_from([None, {}, {"stamp_secret": "1" * 64}])))
            peer.say("heartbeat", {}, topic="phoenix")
        case "reload":
            world.reload(data.draw(SEEDS))
        case "wait":
            world.advance(data.draw(st.sampled_from([0.5, 2.0, 20.0, 61.0, 3600.0])))
        case "lose" if world.peers:
            data.draw(st.sampled_from(world.peers)).close()


def _ask(world: World) -> None:
    for client in _peers(world, "client"):
        for id_ in [*world.state.account.resources, _UNKNOWN_ID]:
            client.say(_request(client), _flow(id_))


def _answer_all(world: World) -> None:
    for gateway in _peers(world, "gateway"):
        _answer(gateway)


def _join(world: World, role: str, data: st.DataObject) -> None:
    options: dict[str, Any] = {"v2": data.draw(st.booleans()), "is_array": data.draw(st.booleans())}
    options["agent"] = data.draw(st.sampled_from(_AGENTS[role]))
    if role == "relay":
        options["stamp_secret"] = data.draw(st.sampled_from("01")) * 64
        options["ipv4"] = data.draw(st.sampled_from(["198.51.100.10", "198.51.100.11", "0.0.0.0"]))
        options |= data.draw(st.sampled_from([{}, {"ipv6": "2001:db8::10"}, {"ipv6": "fe80::1%eth0"}, {"port": "1"}]))
    else:
        options["external_id"] = f"{role}-{data.draw(st.sampled_from('12'))}"
        options["public_key"] = data.draw(st.sampled_from("AB")) * 43 + "="
    world.join(role, **options)


def _talk(world: World, data: st.DataObject) -> None:
    """Candidates to everybody, from everybody."""
    candidates = data.draw(st.sampled_from([[], [_CANDIDATE], [_CANDIDATE, "not a candidate"]]))
    event = data.draw(st.sampled_from(["broadcast_ice_candidates", "broadcast_invalidated_ice_candidates"]))
    ids = [session.device.id for session in world.state.presence.all()]
    for client in _peers(world, "client"):
        client.say(event, {"gateway_ids": ids, "candidates": candidates})
        client.say("new_gateway_ice_candidates", {"gateway_id": (ids or ["x"])[-1], "candidates": candidates})
    for gateway in _peers(world, "gateway"):
        gateway.say(event, {"client_ids": ids, "candidates": candidates})


def _peers(world: World, role: str) -> list[Peer]:
    return [peer for peer in world.peers if peer.receiver.role == role]


def _request(client: Peer) -> str:
    return "create_flow" if client.receiver.generation == 1 else "request_authorization"


def _flow(resource_id: str) -> dict[str, Any]:
    return {"resource_id": resource_id, "connected_gateway_ids": []}


def _answer(gateway: Peer) -> None:
    """Admit everybody who was ever announced; the portal ignores what it no longer waits for."""
    for asked in gateway.received("authorize_flow", "create_authorization"):
        event = "flow_authorized" if gateway.receiver.generation == 1 else "authorization_created"
        gateway.say(event, {"ref": asked["ref"]})

"""Messages of both generations: recorded and documented frames, round trips, and malformed messages."""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages import client, common, gateway, relay
from firezone_tunnel.core.messages.common import Generation, PortalMessage, read, rename, write
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import ProtocolError
from tests.unit.core.messages.recorded import SESSIONS, portal_frames

_MODULES = {"client": client, "gateway": gateway}
_RESOURCE_ID = "9c4f1d20-3e55-4b7a-8c11-5a7d2e6f0b04"
_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
_INTERFACE = {
    "ipv4": "100.64.0.7",
    "ipv6": "fd00:2021:1111::7",
    "upstream_dns": [{"protocol": "ip_port", "address": "10.0.0.53:53"}],
    "search_domain": "corp.example",
}
_SITES = [{"id": "2b7e1516-28ae-4d2a-a6ab-f7158809cf03", "name": "HQ"}]
_DNS = {
    "id": _RESOURCE_ID,
    "type": "dns",
    "name": "Wiki",
    "address": "*.wiki.corp.example",
    "address_description": None,
    "ip_stack": "dual",
    "gateway_groups": _SITES,
    "filters": [{"protocol": "tcp", "port_range_start": 443, "port_range_end": 443}, {"protocol": "icmp"}],
}
_CIDR = {
    "id": "0a6e2f91-4c1d-4f5e-b1b2-6e8f9d3c1a05",
    "type": "cidr",
    "name": "Lab",
    "address": "172.20.0.0/16",
    "address_description": "lab network",
    "gateway_groups": _SITES,
    "filters": [],
}
_INTERNET = {"id": "c3d2e1f0", "type": "internet", "can_be_disabled": True, "gateway_groups": _SITES}
_RELAY = {
    "id": "60e05bd1-b195-4f2f-9411-2fa7197a5c88",
    "type": "turn",
    "addr": "198.51.100.10:3478",
    "username": "2000000000:salt",
    "password": "password",
    "expires_at": 2000000000,
}
_RELAY_IPV6 = _RELAY | {"addr": "[2001:db8::10]:3478"}
_CLIENT_INIT = {"interface": _INTERFACE, "resources": [_DNS, _CIDR, _INTERNET], "relays": [_RELAY, _RELAY_IPV6]}
_FLOW_LOGS = {"api_url": "https://flow.example/", "upload_interval_secs": 0, "upload_batch_size": 0}
_CREDENTIALS = {
    "client_ice_credentials": {"username": "w7up", "password": "ksqwm66pilnb7skdwwfw3r"},
    "gateway_ice_credentials": {"username": "kwe6", "password": "mzkrj52x5h5ebrfdsh5iyq"},
}
_FLOW_CREATED = {
    "resource_id": _RESOURCE_ID,
    "gateway_id": "8d1a2c44-61be-4a53-8a0b-7f6b3b1f9e02",
    "gateway_public_key": _KEY,
    "gateway_ipv4": "100.64.0.21",
    "gateway_ipv6": "fd00:2021:1111::15",
    "gateway_group_id": _SITES[0]["id"],
    "preshared_key": _KEY,
    **_CREDENTIALS,
}
_AUTHORIZE_FLOW = {
    "ref": "dev-ref-0001",
    "resource": {"id": _RESOURCE_ID, "type": "dns", "name": "Wiki", "address": "*.wiki", "filters": []},
    "client": {
        "id": "5f0c6b3e-7a53-4d0e-9a35-0c1f6f1d7a01",
        "public_key": _KEY,
        "preshared_key": _KEY,
        "ipv4": "100.64.0.7",
        "ipv6": "fd00:2021:1111::7",
    },
    **_CREDENTIALS,
    "expires_at": 1790000000,
}
_GATEWAY_INIT = {
    "interface": {"ipv4": "100.64.0.21", "ipv6": "fd00:2021:1111::15"},
    "config": {"ipv4_masquerade_enabled": True, "ipv6_masquerade_enabled": True},
    "account_slug": "acme",
    "relays": [_RELAY],
    "authorizations": [{"client_id": "5f0c", "resource_id": _RESOURCE_ID, "expires_at": 1790000000}],
}
_V2 = {"use_iceless": False, "flow_logs_ingest_token": "<JWT>"}
_CANDIDATES = {"candidates": ["candidate:1 1 udp 2113929471 192.0.2.5 51820 typ host"]}
_PRESENCE = {"disconnected_ids": ["60e05bd1"], "connected": [_RELAY]}

# From docs/protocol/portal-protocol.md, 2.1 to 2.4.
_FROM_PORTAL: list[tuple[ModuleType, str, Any, type[PortalMessage]]] = [
    (client, "init", _CLIENT_INIT, client.Init),
    (client, "init", _CLIENT_INIT | {"authorizations": [], "flow_logs": _FLOW_LOGS}, client.Init),
    (client, "init", {"interface": _INTERFACE}, client.Init),
    (client, "config_changed", {"interface": _INTERFACE}, client.ConfigChanged),
    (client, "resource_created_or_updated", _DNS, client.ResourceChanged),
    (client, "resource_created_or_updated", _CIDR, client.ResourceChanged),
    (client, "resource_created_or_updated", _INTERNET, client.ResourceChanged),
    (client, "resource_deleted", _RESOURCE_ID, client.ResourceDeleted),
    (client, "relays_presence", _PRESENCE, client.RelaysPresence),
    (client, "flow_created", _FLOW_CREATED, client.FlowCreated),
    (client, "authorization_created", _FLOW_CREATED | _V2, client.FlowCreated),
    (client, "flow_creation_failed", {"resource_id": "r", "reason": "offline"}, client.FlowCreationFailed),
    (
        client,
        "authorization_creation_failed",
        {"resource_id": "r", "reason": "whatever comes", "violated_properties": ["remote_ip", "new one"]},
        client.FlowCreationFailed,
    ),
    (client, "ice_candidates", {"gateway_id": "g"} | _CANDIDATES, client.IceCandidates),
    (client, "gateway_ice_candidates", {"gateway_id": "g"} | _CANDIDATES, client.IceCandidates),
    (client, "invalidate_ice_candidates", {"gateway_id": "g"} | _CANDIDATES, client.InvalidateIceCandidates),
    (client, "invalidate_gateway_ice_candidates", {"gateway_id": "g"} | _CANDIDATES, client.InvalidateIceCandidates),
    (gateway, "init", _GATEWAY_INIT, gateway.Init),
    (gateway, "init", _GATEWAY_INIT | {"flow_logs": _FLOW_LOGS, "account_slug": None}, gateway.Init),
    (gateway, "authorize_flow", _AUTHORIZE_FLOW, gateway.AuthorizeFlow),
    (gateway, "authorize_flow", _AUTHORIZE_FLOW | {"expires_at": None}, gateway.AuthorizeFlow),
    (gateway, "create_authorization", _AUTHORIZE_FLOW | _V2 | {"subject": {"any": 1}}, gateway.AuthorizeFlow),
    (gateway, "reject_access", {"client_id": "c", "resource_id": "r"}, gateway.RejectAccess),
    (
        gateway,
        "access_authorization_expiry_updated",
        {"client_id": "c", "resource_id": "r", "expires_at": 1790003600},
        gateway.ExpiryUpdated,
    ),
    (
        gateway,
        "resource_updated",
        {"id": "r", "type": "dns", "name": "Wiki", "address": "*.wiki", "filters": [{"protocol": "tcp"}]},
        gateway.ResourceUpdated,
    ),
    (gateway, "relays_presence", _PRESENCE | {"connected": []}, gateway.RelaysPresence),
    (gateway, "ice_candidates", {"client_id": "c"} | _CANDIDATES, gateway.IceCandidates),
    (gateway, "invalidate_ice_candidates", {"client_id": "c"} | _CANDIDATES, gateway.InvalidateIceCandidates),
]
_TO_PORTAL: list[tuple[PortalMessage, Generation, str, dict[str, Any]]] = [
    (
        client.CreateFlow(resource_id="r", connected_gateway_ids=["g"]),
        Generation.V1,
        "create_flow",
        {"resource_id": "r", "connected_gateway_ids": ["g"]},
    ),
    (
        client.CreateFlow(resource_id="r", connected_gateway_ids=[]),
        Generation.V2,
        "request_authorization",
        {"resource_id": "r", "connected_gateway_ids": []},
    ),
    (
        client.BroadcastIceCandidates(gateway_ids=["g"], candidates=["c"]),
        Generation.V2,
        "broadcast_ice_candidates",
        {"gateway_ids": ["g"], "candidates": ["c"]},
    ),
    (
        client.BroadcastInvalidatedIceCandidates(gateway_ids=["g"], candidates=["c"]),
        Generation.V1,
        "broadcast_invalidated_ice_candidates",
        {"gateway_ids": ["g"], "candidates": ["c"]},
    ),
    (client.NoRelays(), Generation.V2, "no_relays", {}),
    (client.SnownetCapabilities(), Generation.V2, "set_snownet_capabilities", {"iceless": False}),
    (gateway.FlowAuthorized(ref="x"), Generation.V1, "flow_authorized", {"ref": "x"}),
    (gateway.FlowAuthorized(ref="x"), Generation.V2, "authorization_created", {"ref": "x"}),
    (
        gateway.BroadcastIceCandidates(client_ids=["c"], candidates=["d"]),
        Generation.V1,
        "broadcast_ice_candidates",
        {"client_ids": ["c"], "candidates": ["d"]},
    ),
    (
        gateway.BroadcastInvalidatedIceCandidates(client_ids=["c"], candidates=["d"]),
        Generation.V2,
        "broadcast_invalidated_ice_candidates",
        {"client_ids": ["c"], "candidates": ["d"]},
    ),
    (relay.Join(stamp_secret="00" * 32), Generation.V1, "phx_join", {"stamp_secret": "00" * 32}),
    (relay.Init(), Generation.V2, "init", {}),
]


# Recorded frames


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_messages_that_upstream_understood_are_read_without_loss(session: Path) -> None:
    read_as: set[str] = set()
    for frame in portal_frames(session):
        if not frame.sent_by_portal or frame.peer == "relay":
            continue
        message = _MODULES[frame.peer].parse(frame.event, frame.payload)

        assert message is not None, frame.event
        assert frame.event in type(message).EVENTS
        _assert_holds(write(message), frame.payload, frame.event)
        read_as.add(f"{frame.peer} {type(message).__name__}")
    assert read_as == {
        *("client Init", "client FlowCreated", "client IceCandidates"),
        *("gateway Init", "gateway AuthorizeFlow", "gateway IceCandidates"),
    }


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_our_messages_equal_upstreams(session: Path) -> None:
    kinds = {
        event: kind
        for kind in (
            *(client.CreateFlow, client.IceCandidates, client.SnownetCapabilities, gateway.FlowAuthorized),
            *(client.BroadcastIceCandidates, relay.Join),
        )
        for event in kind.EVENTS
    } | {"new_gateway_ice_candidates": client.IceCandidates}
    compared = 0
    for frame in portal_frames(session):
        if frame.sent_by_portal:
            continue
        is_gateways = frame.peer == "gateway" and frame.event == "broadcast_ice_candidates"
        kind = gateway.BroadcastIceCandidates if is_gateways else kinds[frame.event]

        assert write(read(kind, frame.payload)) == frame.payload
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_a_recorded_message_without_one_of_its_required_keys_is_refused_by_name(session: Path) -> None:
    required = {
        "init": ("interface",),
        **dict.fromkeys(("flow_created", "authorization_created"), tuple(_FLOW_CREATED)),
        **dict.fromkeys(("authorize_flow", "create_authorization"), tuple(_AUTHORIZE_FLOW)),
    }
    refused = 0
    for frame in portal_frames(session):
        for key in required.get(frame.event, ()) if frame.sent_by_portal and frame.peer in _MODULES else []:
            # The site of V2's flows has another name, and so has no key to lack.
            present = {"gateway_group_id": "site_id"}.get(key, key) if key not in frame.payload else key
            payload = {name: value for name, value in frame.payload.items() if name != present}
            with pytest.raises(ProtocolError, match=key):
                _MODULES[frame.peer].parse(frame.event, payload)
            refused += 1
    assert refused >= 15


# Documented frames


@pytest.mark.parametrize(("module", "event", "payload", "kind"), _FROM_PORTAL)
def test_a_documented_message_is_read_and_written_back(
    module: Any, event: str, payload: Any, kind: type[PortalMessage]
) -> None:
    message = module.parse(event, payload)

    assert type(message) is kind
    assert event in kind.EVENTS
    written = write(message)
    _assert_holds(written, payload, event)
    assert read(kind, written) == message


@pytest.mark.parametrize(("message", "generation", "event", "payload"), _TO_PORTAL)
def test_our_messages_use_the_names_of_the_generation(
    message: PortalMessage, generation: Generation, event: str, payload: dict[str, Any]
) -> None:
    assert type(message).event(generation) == event
    assert write(message) == payload
    assert read(type(message), payload) == message


def test_every_message_class_is_tried_here() -> None:
    tried = {kind for _, _, _, kind in _FROM_PORTAL} | {type(message) for message, *_ in _TO_PORTAL}

    assert {kind.__qualname__ for kind in _message_classes()} - {kind.__qualname__ for kind in tried} == set()
    assert set(_message_classes()) == tried


def test_values_have_types_to_work_with() -> None:
    init = client.parse("init", _CLIENT_INIT)
    assert isinstance(init, client.Init)

    assert init.interface.ipv4 == ipaddress.IPv4Address("100.64.0.7")
    assert [relay.address for relay in init.relays] == [
        SocketAddress("198.51.100.10", 3478),
        SocketAddress("2001:db8::10", 3478),
    ]
    dns, cidr, internet = init.resources
    assert isinstance(dns, client.DnsResource)
    assert [(rule.port_range_start, rule.port_range_end) for rule in dns.filters] == [(443, 443), (0, 0xFFFF)]
    assert isinstance(cidr, client.CidrResource)
    assert isinstance(internet, client.InternetResource)
    assert internet.name == "Internet Resource"
    flow = client.parse("flow_created", _FLOW_CREATED)
    assert isinstance(flow, client.FlowCreated)
    assert flow.preshared_key == bytes(range(32))


def test_v2_calls_groups_sites() -> None:
    of_v1 = client.parse("init", _CLIENT_INIT)
    sites = [
        {"sites" if key == "gateway_groups" else key: value for key, value in resource.items()}
        for resource in _resources()
    ]
    assert client.parse("init", _CLIENT_INIT | {"resources": sites}) == of_v1

    for resource, with_sites in zip(_resources(), sites, strict=True):
        event = "resource_created_or_updated"
        assert client.parse(event, with_sites) == client.parse(event, resource)

    flow = {"site_id" if key == "gateway_group_id" else key: value for key, value in _FLOW_CREATED.items()}
    assert client.parse("authorization_created", flow) == client.parse("flow_created", _FLOW_CREATED)


def test_the_v1_spelling_wins_if_both_are_present() -> None:
    assert rename({"old": 1, "new": 2}, {"new": "old"}) == {"old": 1, "new": 2}
    assert rename({"new": 2, "other": 3}, {"new": "old"}) == {"old": 2, "other": 3}
    assert rename([1], {"new": "old"}) == [1]


# Unknown and broken


@pytest.mark.parametrize("module", [client, gateway])
@pytest.mark.parametrize("event", ["", "whatever", "phx_reply", "client_ice_candidates", "request_connection"])
def test_an_unknown_event_is_accepted(module: Any, event: str) -> None:
    assert module.parse(event, {"any": "thing"}) is None


def test_unknown_keys_are_ignored_at_every_depth() -> None:
    payload = copy.deepcopy(_CLIENT_INIT) | {"future": 1}
    for holder in (payload["interface"], payload["resources"][0], payload["relays"][0]):
        holder["future"] = {"a": [1]}

    assert client.parse("init", payload) == client.parse("init", _CLIENT_INIT)


@pytest.mark.parametrize(
    "broken",
    [
        7,
        None,
        "text",
        {},
        _CIDR | {"type": "static_device_pool"},
        _CIDR | {"type": 7},
        _CIDR | {"address": None},
        {key: value for key, value in _CIDR.items() if key != "gateway_groups"},
        _CIDR | {"filters": [{"protocol": "gre"}]},
        _CIDR | {"filters": [{"protocol": "tcp", "port_range_end": 65536}]},
        _DNS | {"ip_stack": "ipv5_only"},
    ],
)
def test_a_resource_that_does_not_parse_is_left_out_of_a_list_and_refused_alone(broken: object) -> None:
    skipped: list[str] = []
    init = client.parse("init", _CLIENT_INIT | {"resources": [_DNS, broken, _CIDR]}, skipped)

    assert isinstance(init, client.Init)
    assert len(skipped) == 1
    assert [resource.id for resource in init.resources] == [_DNS["id"], _CIDR["id"]]
    with pytest.raises(ProtocolError, match=r"^ResourceChanged: .*\$\.resource"):
        client.parse("resource_created_or_updated", broken)


@pytest.mark.parametrize(
    "broken",
    [
        {"id": "x", "type": "stun", "addr": "198.51.100.10:3478"},
        _RELAY | {"expires_at": "soon"},
        _RELAY | {"addr": "nowhere"},
        _RELAY | {"addr": "relay.example:3478"},
        _RELAY | {"addr": "198.51.100.10:99999"},
        _RELAY | {"addr": "2001:db8::10:3478"},
        7,
    ],
)
@pytest.mark.parametrize(("module", "init"), [(client, _CLIENT_INIT), (gateway, _GATEWAY_INIT)])
def test_a_relay_that_does_not_parse_is_left_out(module: Any, init: dict[str, Any], broken: object) -> None:
    skipped: list[str] = []
    message = module.parse("init", init | {"relays": [broken, _RELAY, broken, _RELAY_IPV6]}, skipped)
    presence = module.parse("relays_presence", {"disconnected_ids": [], "connected": [broken, _RELAY]}, skipped)

    assert [relay.addr for relay in message.relays] == [_RELAY["addr"], _RELAY_IPV6["addr"]]
    assert [relay.addr for relay in presence.connected] == [_RELAY["addr"]]
    assert len(skipped) == 3


@pytest.mark.parametrize(
    ("module", "event", "payload", "field"),
    [
        (client, "init", {}, "interface"),
        (client, "init", {"interface": _INTERFACE | {"ipv4": "100.64.0.300"}}, "interface.ipv4"),
        (client, "init", {"interface": _INTERFACE | {"ipv4": "fd00::1"}}, "interface.ipv4"),
        (client, "init", {"interface": _INTERFACE | {"ipv6": 7}}, "interface.ipv6"),
        (client, "init", {"interface": _INTERFACE | {"upstream_dns": None}}, "interface.upstream_dns"),
        (
            client,
            "init",
            {"interface": _INTERFACE | {"upstream_dns": [{"protocol": "doh", "address": "x"}]}},
            "protocol",
        ),
        (client, "init", {"interface": _INTERFACE, "resources": None}, "resources"),
        (client, "init", {"interface": _INTERFACE, "relays": {}}, "relays"),
        (client, "flow_created", _FLOW_CREATED | {"preshared_key": "AAAA"}, "preshared_key"),
        (client, "flow_created", _FLOW_CREATED | {"preshared_key": "*" * 44}, "preshared_key"),
        (client, "flow_created", _FLOW_CREATED | {"gateway_public_key": None}, "gateway_public_key"),
        (client, "flow_created", _FLOW_CREATED | {"client_ice_credentials": {}}, "client_ice_credentials"),
        (client, "resource_deleted", {"id": _RESOURCE_ID}, "id"),
        (client, "ice_candidates", {"gateway_id": "g"}, "candidates"),
        (client, "ice_candidates", {"gateway_id": 1, "candidates": []}, "gateway_id"),
        (client, "relays_presence", {"connected": []}, "disconnected_ids"),
        (gateway, "init", {"config": {}}, "interface"),
        (gateway, "authorize_flow", _AUTHORIZE_FLOW | {"expires_at": "never"}, "expires_at"),
        (gateway, "authorize_flow", _AUTHORIZE_FLOW | {"expires_at": 10**400}, "expires_at"),
        (gateway, "authorize_flow", _AUTHORIZE_FLOW | {"expires_at": float("inf")}, "expires_at"),
        (gateway, "authorize_flow", _AUTHORIZE_FLOW | {"resource": _DNS | {"filters": None}}, "resource"),
        (gateway, "reject_access", {"client_id": "c"}, "resource_id"),
        (gateway, "resource_updated", {"id": "r", "type": "cidr", "name": "n", "address": "a"}, "filters"),
        (client, "init", [], "object"),
        (gateway, "init", None, "object"),
    ],
)
def test_a_malformed_message_is_refused_by_the_name_of_its_field(
    module: Any, event: str, payload: object, field: str
) -> None:
    with pytest.raises(ProtocolError, match=field.replace(".", r"\.")):
        module.parse(event, payload)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*_CLIENT_INIT, *_FLOW_CREATED, "id"]), inner)
    ),
    max_leaves=10,
)
_events = st.sampled_from([(module, event) for module, event, _, _ in _FROM_PORTAL])


@given(_events, _json)
def test_any_payload_is_a_message_or_a_protocol_error(event: tuple[Any, str], payload: object) -> None:
    _parse_or_refuse(*event, payload)


@given(st.sampled_from(_FROM_PORTAL), st.data())
def test_any_change_to_a_message_is_a_message_or_a_protocol_error(
    documented: tuple[Any, str, Any, type[PortalMessage]], data: st.DataObject
) -> None:
    module, event, payload, _ = documented
    payload = copy.deepcopy(payload)
    places = list(_places(payload))
    if places:
        holder, key = data.draw(st.sampled_from(places))
        holder[key] = data.draw(_json)

    _parse_or_refuse(module, event, payload)


def _parse_or_refuse(module: Any, event: str, payload: object) -> None:
    try:
        message = module.parse(event, payload)
    except ProtocolError as error:
        assert "\n" not in str(error)
        return
    assert read(type(message), write(message)) == message


def _resources() -> list[dict[str, Any]]:
    return [_DNS, _CIDR, _INTERNET]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All values, at any depth, that a test can replace."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _message_classes() -> list[type[PortalMessage]]:
    """All message classes that the modules define."""
    return [
        kind
        for module in (client, common, gateway, relay)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, PortalMessage) and kind.__module__ == module.__name__
        if kind is not PortalMessage
    ]


def _assert_holds(written: Any, payload: Any, where: str) -> None:
    """Every known field of the payload is in our output, with the same value."""
    payload = {"resource_deleted": {"id": payload}}.get(where, payload)
    if where in {"resource_created_or_updated", "resource_updated"}:
        payload = {"resource": payload}
    if isinstance(payload, dict):
        known = {"sites": "gateway_groups", "site_id": "gateway_group_id"}
        for key, value in payload.items():
            name = key if key in written else known.get(key, key)
            if name in written:
                _assert_holds(written[name], value, f"{where}.{key}")
            else:
                assert key in _UNUSED, f"{where}.{key} is lost"
    elif isinstance(payload, list):
        assert len(written) == len(payload), where
        for number, value in enumerate(payload):
            _assert_holds(written[number], value, f"{where}[{number}]")
    else:
        assert written == payload, where


_UNUSED = {"subject"}
"""Keys that upstream's portal sends and that neither its programs nor ours read."""

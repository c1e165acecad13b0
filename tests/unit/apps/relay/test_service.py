"""Arguments that a program may pass to an embedded relay."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from firezone_tunnel import ConfigurationError, RelayService

_PORTAL = {"url": "wss://portal.example/", "token": ".relay"}
_USERS = {"users": {"alice": "secret"}}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "either a portal's URL and a token, or users"),
        ({"url": "wss://portal.example/"}, "either a portal's URL and a token, or users"),
        ({**_PORTAL, **_USERS}, "either a portal's URL and a token, or users"),
        ({**_PORTAL, "url": "portal.example"}, "must begin with"),
        ({**_PORTAL, "ca_file": "/nonexistent.pem"}, "/nonexistent.pem"),
        ({**_USERS, "public_ipv4": None}, "--public-ip4-addr"),
        ({**_USERS, "public_ipv4": "example"}, "'example'"),
        ({**_USERS, "allow_peers": ["10.0.0.0/99"]}, "10.0.0.0/99"),
        ({**_USERS, "realm": ""}, "--realm"),
        ({**_USERS, "listen_port": 50_000}, "--listen-port must lie outside"),
        ({**_USERS, "lowest_port": 9, "highest_port": 8}, "--lowest-port is greater"),
        ({**_USERS, "lowest_port": 50_000, "highest_port": 50_001, "workers": 3}, "--workers is greater"),
    ],
)
def test_invalid_arguments_are_raised_at_once(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        RelayService(Clock(), **{"public_ipv4": "203.0.113.7", **arguments})


def test_its_repr_shows_where_it_listens_and_no_secret() -> None:
    relay = RelayService(Clock(), public_ipv4="203.0.113.7", public_ipv6="2001:db8::7", **_USERS)

    assert repr(relay) == "<RelayService: 203.0.113.7, 2001:db8::7, 3478, stopped>"

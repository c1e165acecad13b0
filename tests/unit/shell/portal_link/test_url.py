"""Login URL, headers and device identity."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.portal_link.url import LoginUrl, data_plane_agent, external_id

_ID = "EFC7A9E3-3576-4633-B633-7D47BA9E14AC"
_HASHED = "2606a54a327020a1285cc141aeceb5737a91625e5e1a85c234682266f45820bf"  # docs/protocol/portal-protocol.md, 1.3


def _gateway(base: str = "wss://portal.example", token: str = "tok") -> LoginUrl:
    return LoginUrl.gateway(base, token, device_id="abc", name="gw")


@pytest.mark.parametrize(
    ("base", "host", "port", "is_secure", "path"),
    [
        ("wss://api.firezone.dev", "api.firezone.dev", 443, True, "/gateway/websocket"),
        ("https://api.firezone.dev/", "api.firezone.dev", 443, True, "/gateway/websocket"),
        ("wss://h/x/", "h", 443, True, "/x/gateway/websocket"),
        ("wss://h/x//", "h", 443, True, "/x//gateway/websocket"),
        ("WSS://Portal.Example/a%20b c", "portal.example", 443, True, "/a%20b%20c/gateway/websocket"),
        ("ws://127.0.0.1:8081?vsn=2.0.0#x", "127.0.0.1", 8081, False, "/gateway/websocket"),
        ("http://localhost:4000", "localhost", 4000, False, "/gateway/websocket"),
        ("ws://portal", "portal", 443, False, "/gateway/websocket"),
        ("wss://[2001:DB8::1]:8443", "2001:db8::1", 8443, True, "/gateway/websocket"),
        ("wss://bücher.example", "xn--bcher-kva.example", 443, True, "/gateway/websocket"),
    ],
)
def test_a_base_url_is_taken_apart(base: str, host: str, port: int, is_secure: bool, path: str) -> None:
    url = _gateway(base)

    assert (url.host, url.port, url.is_secure, url.path) == (host, port, is_secure, path)


@pytest.mark.parametrize(
    "base",
    [
        "",
        "portal.example",
        "ftp://portal.example",
        "wss://",
        "wss:///path",
        "wss://a b/",
        "wss://host:99999",
        "wss://host:x",
        "wss://[::1",
        "wss://user:secret@portal.example",
        "wss://-/",
        "wss://a\u0001b/",
    ],
)
def test_a_base_url_that_cannot_work_is_refused_in_one_sentence(base: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _gateway(base)

    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_client_identifies_itself_in_upstreams_order() -> None:
    url = LoginUrl.client(
        "wss://portal.example",
        "n.SFMyNTY.abc.def",
        device_id=_ID,
        name="build box",
        device_serial="S1",
        device_uuid="U1",
    )

    assert url.target(bytes(range(32))) == (
        f"/client/websocket?token=n.SFMyNTY.abc.def&external_id={_HASHED}&name=build+box&device_serial=S1&device_uuid=U1"
        "&public_key=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8%3D"
    )


def test_a_dummy_serial_number_is_left_out() -> None:
    url = LoginUrl.client("wss://h", "t", device_id="a", name="n", device_serial="123456789")

    assert "device_serial" not in url.target()


def test_a_gateway_identifies_itself() -> None:
    url = LoginUrl.gateway("wss://h", "t", device_id="a", name="gw")

    assert url.target(bytes(32)) == (
        "/gateway/websocket?token=t&external_id=a&name=gw&public_key=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA%3D"
    )


def test_a_relay_names_its_addresses() -> None:
    both = LoginUrl.relay("wss://h", "t", ipv4="192.0.2.1", ipv6="2001:db8::1", name="r")
    url = LoginUrl.relay("wss://h", "relaytok", ipv4="10.99.0.1", ipv6=None)

    assert both.target() == "/relay/websocket?token=t&name=r&ipv4=192.0.2.1&ipv6=2001%3Adb8%3A%3A1&port=3478"
    assert url.target() == "/relay/websocket?token=relaytok&ipv4=10.99.0.1&port=3478"
    assert url.user_agent == "relay/0.1.0"


def test_a_relay_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        LoginUrl.relay("wss://h", "t", ipv4=None, ipv6=None)


@pytest.mark.parametrize(
    ("device_id", "expected"),
    [
        (_ID, _HASHED),
        (_HASHED, _HASHED),
        ("my-laptop", "my-laptop"),
        ("EFC7A9E3-3576-4633-B633", "EFC7A9E3-3576-4633-B633"),
        ("E-FC7A9E3-3576-4633-B633-7D47BA9E14AC", "E-FC7A9E3-3576-4633-B633-7D47BA9E14AC"),
    ],
)
def test_only_an_identity_that_reads_as_a_uuid_is_hashed(device_id: str, expected: str) -> None:
    assert external_id(device_id) == expected


@pytest.mark.parametrize("form", ["{%s}", "urn:uuid:%s", "%s", _ID.replace("-", "") + "%.0s"])
def test_each_form_of_a_uuid_is_hashed_as_it_is_written(form: str) -> None:
    written = form % _ID

    assert external_id(written) == hashlib.sha256(written.encode()).hexdigest()
    assert external_id(written.lower()) != external_id(written)


def test_a_token_loses_its_white_space_and_goes_into_header_and_query() -> None:
    url = _gateway(token=" ab\r\ncd\t ef\n")

    assert ("X-Authorization", "Bearer abcdef") in url.headers
    assert url.target().startswith("/gateway/websocket?token=abcdef&")


def test_without_a_token_there_is_neither_header_nor_parameter() -> None:
    url = _gateway(token=" \n")

    assert "X-Authorization" not in dict(url.headers)
    assert "token" not in url.target()


@pytest.mark.parametrize("token", ["ab\x00cd", "ab\x7f", "tökén"])
def test_a_token_that_fits_no_header_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _gateway(token=token)

    assert token not in str(caught.value)


@pytest.mark.parametrize("show", [str, repr])
def test_the_loggable_form_holds_no_token(show: Any) -> None:
    assert "sesame" not in show(_gateway(token="sesame"))


@pytest.mark.parametrize(
    ("base", "header"),
    [
        ("wss://portal.example", "portal.example"),
        ("wss://portal.example:8443", "portal.example:8443"),
        ("ws://portal.example", "portal.example:443"),
        ("ws://portal.example:80", "portal.example"),
        ("wss://[2001:db8::1]", "[2001:db8::1]"),
        ("ws://[2001:db8::1]:81", "[2001:db8::1]:81"),
    ],
)
def test_the_host_header_names_a_port_that_is_not_the_schemes_own(base: str, header: str) -> None:
    assert dict(_gateway(base).headers)["Host"] == header


def test_the_agent_claims_a_version_that_portals_can_read() -> None:
    agent = data_plane_agent()

    assert agent.isascii()
    assert next(word for word in agent.split(" ") if word.startswith("connlib/")) == "connlib/1.5.12"
    assert "firezone_tunnel/" in agent


def test_its_text_has_the_whole_url_but_its_secrets() -> None:
    url = LoginUrl.gateway("wss://portal.example/base/?token=a", "tok", device_id="a", name="gw")

    assert str(url) == "wss://portal.example:443/base/gateway/websocket"
    assert url.origin == "wss://portal.example:443"
    assert url.identity == "a"

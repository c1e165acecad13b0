"""The derivations of docs/protocol/portal-protocol.md, 3.4, 3.6 and 3.7, with the vectors given there."""

from __future__ import annotations

import base64
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.portal.derived_credentials import (
    Party,
    ice_credentials,
    json_web_token,
    open_reference,
    preshared_key,
    relay_credentials,
    sign_reference,
)
from firezone_tunnel.core.sansio import SocketAddress

_CLIENT = Party("11111111-1111-4111-8111-111111111111", base64.b64encode(bytes(range(32))).decode(), bytes([0xAA] * 32))
_GATEWAY = Party(
    "22222222-2222-4222-8222-222222222222", base64.b64encode(bytes(range(32, 64))).decode(), bytes([0xBB] * 32)
)
_KEY = bytes(32)


def test_ice_credentials() -> None:
    credentials = ice_credentials(_CLIENT, _GATEWAY)

    assert (credentials.client.username, credentials.client.password) == ("w7up", "ksqwm66pilnb7skdwwfw3r")
    assert (credentials.gateway.username, credentials.gateway.password) == ("kwe6", "mzkrj52x5h5ebrfdsh5iyq")


def test_preshared_key() -> None:
    assert base64.b64encode(preshared_key(_CLIENT, _GATEWAY)) == b"q8Vg5uTVUXn/Twe2E0aVaXAOjAh9dKuPDDTFvBSVjjE="


def test_relay_credentials() -> None:
    relay = relay_credentials(
        "60e05bd1-b195-4f2f-9411-2fa7197a5c88",
        SocketAddress("2001:db8::10", 3478),
        stamp_secret="0" * 64,
        public_key=_CLIENT.public_key,
        expires_at=2000000000,
    )

    assert relay.addr == "[2001:db8::10]:3478"
    assert relay.username == "2000000000:kF8o3vGOqsBa5vErLDRSdEr69ibaE0PVezlbVE4FGbY"
    assert relay.password == "dxNwrpFi1iSIOSEAH19zziZ4amlR6dos/TC1/sgd4u8"


def test_a_reference_comes_back() -> None:
    contents = {"flow": "1", "client": "2"}

    assert open_reference(sign_reference(contents, _KEY), _KEY) == contents


def test_a_reference_of_another_key_is_refused() -> None:
    assert open_reference(sign_reference({"flow": "1"}, _KEY), bytes([1] * 32)) is None


@given(st.text(), st.integers(0, 200))
def test_no_changed_reference_is_accepted(noise: str, place: int) -> None:
    reference = sign_reference({"flow": "1"}, _KEY)
    changed = reference[:place] + noise + reference[place + 1 :]

    assert changed == reference or open_reference(changed, _KEY) is None


@pytest.mark.parametrize("text", ["", ".", "a.b", "é.é"])
def test_no_other_text_is_a_reference(text: str) -> None:
    assert open_reference(text, _KEY) is None


def test_a_token_has_three_unpadded_segments() -> None:
    token = json_web_token({"role": "initiator"}, _KEY)

    header, claims, signature = token.split(".")
    assert set(token) <= set(string.ascii_letters + string.digits + "-_.")
    assert json.loads(base64.urlsafe_b64decode(header + "==")) == {"alg": "HS256", "typ": "JWT"}
    assert json.loads(base64.urlsafe_b64decode(claims + "==")) == {"role": "initiator"}
    assert len(base64.urlsafe_b64decode(signature + "==")) == 32

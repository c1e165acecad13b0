"""Authentication and its errors: RFC 8489, section 9.2.4, and the demands of Firezone's clients."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.portal.derived_credentials import relay_credentials
from firezone_tunnel.core.relay.authentication import RejectedLogin
from firezone_tunnel.core.relay.budget import MAX_RESPONSE
from firezone_tunnel.core.relay.credentials import MAX_REALM, StampSecret, StaticUsers, stamp_password
from firezone_tunnel.core.relay.nonce import NONCE_KEY_SIZE, NONCE_LIFETIME, Nonces
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key
from tests.unit.core.relay.world import CLIENT4, CLIENT6, PEER4, SECRET, UTC, Client, World, code_of, parsed

TRANSPORT = (stun.REQUESTED_TRANSPORT, stun.UDP)
# docs/protocol/gateway-and-relay.md, 6.3
OWN_VECTOR = bytes.fromhex(
    "000300a02112a442000102030405060708090a0b00190004110000008000000402000000802200047465737400060036323030303030303030"
    "303a6b46386f3376474f71734261357645724c445253644572363969626145305056657a6c62564534464762590000001400086669726"
    "57a6f6e650015002430303030303030302d303030302d303030302d303030302d30303030303030303030303000080014b9d8ced7eb1b50f2"
    "0d5b2bbbc0d4b3537c6e2252"
)


@pytest.mark.parametrize(
    ("expiry", "secret", "salt", "password"),
    [
        (
            1892160000,
            "4c98bf59c99b3e467ecd7cf9d6b3e5279645fca59be67bc5bb4af3cf653761ab",
            "n23JJ2wKKtt30oXi",
            "00hqldgk5xLeKKOB+xls9mHMVtgqzie9DulfgQwMv68",
        ),
        (
            1685984278,
            "1cab293a-4032-46f4-862a-40e5d174b0d2",
            "uvdgKvS9GXYZ_vmv",
            "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg",
        ),
        (
            2000000000,
            SECRET,
            "kF8o3vGOqsBa5vErLDRSdEr69ibaE0PVezlbVE4FGbY",
            "g2w2oiZlW3A5DU4kTb8cRLDW3FHVA+owYXTWuP4YL4c",
        ),
    ],
)
def test_passwords_equal_upstreams(expiry: int, secret: str, salt: str, password: str) -> None:
    assert stamp_password(expiry, secret, salt) == password
    username = f"{expiry}:{salt}"
    assert StampSecret(secret).key(username) == long_term_key(username, "firezone", password)


def test_the_portal_and_the_relay_derive_the_same_credentials() -> None:
    relay = relay_credentials(
        "id",
        CLIENT4,
        stamp_secret=SECRET,
        public_key="AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
        expires_at=2000000000,
    )
    credentials = StampSecret(SECRET)

    assert credentials.key(relay.username) == long_term_key(relay.username, "firezone", relay.password)
    assert parsed(OWN_VECTOR).is_authentic(credentials.key(relay.username) or b"")


@pytest.mark.parametrize(
    "username", ["", "1:2:3", "abc", "abc:salt", "-1:salt", "+1:salt", "1.5:salt", "²:salt", f"{2**64}:x"]
)
def test_a_name_that_is_not_a_stamp_name_has_no_key(username: str) -> None:
    assert StampSecret(SECRET).key(username) is None
    assert not StampSecret(SECRET).is_current(username, 0)


def test_the_owner_of_a_stamp_name_does_not_depend_on_its_expiry() -> None:
    assert StampSecret(SECRET).owner("1:salt") == StampSecret(SECRET).owner("2:salt") == "salt"


def test_the_answer_to_a_request_without_credentials_has_realm_and_nonce() -> None:
    answer = Client(World()).ask(_request(TRANSPORT))

    assert code_of(answer) == 401
    assert answer.get(stun.REALM) == "firezone"
    assert answer.get(stun.NONCE)
    assert not answer.has_integrity


def test_firezones_first_allocate_has_no_nonce_and_gets_a_signed_401_with_a_nonce() -> None:
    client = Client(World())

    answer = client.ask(client.encode(Method.ALLOCATE, TRANSPORT))

    assert code_of(answer) == 401
    assert answer.is_authentic(client.key)
    client.nonce = answer.get(stun.NONCE)
    assert code_of(client.allocate()) == 0


def test_a_name_without_integrity_gets_a_signed_401() -> None:
    client = Client(World())

    answer = client.ask(_request(TRANSPORT, (stun.USERNAME, client.username)))

    assert code_of(answer) == 401
    assert answer.is_authentic(client.key)


def test_an_integrity_without_a_name_or_realm_is_400() -> None:
    client = Client(World())
    nameless = Message(Method.ALLOCATE, Kind.REQUEST, bytes(12), (TRANSPORT,)).encode(key=client.key)
    realmless = Message(Method.ALLOCATE, Kind.REQUEST, bytes(12), (TRANSPORT, (stun.USERNAME, client.username)))

    assert code_of(client.ask(nameless)) == 400
    answer = client.ask(realmless.encode(key=client.key))
    assert code_of(answer) == 400
    assert answer.is_authentic(client.key)


def test_a_wrong_password_is_401_signed_with_the_right_password() -> None:
    world = World()
    client = Client(world)
    client.request(Method.REFRESH)
    impostor = Client(world, username=client.username, password="guess")
    impostor.nonce = client.nonce

    answer = client.ask(impostor.encode(Method.ALLOCATE, TRANSPORT))

    assert code_of(answer) == 401
    assert answer.is_authentic(client.key)
    assert world.server.allocations == 0


def test_an_expired_name_is_401_and_its_nonce_still_good() -> None:
    world = World()
    expiry = int(world.utc) - 1
    expired = Client(world, username=f"{expiry}:salt", password=stamp_password(expiry, SECRET, "salt"))
    current = Client(world)
    current.request(Method.REFRESH)
    expired.nonce = current.nonce

    assert code_of(expired.allocate()) == 401
    assert code_of(current.allocate()) == 0


def test_a_name_is_good_until_its_second_has_passed() -> None:
    assert StampSecret(SECRET).is_current("1000:salt", 1000.0)
    assert not StampSecret(SECRET).is_current("1000:salt", 1000.5)


def test_every_error_is_signed_where_the_request_has_a_name() -> None:
    client = Client(World())
    client.request(Method.REFRESH)

    # `request` checks the signature of each.
    assert code_of(client.refresh(600)) == 437
    assert code_of(client.request(Method.ALLOCATE)) == 400
    assert code_of(client.bind(0x4000, PEER4)) == 437
    assert code_of(client.permit(PEER4)) == 437
    client.nonce = "stale"
    assert code_of(client.allocate()) == 438


def test_an_invalid_name_gets_an_unsigned_401() -> None:
    client = Client(World(), username="unknown")

    answer = client.ask(client.encode(Method.ALLOCATE, TRANSPORT))

    assert code_of(answer) == 401
    assert not answer.has_integrity


@pytest.mark.parametrize("fingerprint", [False, True])
@pytest.mark.parametrize("username", [f"{int(UTC)}:{'s' * 43}", "unknown"])
def test_a_401_says_unauthorized(username: str, fingerprint: bool) -> None:
    client = Client(World(), username=username, password=stamp_password(int(UTC), SECRET, "s" * 43))

    for request in (_request(TRANSPORT), client.encode(Method.ALLOCATE, TRANSPORT, fingerprint=fingerprint)):
        assert client.ask(request).get(stun.ERROR_CODE) == stun.ErrorCode(401, "Unauthorized")


def test_a_401_that_would_be_too_large_with_its_reason_has_none() -> None:
    long_realm = Client(World(credentials=StaticUsers({"a": "b"}, realm="r" * MAX_REALM)))
    short_name = Client(World(), username=f"{int(UTC)}:s", password=stamp_password(int(UTC), SECRET, "s"))

    for refusal in (
        long_realm.ask(_request(TRANSPORT)),
        short_name.ask(short_name.encode(Method.ALLOCATE, fingerprint=True)),
    ):
        assert refusal.get(stun.ERROR_CODE) == stun.ErrorCode(401)
        assert len(refusal.raw) <= MAX_RESPONSE


def test_credentials_that_are_not_valid_are_counted_by_reason() -> None:
    world = World()
    stale = Client(world, username=f"{int(UTC) - 1}:s", password=stamp_password(int(UTC) - 1, SECRET, "s"))
    wrong = Client(world, password="wrong")
    unknown = Client(world, username="unknown")
    for client in (stale, wrong, unknown, unknown):
        client.nonce = client.ask(_request(TRANSPORT)).get(stun.NONCE)
        assert world.server.last_rejected is None or client is not stale  # a challenge is not counted
        client.ask(client.encode(Method.ALLOCATE, TRANSPORT))

    assert world.server.counters.rejected_logins == {"expired": 1, "wrong password": 1, "unknown user": 2}
    assert world.server.last_rejected == RejectedLogin("unknown user", "unknown", CLIENT4)


@pytest.mark.parametrize("nonce", ["", "x", "00000000-0000-0000-0000-000000000000", "A" * 24, "é" * 24, "A" * 700])
def test_a_nonce_that_we_never_issued_is_438_with_a_valid_nonce(nonce: str) -> None:
    client = Client(World())
    client.nonce = nonce

    answer = client.ask(client.encode(Method.ALLOCATE, TRANSPORT))

    assert code_of(answer) == 438
    assert answer.is_authentic(client.key)
    assert answer.get(stun.REALM) == "firezone"
    client.nonce = answer.get(stun.NONCE)
    assert code_of(client.allocate()) == 0


def test_a_nonce_is_good_for_an_hour() -> None:
    world = World()
    client = Client(world)
    client.allocate((stun.LIFETIME, 3600))
    world.advance(NONCE_LIFETIME - 1)
    assert code_of(client.refresh(3600)) == 0

    world.advance(2)

    assert code_of(client.refresh(3600)) == 438


@pytest.mark.parametrize("other", [SocketAddress("5.5.5.5", 52626), SocketAddress("5.5.5.6", 52625), CLIENT6])
def test_a_nonce_is_good_for_one_address_only(other: SocketAddress) -> None:
    client = Client(World())
    client.allocate()

    client.address = other

    assert code_of(client.allocate()) == 438


@given(st.text(max_size=40), st.floats(0, 2**33))
def test_no_text_is_a_nonce_by_chance(text: str, now: float) -> None:
    nonces = Nonces(b"k" * NONCE_KEY_SIZE)

    assert not nonces.is_valid(text, CLIENT4, now)
    assert nonces.is_valid(nonces.issue(CLIENT4, now), CLIENT4, now + NONCE_LIFETIME - 1)
    assert not nonces.is_valid(nonces.issue(CLIENT4, now), CLIENT4, now + NONCE_LIFETIME + 1)


def test_nonces_of_two_relays_differ() -> None:
    nonces = [Nonces(bytes([number]) * NONCE_KEY_SIZE).issue(CLIENT4, 0) for number in range(2)]

    assert nonces[0] != nonces[1]


def test_workers_take_the_nonces_of_each_other() -> None:
    key = bytes(NONCE_KEY_SIZE)
    client = Client(World(workers=2, worker=0, nonce_key=key))
    assert code_of(client.allocate()) == 0

    client.world = World(workers=2, worker=1, nonce_key=key)

    assert code_of(client.refresh()) == 437  # a known user, but without an allocation


def test_listed_users_are_let_in_under_the_realm_of_the_operator() -> None:
    world = World(credentials=StaticUsers({"マトリックス": "TheMatrIX"}, realm="example.org"))
    client = Client(world, username="マトリックス", password="TheMatrIX")
    client.realm = "example.org"
    stranger = Client(world, username="smith", password="TheMatrIX")

    assert code_of(client.allocate()) == 0
    refusal = stranger.ask(stranger.encode(Method.ALLOCATE, TRANSPORT))
    assert (code_of(refusal), refusal.get(stun.REALM)) == (401, "example.org")


@pytest.mark.parametrize("realm", ["", "r" * 33, "é" * 17])
def test_a_realm_that_is_empty_or_too_long_is_refused(realm: str) -> None:
    with pytest.raises(ValueError, match="realm"):
        StaticUsers({}, realm=realm)


def test_attributes_after_the_integrity_change_nothing() -> None:
    world = World()
    client = Client(world)
    client.allocate()
    genuine = client.encode(Method.REFRESH)
    appended = bytes.fromhex("000d000400000000")  # LIFETIME 0
    forged = genuine[:2] + (len(genuine) - 20 + len(appended)).to_bytes(2, "big") + genuine[4:] + appended

    answer = client.ask(forged)

    assert answer.get(stun.LIFETIME) == 600
    assert world.server.allocations == 1


def test_the_expiry_of_names_is_judged_by_the_wall_clock() -> None:
    world = World()
    world.now = 5_000_000.0  # far more than the name's remaining life, which counts from UTC
    late = Client(world, username=f"{int(UTC)}:s", password=stamp_password(int(UTC), SECRET, "s"))

    late.nonce = late.ask(_request(TRANSPORT)).get(stun.NONCE)

    assert code_of(late.allocate()) == 401


def _request(*attributes: tuple[stun.Attribute[object], object]) -> bytes:
    return Message(Method.ALLOCATE, Kind.REQUEST, bytes(12), attributes).encode()

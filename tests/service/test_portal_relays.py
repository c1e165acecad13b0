"""Announcements of new and lost relays: recipients, times and credentials."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from tests.service.portal_peers import SEED, Portal, key, start_portal, stop_portal, until

_SECRETS = {digit: digit * 64 for digit in "123456"}


@pytest_twisted.async_yield_fixture
async def portal(tmp_path: Path) -> AsyncIterator[Portal]:
    portal = await start_portal(tmp_path)
    yield portal
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_a_dual_stack_relay_is_two_adjacent_entries_with_credentials_that_it_can_check(portal: Portal) -> None:
    await portal.join("relay", stamp_secret=_SECRETS["1"], ipv6="2001:db8::10", port=3479)

    for role, number in (("client", 1), ("gateway", 2)):
        first, second = (await portal.join(role)).init["relays"]
        assert (first["addr"], second["addr"]) == ("198.51.100.10:3479", "[2001:db8::10]:3479")
        assert first["id"] == second["id"]
        expires, salt = first["username"].split(":")
        assert int(expires) == first["expires_at"] == 2145916800
        assert salt == _unpadded(hashlib.sha256(key(number).encode()).digest())
        password = f"{expires}:{_SECRETS['1']}:{salt}"
        assert first["password"] == second["password"] == _unpadded(hashlib.sha256(password.encode()).digest())


@pytest_twisted.ensureDeferred
async def test_each_peer_gets_at_most_two_relays_and_a_device_keeps_its_own(portal: Portal) -> None:
    for number in range(5):
        await portal.join("relay", ipv4=f"198.51.100.{number}")

    first = (await portal.join("client")).init["relays"]
    again = (await portal.join("client")).init["relays"]

    assert len({relay["id"] for relay in first}) == 2
    assert again == first


@pytest.mark.parametrize("role", ["client", "gateway"])
@pytest_twisted.ensureDeferred
async def test_the_first_relay_is_sent_at_once(portal: Portal, role: str) -> None:
    peer = await portal.join(role)

    await portal.join("relay")

    news = await peer.receive("relays_presence")
    assert (news["disconnected_ids"], len(news["connected"])) == ([], 1)


@pytest_twisted.ensureDeferred
async def test_a_second_relay_is_sent_after_a_second(portal: Portal) -> None:
    await portal.join("relay")
    client = await portal.join("client")

    await portal.join("relay", ipv4="198.51.100.20")
    assert await client.settle() == []
    portal.advance(1.1)

    news = await client.receive("relays_presence")
    assert (news["disconnected_ids"], len(news["connected"])) == ([], 2)


@pytest_twisted.ensureDeferred
async def test_a_lost_relay_is_reported_after_a_second_with_its_replacement(portal: Portal) -> None:
    relays = {number: await portal.join("relay", ipv4=f"198.51.100.{number}") for number in (10, 20, 30)}
    portal.advance(1.1)
    client = await portal.join("client")
    had = {relay["addr"]: relay["id"] for relay in client.init["relays"]}
    lost = next(number for number in relays if f"198.51.100.{number}:3478" in had)

    relays[lost].abort()
    await until(lambda: relays[lost].closed_with)
    assert await client.settle() == []
    await _until_updated(portal, client)

    news = await client.receive("relays_presence")
    assert news["disconnected_ids"] == [had[f"198.51.100.{lost}:3478"]]
    assert len({relay["id"] for relay in news["connected"]} - set(news["disconnected_ids"])) == 2


@pytest_twisted.ensureDeferred
async def test_a_relay_that_comes_back_with_its_secret_within_the_second_is_not_reported(portal: Portal) -> None:
    relay = await portal.join("relay")
    client = await portal.join("client")

    relay.abort()
    await until(lambda: relay.closed_with)
    await portal.join("relay")
    portal.advance(2)

    assert await client.settle() == []


@pytest_twisted.ensureDeferred
async def test_a_restarted_relay_is_sent_at_once_under_its_old_id(portal: Portal) -> None:
    relay = await portal.join("relay", stamp_secret=_SECRETS["1"])
    client = await portal.join("client")
    (before,) = client.init["relays"]

    relay.abort()
    await portal.join("relay", stamp_secret=_SECRETS["2"])

    news = await client.receive("relays_presence")
    (after,) = news["connected"]
    assert news["disconnected_ids"] == [before["id"]]
    assert (after["id"], after["username"]) == (before["id"], before["username"])
    assert after["password"] != before["password"]


@pytest_twisted.ensureDeferred
async def test_the_last_relay_leaves_an_empty_list_and_the_next_is_sent_at_once(portal: Portal) -> None:
    relay = await portal.join("relay")
    client = await portal.join("client")

    relay.abort()
    await _until_updated(portal, client)
    assert (await client.receive("relays_presence"))["connected"] == []
    await portal.join("relay", ipv4="198.51.100.20")

    assert len((await client.receive("relays_presence"))["connected"]) == 1


@pytest.mark.parametrize("role", ["client", "gateway"])
@pytest_twisted.ensureDeferred
async def test_no_relays_is_answered_with_the_current_relays(portal: Portal, role: str) -> None:
    await portal.join("relay")
    peer = await portal.join(role, v2=True)

    peer.send("no_relays", {})

    news = await peer.receive("relays_presence")
    assert (news["disconnected_ids"], news["connected"]) == ([], peer.init["relays"])


@pytest_twisted.ensureDeferred
async def test_the_newest_connection_of_a_relay_wins(portal: Portal) -> None:
    first = await portal.join("relay")

    second = await portal.join("relay")

    assert await first.closed() == 1000
    assert await second.settle() == []
    assert len((await portal.join("client")).init["relays"]) == 1


async def _until_updated(portal: Portal, peer: Any) -> None:
    def is_updated() -> bool:
        portal.advance(0.2)
        return any(frame["event"] == "relays_presence" for frame in peer.frames)

    await until(is_updated)


def _unpadded(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


_OURS = "Linux/6.8 connlib/1.5.12 (x86_64; firezone_tunnel/0.1.0)"
_TURN_SERVER = """
[[turn_servers]]
name = "coturn"
addresses = ["192.0.2.3:3478", "[2001:db8::3]:3478"]
username = "user"
password = "secret"
"""


@pytest.mark.parametrize("role", ["client", "gateway"])
@pytest_twisted.ensureDeferred
async def test_standard_turn_servers_are_for_our_own_peers_and_come_on_top_of_the_relays(
    tmp_path: Path, role: str
) -> None:
    portal = await start_portal(tmp_path, SEED + _TURN_SERVER)
    await portal.join("relay", ipv4="198.51.100.1")
    await portal.join("relay", ipv4="198.51.100.2")

    ours = (await portal.join(role, agent=_OURS)).init["relays"]
    theirs = (await portal.join(role, external_id="another")).init["relays"]

    assert [relay["addr"] for relay in ours[2:]] == ["192.0.2.3:3478", "[2001:db8::3]:3478"]
    assert {(relay["username"], relay["password"], relay["realm"]) for relay in ours[2:]} == {("user", "secret", None)}
    assert len(theirs) == 2
    assert all("realm" not in relay for relay in theirs)
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_added_and_removed_turn_servers_are_sent_to_our_own_peers(tmp_path: Path) -> None:
    portal = await start_portal(tmp_path, SEED + _TURN_SERVER)
    ours, theirs = await portal.join("client", agent=_OURS), await portal.join("gateway")

    await portal.reseed(("192.0.2.3:3478", "192.0.2.4:3478"))

    news = await ours.receive("relays_presence")
    assert news["disconnected_ids"] == [ours.init["relays"][0]["id"]]
    assert [relay["addr"] for relay in news["connected"]] == ["192.0.2.4:3478", "[2001:db8::3]:3478"]
    assert await theirs.settle() == []
    await stop_portal(portal)

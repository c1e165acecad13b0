"""Candidates: priorities, the text form of both protocol generations, and arbitrary text."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from firezone_tunnel.core.ice.candidate import (
    Candidate,
    CandidateKind,
    candidate_priority,
    is_usable,
    pair_priority,
    parse_sdp,
)
from firezone_tunnel.core.sansio import SocketAddress
from tests.unit.core.messages.recorded import SESSIONS, candidates

_IPV4 = SocketAddress("192.0.2.1", 52625)
_IPV6 = SocketAddress("2001:db8::1", 52625)
_RELAYED = SocketAddress("198.51.100.1", 50000)
_HOST_TEXT = "candidate:fffeff7e67626e7f55c03bdf 1 udp 2130706175 192.0.2.1 52625 typ host"

_addresses = st.builds(
    SocketAddress,
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str),
    st.integers(1, 0xFFFF),
).filter(is_usable)


@pytest.mark.parametrize(
    ("candidate", "priority"),  # docs/protocol/data-plane.md, 12.1
    [
        (Candidate.host(_IPV6), 2130706431),
        (Candidate.host(_IPV4), 2130706175),
        (Candidate.host(_IPV4).lowered(), 2130705663),
        (Candidate.server_reflexive(SocketAddress("203.0.113.1", 40000), _IPV4), 1686109951),
        (Candidate.relayed(SocketAddress("2001:db8::9", 50000)), 37748735),
        (Candidate.relayed(_RELAYED), 37748479),
        (Candidate.relayed(_RELAYED, other_family=True), 37492479),
    ],
)
def test_priorities_match_the_table(candidate: Candidate, priority: int) -> None:
    assert candidate.priority == priority


@pytest.mark.parametrize(
    ("candidate", "priority"),  # docs/protocol/data-plane.md, 12.1
    [
        (Candidate.host(_IPV6), 1862270975),
        (Candidate.host(_IPV4), 1862270719),
        (Candidate.relayed(SocketAddress("2001:db8::9", 50000)), 1849688063),
        (Candidate.relayed(_RELAYED), 1849687807),
    ],
)
def test_a_check_carries_the_local_preference_of_its_own_candidate(candidate: Candidate, priority: int) -> None:
    assert candidate.reflexive_priority == priority


@pytest.mark.parametrize(("local_preference", "priority"), [(65535, 1694498815), (65534, 1694498559)])
def test_a_reflexive_candidate_that_was_never_added_has_full_local_preference(
    local_preference: int, priority: int
) -> None:
    assert candidate_priority(CandidateKind.SERVER_REFLEXIVE, local_preference) == priority


def test_the_priority_of_a_pair_is_the_same_for_both_agents_but_for_who_controls() -> None:
    assert pair_priority(3, 2) == (2 << 32) + 6 + 1
    assert pair_priority(2, 3) == (2 << 32) + 6
    assert pair_priority(5, 5) == (5 << 32) + 10


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_every_recorded_candidate_is_read_and_written_back(session: Path) -> None:
    texts = candidates(session)
    for text in texts:
        candidate = parse_sdp(text)

        assert candidate is not None, text
        assert candidate.to_sdp() == text
    assert len(texts) >= 4


def test_recorded_candidates_are_of_all_kinds_that_upstream_signals() -> None:
    read = [parse_sdp(text) for session in SESSIONS for text in candidates(session)]

    assert {candidate.kind for candidate in read if candidate} == {
        CandidateKind.HOST,
        CandidateKind.SERVER_REFLEXIVE,
        CandidateKind.RELAYED,
    }


def test_our_candidates_are_written_as_upstream_writes_them_except_for_the_hash() -> None:
    text = Candidate.host(_IPV4).to_sdp()

    assert text.startswith("candidate:fffeff7e")
    assert text.partition(" ")[2] == "1 udp 2130706175 192.0.2.1 52625 typ host"


@pytest.mark.parametrize("address", [_RELAYED, SocketAddress("2001:db8::9", 50000)])
def test_a_relayed_or_reflexive_candidate_does_not_reveal_its_base(address: SocketAddress) -> None:
    unspecified = "raddr :: rport 0" if address.is_ipv6 else "raddr 0.0.0.0 rport 0"
    base = _IPV6 if address.is_ipv6 else _IPV4

    assert Candidate.relayed(address).to_sdp().endswith(f"typ relay {unspecified}")
    assert Candidate.server_reflexive(address, base).to_sdp().endswith(f"typ srflx {unspecified}")


@pytest.mark.parametrize(
    "text",
    [
        "candidate:7031633958891736544 1 udp 50331391 198.51.100.10 53909 typ relay",
        "candidate:1 1 udp 2113929471 192.0.2.5 51820 typ host",
        "a=" + _HOST_TEXT,
        _HOST_TEXT.replace("udp", "UDP"),
        _HOST_TEXT + " generation 0 network-id 3 ufrag abcd network-cost 50",
        _HOST_TEXT + " future thing ufrag abcd",
        _HOST_TEXT.replace("typ host", "typ srflx raddr 10.0.0.1 rport 52625 ufrag abcd"),
        _HOST_TEXT.replace("typ host", "typ prflx raddr 10.0.0.1 rport 52625"),
        _HOST_TEXT.replace("192.0.2.1", "127.0.0.1"),
        _HOST_TEXT.replace("192.0.2.1", "fe80::1"),
        _HOST_TEXT + " ufrag",  # an attribute that was cut off
    ],
)
def test_other_spellings_are_read(text: str) -> None:
    assert parse_sdp(text) is not None


def test_attributes_after_the_kind_are_read_in_any_order() -> None:
    first = parse_sdp(_HOST_TEXT.replace("typ host", "typ relay ufrag abcd unknown 1 raddr 10.0.0.1 rport 7"))
    second = parse_sdp(_HOST_TEXT.replace("typ host", "typ relay raddr 10.0.0.1 rport 7 ufrag abcd"))

    assert first == second
    assert first is not None
    assert (first.ufrag, first.related) == ("abcd", SocketAddress("10.0.0.1", 7))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "candidate:",
        _HOST_TEXT.removeprefix("candidate:"),
        _HOST_TEXT.replace("candidate:fffeff7e67626e7f55c03bdf", "candidate:"),
        _HOST_TEXT.replace(" 1 udp", " 2 udp"),
        _HOST_TEXT.replace(" 1 udp", " 1 tcp"),
        _HOST_TEXT.replace("2130706175", "4294967296"),
        _HOST_TEXT.replace("2130706175", "-1"),
        _HOST_TEXT.replace("2130706175", "2_1"),
        _HOST_TEXT.replace("52625", "65536"),
        _HOST_TEXT.replace("52625", "0"),
        _HOST_TEXT.replace("52625", "٣"),
        _HOST_TEXT.replace("192.0.2.1", "name.local"),
        _HOST_TEXT.replace("192.0.2.1", "192.0.2"),
        _HOST_TEXT.replace("192.0.2.1", "0.0.0.0"),
        _HOST_TEXT.replace("192.0.2.1", "224.0.0.1"),
        _HOST_TEXT.replace("192.0.2.1", "169.254.1.1"),
        _HOST_TEXT.replace("192.0.2.1", "255.255.255.255"),
        _HOST_TEXT.replace("192.0.2.1", "::"),
        _HOST_TEXT.replace("192.0.2.1", "ff02::1"),
        _HOST_TEXT.replace("192.0.2.1", "fe80::1%eth0"),
        _HOST_TEXT.replace("typ host", "typ hosts"),
        _HOST_TEXT.replace("typ host", "host typ"),
        _HOST_TEXT.replace("typ host", "typ relay raddr nowhere rport 0"),
        _HOST_TEXT.replace("typ host", "typ relay raddr 10.0.0.1 rport x"),
        _HOST_TEXT + " x" * 300,
    ],
)
def test_an_unusable_candidate_is_refused(text: str) -> None:
    assert parse_sdp(text) is None


@given(_addresses, _addresses, st.integers(0, 0xFFFFFFFF), st.sampled_from([None, "abcd", "u/+9"]))
def test_our_own_output_is_read_back(
    address: SocketAddress, base: SocketAddress, priority: int, ufrag: str | None
) -> None:
    assume(address.is_ipv6 == base.is_ipv6)
    for candidate in (
        Candidate.host(address),
        Candidate.server_reflexive(address, base),
        Candidate.relayed(address),
        Candidate.peer_reflexive(address, priority),
    ):
        signalled = attrs.evolve(candidate, base=address, ufrag=ufrag)  # the base stays with us

        assert parse_sdp(signalled.to_sdp()) == signalled


@given(st.text(max_size=600))
def test_any_text_is_a_candidate_or_none(text: str) -> None:
    _check(text)


_words = st.sampled_from(
    [
        *("candidate:1", "candidate:", "a=candidate:x", "1", "2", "udp", "typ", "host", "srflx", "relay", "raddr"),
        *("rport", "0.0.0.0", "192.0.2.1", "::", "2001:db8::1", "ufrag", "abcd", "4294967296", "52625", "tcptype"),
        *("１", ""),
    ]
)


@given(st.lists(_words, max_size=20).map(" ".join))
def test_any_words_of_a_candidate_are_a_candidate_or_none(text: str) -> None:
    _check(text)


@given(st.lists(_words, max_size=6))
def test_any_words_after_a_candidate_are_accepted(words: list[str]) -> None:
    _check(" ".join([_HOST_TEXT, *words]))


def _check(text: str) -> None:
    candidate = parse_sdp(text)
    if candidate is not None:
        assert is_usable(candidate.address)
        assert parse_sdp(candidate.to_sdp()) == candidate

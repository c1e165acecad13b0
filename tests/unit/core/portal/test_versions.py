"""User-Agents, and the behaviour that depends on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.portal.versions import UserAgent, Version, is_compatible, parse_user_agent


@pytest.mark.parametrize(
    ("text", "component", "version"),
    [
        ("Debian/12.0.0 connlib/1.4.16 (x86_64; 6.18.44)", "connlib", (1, 4, 16)),
        ("Debian/12.0.0 headless-client/1.5.12 (x86_64)", "headless-client", (1, 5, 12)),
        ("Mac OS/14.1 apple-client/1.5.11", "apple-client", (1, 5, 11)),
        ("relay/0.1.0", "relay", (0, 1, 0)),
        ("Linux/6.8 connlib/1.5.12 (x86_64 firezone_tunnel/0.1.0)", "connlib", (1, 5, 12)),
        ("Linux/6.8 gateway/1.7.0-rc.1+abc connlib/1.0.0", "gateway", (1, 7, 0)),
    ],
)
def test_the_first_known_component_counts(text: str, component: str, version: tuple[int, int, int]) -> None:
    agent = parse_user_agent(text)

    assert agent is not None
    assert (agent.component, agent.version) == (component, Version(*version))


def test_our_own_program_is_distinguished_from_upstreams() -> None:
    ours = parse_user_agent("Linux/6.8 connlib/1.5.12 (x86_64; firezone_tunnel/0.1.0)")
    theirs = parse_user_agent("Linux/6.8 connlib/1.5.12 (x86_64)")

    assert ours is not None and ours.is_ours
    assert theirs is not None and not theirs.is_ours


@pytest.mark.parametrize("text", ["", "Linux/6.8", "curl/8.0", "connlib", "xconnlib/1.0.0"])
def test_an_agent_without_a_known_component_is_unknown(text: str) -> None:
    assert parse_user_agent(text) is None


@pytest.mark.parametrize("version", ["", "1", "1.2", "1.2.3.4", "v1.2.3", "01.2.3", "1.2.x", "1.2." + "3" * 5000])
def test_a_version_that_is_not_semantic_is_unknown(version: str) -> None:
    assert parse_user_agent(f"connlib/{version}") == UserAgent("connlib", None)


@given(st.text())
def test_any_text_is_either_an_agent_or_not(text: str) -> None:
    agent = parse_user_agent(text)

    assert agent is None or agent.component in text


@pytest.mark.parametrize(
    ("agent", "knows"),
    [
        ("headless-client/1.5.5", False),
        ("headless-client/1.5.6", True),
        ("gui-client/1.5.9", False),
        ("gui-client/1.5.10", True),
        ("apple-client/1.5.11", True),
        ("android-client/1.5.8", True),
        ("connlib/1.5.12", False),
        ("connlib/banana", False),
    ],
)
def test_sites_are_read_from_a_version_on(agent: str, knows: bool) -> None:
    parsed = parse_user_agent(agent)

    assert parsed is not None
    assert parsed.knows_sites is knows


@pytest.mark.parametrize(
    ("client", "gateway", "minor_window", "expected"),
    [
        ((1, 5, 3), (1, 4, 16), False, True),
        ((1, 4, 0), (1, 3, 9), False, False),
        ((1, 3, 0), (1, 1, 0), False, True),
        ((1, 3, 0), (1, 0, 9), False, False),
        ((1, 0, 0), (1, 0, 0), False, True),
        ((1, 5, 3), (1, 9, 0), False, True),
        ((1, 5, 12), (1, 6, 1), True, True),
        ((1, 6, 0), (1, 5, 0), True, True),
        ((1, 5, 12), (1, 7, 0), True, False),
        ((1, 7, 0), (1, 5, 0), True, False),
        ((2, 5, 0), (1, 5, 0), True, False),
    ],
)
def test_which_versions_may_connect(
    client: tuple[int, int, int], gateway: tuple[int, int, int], minor_window: bool, expected: bool
) -> None:
    assert is_compatible(Version(*client), Version(*gateway), minor_window=minor_window) is expected
    assert is_compatible(None, Version(*gateway), minor_window=minor_window) is False

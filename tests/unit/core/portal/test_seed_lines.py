"""The lines of tables and keys in a TOML text."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.portal.seed_lines import SeedLines

_IN_A_TEXT = '''[account]
name = """
[[sites]]
name = 1
"""
[[sites]]
'''


@pytest.mark.parametrize(
    ("text", "place", "line"),
    [
        ("[account]\nname = 1\n", ("account", None, "name"), 2),
        ("[account]\nname = 1\n", ("account", None, "slug"), 1),
        ("[account]\r\nname = 1\r\n", ("account", None, "name"), 2),
        ("# \u2028\x85\n[account]\n", ("account", None, None), 2),
        ("account.name = 1\n", ("account", None, "name"), 1),
        ("[[sites]]\nname = 1\n[[sites]]\nname = 2\n", ("sites", 1, "name"), 4),
        ("[[sites]]\n[[sites]]\nname = 2\n", ("sites", 0, "name"), 1),
        (' [[ "sites" ]] # here\n "name" = 1\n', ("sites", 0, "name"), 2),
        ("a = 1\nsites = [{ name = 1 }]\n", ("sites", 0, "name"), 2),
        (_IN_A_TEXT, ("sites", 0, None), 6),
        ("[[sites]]\nid = 1\n[[groups]]\nname = 1\n", ("sites", 0, "name"), 1),
        ("[[sites]]\nnames = 1\nname = 1\n", ("sites", 0, "name"), 3),
        ("[[policies]]\n[[policies.conditions]]\na = 1\n[[policies]]\n", ("policies", 1, None), 4),
        ("[account]\n", ("sites", 0, None), None),
    ],
)
def test_the_line(text: str, place: tuple[str, int | None, str | None], line: int | None) -> None:
    assert SeedLines(text, tomllib.loads(text)).find(*place) == line


@given(st.lists(st.tuples(st.sampled_from(["sites", "groups"]), st.integers(0, 3)), max_size=10))
def test_every_table_is_found(tables: list[tuple[str, int]]) -> None:
    text, expected = "", []
    for kind, padding in tables:
        number = sum(kind == other for other, _, _ in expected)
        expected.append((kind, number, text.count("\n") + 1))
        text += f"[[{kind}]]\nname = 1\n" + "# [[sites]]\n" * padding

    lines = SeedLines(text, tomllib.loads(text))

    assert [(kind, number, lines.find(kind, number)) for kind, number, _ in expected] == expected
    assert all(lines.find(kind, number, "name") == line + 1 for kind, number, line in expected)

"""The routing tables of the tunnel, and the mark of the packets that don't use them.

docs/protocol/data-plane.md, 8.
"""

from __future__ import annotations

from typing import NamedTuple

FIREZONE_MARK = 0xFD002021
"""What carries it uses the main table."""

ROUTE_PROTOCOL = 0xFD
"""Of our rules and routes: the kernel keeps it to show who made them (rtnetlink(7)). Nobody has registered it."""


class Table(NamedTuple):
    """A routing table for all unmarked packets, and the priority of the rule that selects it."""

    number: int
    priority: int


USER_TABLE = Table(0x2021FD00, 100)
LINK_SCOPE_TABLE = Table(0x2021FD01, 200)
INTERNET_TABLE = Table(0x2021FD02, 300)
TABLES = (USER_TABLE, LINK_SCOPE_TABLE, INTERNET_TABLE)

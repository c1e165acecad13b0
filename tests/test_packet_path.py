"""docs/packet-path.md and the two files of the packet path name functions that exist and every counter of a drop."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from firezone_tunnel.core.snownet.events import NodeCounters
from firezone_tunnel.core.tunnel.client import ClientCounters
from firezone_tunnel.core.tunnel.gateway import GatewayCounters
from firezone_tunnel.shell.tun.transport import TunCounters
from firezone_tunnel.shell.udp.segmented import SendCounters
from firezone_tunnel.shell.udp.transport import UdpCounters

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "packet-path.md"
WALKS = [PAGE, *sorted(ROOT.glob("firezone_tunnel/**/snownet/*bound.py"))]
NOT_DROPS = {
    "candidates_rejected",
    "candidates_without_connection",
    "paused",
    "read_errors",
    "received_batches",
    "received_bytes",
    "received_datagrams",
    "received_frames",
    "received_packets",
    "segmentation_refused",
    "sent_batches",
    "sent_bytes",
    "sent_datagrams",
    "turns",
    "written_bytes",
    "written_frames",
}


@pytest.mark.parametrize("page", WALKS, ids=lambda page: page.name)
def test_the_functions_on_the_way_exist(page: Path) -> None:
    text = page.read_text()
    text = text if page.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""
    named = set(re.findall(r"`([A-Z]\w+\.[a-zA-Z_]\w+)`", text))

    assert len(named) > 8
    assert named - set(_methods()) == set()


@pytest.mark.parametrize(
    "counters", [ClientCounters, GatewayCounters, NodeCounters, SendCounters, UdpCounters, TunCounters]
)
def test_the_page_names_every_counter_of_a_drop(counters: type[attrs.AttrsInstance]) -> None:
    page = PAGE.read_text()

    drops = {field.name for field in attrs.fields(counters)} - NOT_DROPS

    assert {name for name in drops if f"`{name}`" not in page} == set()


def _methods() -> Iterator[str]:
    for path in ROOT.glob("firezone_tunnel/**/*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield f"{node.name}.{member.name}"

"""The program and version in a User-Agent, and version rules (docs/protocol/portal-protocol.md, 1.2, 3.9)."""

from __future__ import annotations

import re
from typing import NamedTuple

_COMPONENTS = ("connlib", "relay", "headless-client", "gui-client", "apple-client", "android-client", "gateway")
_SEMVER = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")

# From these versions on, a client reads `sites` and `site_id` instead of `gateway_groups` and `gateway_group_id`.
_KNOWS_SITES = {
    "apple-client": (1, 5, 11),
    "headless-client": (1, 5, 6),
    "android-client": (1, 5, 8),
    "gui-client": (1, 5, 10),
}
_INTERNET_RESOURCE = (1, 3, 0)
_FLOWS = (1, 4, 0)
_FIRST_COMPATIBLE = (1, 1, 0)


class Version(NamedTuple):
    major: int
    minor: int
    patch: int


class UserAgent(NamedTuple):
    """`version` is None if it isn't a semantic version. `is_ours`: the peer is this program."""

    component: str
    version: Version | None
    is_ours: bool = False

    @property
    def knows_sites(self) -> bool:
        first = _KNOWS_SITES.get(self.component)
        return first is not None and self.version is not None and self.version >= first

    @property
    def knows_internet_resource(self) -> bool:
        return self.version is not None and self.version >= _INTERNET_RESOURCE


def parse_user_agent(user_agent: str) -> UserAgent | None:
    """Parse the first token such as `connlib/1.5.3` or `gateway/1.6.1`; None without one."""
    for token in user_agent.split(" "):
        component, slash, text = token.partition("/")
        if slash and component in _COMPONENTS:
            found = _SEMVER.fullmatch(text)
            version = Version(*map(int, found.groups())) if found else None
            return UserAgent(component, version, is_ours="firezone_tunnel/" in user_agent)
    return None


def is_compatible(client: Version | None, gateway: Version | None, *, minor_window: bool) -> bool:
    """Whether this client may connect to this gateway.

    `minor_window` adds V2's rule: at most one minor version apart.
    """
    if client is None or gateway is None:
        return False
    if client >= _FLOWS and gateway < _FLOWS:
        return False
    if _FIRST_COMPATIBLE <= client < _FLOWS and gateway < _FIRST_COMPATIBLE:
        return False
    return not minor_window or (client.major == gateway.major and abs(client.minor - gateway.minor) <= 1)

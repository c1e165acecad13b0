"""Seed files for the tests of the portal: built from their parts, or drawn by Hypothesis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs
from hypothesis import strategies as st

from firezone_tunnel.errors import ConfigurationError
from tests.unit.apps.portal.world import TOKENS, account

DENIED = 'conditions = [{ property = "remote_ip", operator = "is_in_cidr", values = ["203.0.113.0/24"] }]'
_WORKING_HOURS = (
    'conditions = [{ property = "current_utc_datetime", operator = "is_in_day_of_week_time_ranges", '
    'values = ["M/true/UTC", "T/08:00-18:00/UTC"] }]'
)


@attrs.frozen
class Resource:
    """`body` has the keys besides the name and the site; `policies` has the conditions of each of its policies."""

    name: str
    body: str
    policies: tuple[str, ...] = ("",)

    def text(self) -> str:
        resource = f'[[resources]]\nname = {quote(self.name)}\nsite = "HQ"\n{self.body}\n'
        policy = f'[[policies]]\ngroup = "Everyone"\nresource = {quote(self.name)}\n'
        return resource + "".join(policy + conditions + "\n" for conditions in self.policies)


LAB = Resource("Lab", 'type = "cidr"\naddress = "10.20.0.0/16"')
WIKI = Resource("Wiki", 'type = "dns"\naddress = "*.wiki.corp.example"\nfilters = ["tcp/443", "icmp"]')
INTERNET = Resource("Internet", 'type = "internet"')


@attrs.frozen
class Seed:
    """The parts of a file that tests vary. `ends` has the `expires_at` line of each role's token."""

    slug: str = "acme"
    email: str = 'email = "dev@example.com"'
    ends: tuple[str, str, str] = ("", "", "")
    roles: tuple[str, ...] = ("client", "gateway", "relay")
    resources: tuple[Resource, ...] = (LAB, WIKI, INTERNET)
    dns: str = ""
    turn_server: str = ""

    def text(self) -> str:
        owners = {"client": 'actor = "Dev"', "gateway": 'site = "HQ"', "relay": ""}
        ends = dict(zip(TOKENS, self.ends, strict=True))
        return "\n".join(
            (
                '[account]\nname = "Acme"\nid = "2b7e1516-28ae-4d2a-a6ab-f7158809cf03"',
                f"slug = {quote(self.slug)}",
                f"[dns]\n{self.dns}",
                '[[sites]]\nname = "HQ"',
                '[[groups]]\nname = "Everyone"',
                f'[[actors]]\nname = "Dev"\ngroups = ["Everyone"]\n{self.email}',
                *(
                    f'[[tokens]]\nkind = "{role}"\ntoken = "{TOKENS[role]}"\n{owners[role]}\n{ends[role]}'
                    for role in self.roles
                ),
                *(resource.text() for resource in self.resources),
                self.turn_server,
            )
        )


TURN_SERVER = '[[turn_servers]]\nname = "coturn"\naddresses = ["192.0.2.3:3478"]\nusername = "u"\npassword = "p"\n'


def quote(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _list(key: str, values: Sequence[str]) -> str:
    return f"{key} = [{', '.join(map(quote, values))}]\n"


def _is_accepted(seed: Seed) -> bool:
    try:
        account(seed.text())
    except ConfigurationError:
        return False
    return True


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
_FILTERS = st.lists(st.sampled_from(["icmp", "tcp", "udp", "tcp/80", "udp/53-60", "tcp/0", "tcp/65535"]), max_size=3)
_ENDS = st.sampled_from(
    [
        "",
        "expires_at = 2040-01-01T00:00:00Z",
        "expires_at = 2026-09-21T15:13:20Z",
        "expires_at = 2001-01-01T00:00:00Z",
        "expires_at = 9999-12-31T23:59:59-12:00",
    ]
)
_ADDRESSES = st.sampled_from(
    [
        ("cidr", "10.20.0.0/16"),
        ("cidr", "2001:db8::/32"),
        ("cidr", "10.20.0.1"),
        ("ip", "10.0.0.1"),
        ("ip", "2001:DB8::1"),
        ("ip", "fe80::1%eth0"),
        ("dns", "*.corp.example"),
        ("dns", "**.Corp.example."),
        ("dns", "web?.corp.example"),
    ]
)


_POLICIES = st.sampled_from([("",), ("",), ("", _WORKING_HOURS), (_WORKING_HOURS,), (DENIED,), ()])


@st.composite
def _resources(draw: st.DrawFn, number: int) -> Resource:
    if draw(st.sampled_from([False, False, False, True])):
        body = 'type = "internet"\n'
    else:
        kind, address = draw(_ADDRESSES)
        body = f"type = {quote(kind)}\naddress = {quote(address)}\n" + _list("filters", draw(_FILTERS))
        if draw(st.booleans()):
            body += f"address_description = {quote(draw(_NAMES))}\n"
        if kind == "dns":
            body += draw(st.sampled_from(["", 'ip_stack = "ipv4_only"\n', 'ip_stack = "dual"\n']))
    return Resource(f"{number}{draw(_NAMES)}", body, draw(_POLICIES))


_UPSTREAM = st.sampled_from(
    ["10.0.0.53", "10.0.0.53:5353", "2001:db8::53", "[2001:db8::53]:53", "[2001:db8::53]", "[fe80::1%eth0]:53"]
)
_DOH = st.sampled_from(
    ["https://dns.example/dns-query", "https://[2001:db8::53]:8443/q", "https://", "https://a b/", "https://a:99999/"]
)
_SEARCH = st.sampled_from(["corp.example", "Corp.Example", "x_y.example", "-a.example", "local"])


@st.composite
def _dns(draw: st.DrawFn) -> str:
    text = _list("upstream", draw(st.lists(_UPSTREAM, max_size=2)))
    text += _list("upstream_doh", draw(st.lists(_DOH, max_size=1)))
    return text + (f"search_domain = {quote(draw(_SEARCH))}\n" if draw(st.booleans()) else "")


@st.composite
def _drawn(draw: st.DrawFn) -> Seed:
    count = draw(st.sampled_from([1, 2, 3, 0]))
    return Seed(
        slug=draw(st.sampled_from(["acme", "acme2"])),
        email=draw(st.sampled_from(["", 'email = "dev@example.com"'])),
        ends=draw(st.tuples(_ENDS, _ENDS, _ENDS)),
        roles=draw(st.sampled_from([("client", "gateway", "relay")] * 4 + [("client", "gateway"), ("gateway",)])),
        resources=tuple(draw(_resources(number)) for number in range(count)),
        dns=draw(_dns()),
        turn_server=draw(st.sampled_from(["", TURN_SERVER, TURN_SERVER + 'realm = "r"\n'])),
    )


SEEDS: st.SearchStrategy[Any] = _drawn().filter(_is_accepted).map(Seed.text)
"""The texts of valid files, some with values that are nearly invalid."""

"""The seed file: its meaning, and the errors of invalid files."""

from __future__ import annotations

from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.portal.account import Account, PeerRole, token_hash
from firezone_tunnel.core.portal.seed import SeedContext, parse_seed
from firezone_tunnel.errors import ConfigurationError

_EXAMPLE = Path(__file__).parents[4] / "docs/examples/portal.toml"
_HEAD = """\
[account]
name = "Acme"
slug = "acme"

[[sites]]
name = "HQ"

[[groups]]
name = "Everyone"

[[actors]]
name = "Dev"
groups = ["Everyone"]
"""
_TURN = '\n[[turn_servers]]\nname = "coturn"\nusername = "u"\npassword = "p"\n'
_RESOURCE = '\n[[resources]]\nname = "Lab"\nsite = "HQ"\n'


def _read_file(name: str) -> str:
    if name != "token":
        raise ValueError(f"can't read {name}: No such file or directory")
    return " .from-a-file\n"


_CONTEXT = SeedContext(_read_file, ZoneInfo)


def _parse(text: str) -> Account:
    return parse_seed(text, _CONTEXT)


def _error(text: str) -> str:
    with pytest.raises(ConfigurationError) as raised:
        _parse(text)
    return str(raised.value)


def test_the_example_in_the_documentation_is_a_valid_seed() -> None:
    account = _parse(_EXAMPLE.read_text())

    assert account.slug == "acme"
    assert {token.role for token in account.tokens.values()} == set(PeerRole)
    assert [resource.name for resource in account.resources.values()] == ["Lab", "Wiki"]
    assert [len(policy.conditions) for policy in account.policies] == [0, 2]


def test_ids_stay_the_same_and_follow_the_name() -> None:
    first, second, renamed = _parse(_HEAD), _parse(_HEAD), _parse(_HEAD.replace('"HQ"', '"Branch"'))

    assert first == second
    assert first.sites.keys() != renamed.sites.keys()
    assert first.actors.keys() == renamed.actors.keys()


def test_a_given_id_stays_when_the_name_changes() -> None:
    given_id = '"2B7E1516-28AE-4D2A-A6AB-F7158809CF03"'
    text = _HEAD.replace('name = "HQ"', f'name = "HQ"\nid = {given_id}')

    assert list(_parse(text).sites) == ["2b7e1516-28ae-4d2a-a6ab-f7158809cf03"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('token = ".plain"', ".plain"),
        ('token_file = "token"', ".from-a-file"),
        (f'sha3_256 = "{token_hash(".hashed")}"', ".hashed"),
    ],
)
def test_a_token_is_given_in_one_of_three_ways(line: str, text: str) -> None:
    account = _parse(f'{_HEAD}\n[[tokens]]\nkind = "gateway"\nsite = "HQ"\n{line}\nexpires_at = 2030-01-01T00:00:00Z\n')

    token = account.token(PeerRole.GATEWAY, text, utc_now=1893455999)
    assert token is not None
    assert token.expires_at == 1893456000
    assert text not in repr(account)
    assert account.token(PeerRole.GATEWAY, text, utc_now=1893456000) is None
    assert account.token(PeerRole.CLIENT, text, utc_now=0) is None
    assert account.token(PeerRole.GATEWAY, text + "x", utc_now=0) is None


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ('["icmp"]', [Filter(protocol="icmp")]),
        ('["tcp"]', [Filter(protocol="tcp")]),
        ('["UDP/53"]', [Filter(protocol="udp", port_range_start=53, port_range_end=53)]),
        ('["tcp/80 - 90"]', [Filter(protocol="tcp", port_range_start=80, port_range_end=90)]),
    ],
)
def test_filters(text: str, filters: list[Filter]) -> None:
    account = _parse(f'{_HEAD}{_RESOURCE}type = "cidr"\naddress = "10.0.0.0/8"\nfilters = {text}\n')

    (resource,) = account.resources.values()
    assert list(resource.filters) == filters


@pytest.mark.parametrize(
    ("kind", "address", "expected"),
    [
        ("cidr", "10.1.2.3/8", "10.0.0.0/8"),
        ("ip", "10.1.2.3", "10.1.2.3/32"),
        ("ip", "2001:DB8::1", "2001:db8::1/128"),
        ("dns", "**.Corp.example", "**.corp.example"),
        ("dns", "web?.corp.example", "web?.corp.example"),
    ],
)
def test_addresses_are_brought_into_their_usual_form(kind: str, address: str, expected: str) -> None:
    account = _parse(f'{_HEAD}{_RESOURCE}type = "{kind}"\naddress = "{address}"\n')

    assert [resource.address for resource in account.resources.values()] == [expected]


@pytest.mark.parametrize(
    ("kind", "address", "complaint"),
    [
        ("cidr", "100.64.0.0/16", "overlaps the tunnel's own addresses"),
        ("cidr", "fd00::/8", "overlaps the tunnel's own addresses"),
        ("cidr", "0.0.0.0/0", "use type internet"),
        ("cidr", "127.0.0.0/8", "loopback"),
        ("cidr", "10.0.0.0/33", "10.0.0.0/33"),
        ("ip", "10.0.0.0/24", "use type cidr"),
        ("ip", "fe80::1%eth0", "has a scope"),
        ("dns", "corp.*", "top-level domain"),
        ("dns", "a b.example", "not a domain name"),
        ("dns", "10.0.0.1", "use type ip"),
        ("dns", "", "not a domain name"),
    ],
)
def test_an_address_that_cannot_be_served_is_refused(kind: str, address: str, complaint: str) -> None:
    error = _error(f'{_HEAD}{_RESOURCE}type = "{kind}"\naddress = "{address}"\n')

    assert error.startswith("[[resources]] in line 15: ")
    assert complaint in error


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "[account]: object missing required field `account`"),
        ("\nname = \n", "not valid TOML: Invalid value (at line 2, column 8)"),
        ("\nname =", "not valid TOML: Invalid value (at line 2, the last)"),
        (_HEAD.replace("acme", "A!"), "[account] in line 1: expected `str` matching regex"),
        (_HEAD + '[[actors]]\nname = "Dev"\n', "[[actors]] in line 14: it is a duplicate"),
        (_HEAD + '[[actors]]\nname = "Ops"\ngroups = ["Admins"]\n', "in line 14: there is no group named 'Admins'"),
        (_HEAD + "[[sites]]\nnme = 1\n", "[[sites]] in line 14: object"),
        (_HEAD + '[[tokens]]\nkind = "client"\ntoken = "x"\n', "in line 14: `actor` is required for a client's token"),
        (_HEAD + '[[tokens]]\nkind = "relay"\nsite = "HQ"\ntoken = "x"\n', "`site` is required for a gateway's token"),
        (_HEAD + '[[tokens]]\nkind = "relay"\n', "exactly one of `token`, `token_file` and `sha3_256`"),
        (_HEAD + '[[tokens]]\nkind = "relay"\ntoken_file = "gone"\n', "can't read gone: No such file"),
        (_HEAD + '[[tokens]]\nkind = "relay"\ntoken = " "\n', "the token is empty"),
        (_HEAD + '[[tokens]]\nkind = "relay"\ntoken = "x"\nexpires_at = 2030-01-01T00:00:00\n', "needs an offset"),
        (_HEAD + '[[policies]]\ngroup = "Everyone"\nresource = "Lab"\n', "there is no resource named 'Lab'"),
        (_HEAD + '[dns]\nupstream = ["100.64.0.1"]\n', "[dns] in line 14: the resolver 100.64.0.1 lies in"),
        (_HEAD + '[dns]\nupstream = ["10.0.0.1:99999"]\n', "not the address of a resolver"),
        (_HEAD + '[dns]\nupstream = ["[fe80::1%eth0]:53"]\n', "not the address of a resolver"),
        (_HEAD + '[dns]\nupstream_doh = ["http://dns.example/"]\n', "is not a https:// URL"),
        (_HEAD + '[dns]\nupstream_doh = ["https://"]\n', "is not a https:// URL"),
        (_HEAD + '[dns]\nupstream_doh = ["https://dns.example:99999/"]\n', "Port out of range"),
        (_HEAD + '[dns]\nsearch_domain = "a b"\n', "'a b' is not a domain name"),
        (_HEAD + _TURN + 'addresses = ["192.0.2.3"]\n', "turn_servers"),
        (_HEAD + _TURN + 'addresses = ["192.0.2.3:1", "192.0.2.4:1"]\n', "at most one address of each family"),
        (_HEAD + _RESOURCE + 'type = "internet"\nfilters = ["icmp"]\n', "an internet resource has no filters"),
        (_HEAD + '[[resources]]\nname = "Lab"\ntype = "internet"\n', "a resource needs a `site`"),
        (
            _HEAD + _RESOURCE + 'type = "cidr"\naddress = "10.0.0.0/8"\nfilters = ["tcp/9-8"]\n',
            "not a valid port range",
        ),
        (_HEAD + _RESOURCE + 'type = "cidr"\naddress = "10.0.0.0/8"\nfilters = ["sctp/9"]\n', "is not a filter"),
    ],
)
def test_an_error_is_reported_in_one_sentence_with_its_place(text: str, complaint: str) -> None:
    error = _error(text)

    assert complaint in error
    assert "\n" not in error


@given(st.text())
def test_any_text_is_a_seed_or_an_error(text: str) -> None:
    with pytest.raises(ConfigurationError):
        _parse(text)


@given(st.sampled_from(["upstream", "slug", "address", "filters", "conditions", "groups", "token"]), st.text())
def test_any_value_is_accepted_or_an_error(key: str, value: str) -> None:
    quoted = "".join(
        char if char.isalnum() else f"\\U{ord(char):08x}" for char in value if not "\ud800" <= char <= "\udfff"
    )
    text = _EXAMPLE.read_text().replace(f"{key} = ", f'{key} = "{quoted}" # ')

    try:
        _parse(text)
    except ConfigurationError as error:
        assert str(error)

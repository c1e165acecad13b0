"""The seed file: its meaning, and the errors of invalid files."""

from __future__ import annotations

import re
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.portal.account import Account, PeerRole, token_hash
from firezone_tunnel.core.portal.seed import SeedContext, SeedError, parse_seed
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
    return parse_seed(text, _CONTEXT).account


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
        ("cidr", "10.0.0.0/8", "10.0.0.0/8"),
        ("cidr", "10.1.2.3", "10.1.2.3/32"),
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
        ("cidr", "10.0.0.0/33", "'10.0.0.0/33' is not an IP address or network"),
        ("cidr", "10.20.0.7/24", "has host bits: the network is '10.20.0.0/24', the address alone '10.20.0.7'"),
        ("cidr", "2001:db8::7/64", "has host bits: the network is '2001:db8::/64', the address alone '2001:db8::7'"),
        ("ip", "10.20.0.7/24", "has host bits: the network is '10.20.0.0/24'"),
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

    assert error.startswith("[[resources]] 'Lab' in line 19: ")
    assert complaint in error


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "[account]: the table is missing"),
        ("\nname = \n", "not valid TOML in line 2, column 8: a value is missing, or a text is not in quotes"),
        ("\nname =", "not valid TOML in line 2, the last: a value is missing"),
        ("x = " + "1" * 5000, "not valid TOML: "),
        ("x = " + "[" * 5000, "not valid TOML: "),
        (_HEAD.replace("acme", "A!"), "[account] in line 3: `slug` must be 1 to 63 lower-case letters"),
        (_HEAD + '[[actors]]\nname = "Dev"\n', "[[actors]] 'Dev' in line 15: the name is used twice, also in line 11"),
        (
            _HEAD + '[[actors]]\nname = "Ops"\ngroups = ["Admins"]\n',
            "in line 16: there is no group 'Admins' (known: 'Everyone')",
        ),
        (
            _HEAD + "[[sites]]\nnme = 1\n",
            "[[sites]] in line 15: the key `nme` is unknown; did you mean `name`? (known: `name`, `id`)",
        ),
        (_HEAD + '[[tokens]]\nkind = "client"\ntoken = "x"\n', "in line 14: `actor` is required for a client's token"),
        (_HEAD + '[[tokens]]\nkind = "relay"\nsite = "HQ"\ntoken = "x"\n', "`site` is required for a gateway's token"),
        (_HEAD + '[[tokens]]\nkind = "relay"\n', "exactly one of `token`, `token_file` and `sha3_256`"),
        (_HEAD + '[[tokens]]\nkind = "relay"\ntoken_file = "gone"\n', "can't read gone: No such file"),
        (_HEAD + '[[tokens]]\nkind = "relay"\ntoken = " "\n', "the token is empty"),
        (_HEAD + '[[tokens]]\nkind = "relay"\ntoken = "x"\nexpires_at = 2030-01-01T00:00:00\n', "needs an offset"),
        (
            _HEAD + '[[policies]]\ngroup = "Everyone"\nresource = "Lab"\n',
            "[[policies]] in line 16: there is no resource 'Lab' (none is known)",
        ),
        (_HEAD + '[dns]\nupstream = ["100.64.0.1"]\n', "[dns] in line 15: the resolver 100.64.0.1 lies in"),
        (_HEAD + '[dns]\nupstream = ["10.0.0.1:99999"]\n', "not the address of a resolver"),
        (_HEAD + '[dns]\nupstream = ["[fe80::1%eth0]:53"]\n', "not the address of a resolver"),
        (_HEAD + '[dns]\nupstream_doh = ["http://dns.example/"]\n', "is not a https:// URL"),
        (_HEAD + '[dns]\nupstream_doh = ["https://"]\n', "is not a https:// URL"),
        (_HEAD + '[dns]\nupstream_doh = ["https://dns.example:99999/"]\n', "is not a https:// URL"),
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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            '[[resource]]\nname = "x"\n',
            "[resource] in line 14: no table has this name; did you mean 'resources'?",
        ),
        ('colour = "red"\n', "[colour] in line 14: no table has this name"),
        ("[[dns]]\n", "[dns] in line 14: there can be only one: write [dns]"),
        ('[turn_servers]\nname = "x"\n', "[turn_servers] in line 14: there can be several: write [[turn_servers]]"),
        ("tokens = [1]\n", "[[tokens]] in line 14: it is not a table"),
        (
            'tokens = [{ kind = "relay", tken = "x" }]\n',
            "[[tokens]] in line 14: the key `tken` is unknown; did you mean `",
        ),
        ('[[tokens]]\nkind = "gatway"\n', "[[tokens]] in line 15: `kind` can't be 'gatway'; did you mean 'gateway'?"),
        ("[[sites]]\nname = 7\n", "[[sites]] in line 15: `name` must be text of 1 to 255 characters"),
        ('[[sites]]\nname = "x"\nid = "7"\n', "[[sites]] 'x' in line 16: `id` must be a UUID"),
        ('[[actors]]\nname = "x"\ngroups = "Everyone"\n', "in line 16: `groups` must be a list of texts"),
        ('[[actors]]\nname = "x"\ngroups = ["everyone"]\n', "there is no group 'everyone'; did you mean 'Everyone'?"),
        ('[[tokens]]\nkind = "relay"\nexpires_at = "x"\n', "in line 16: `expires_at` must be a date and time, such as"),
        ('[[tokens]]\nkind = "relay"\ntoken = "x"\nexpires_at = 9999-12-31T23:59:59-01:00\n', "outside of the years"),
        ('[[policies]]\ngroup = "Everyone"\n', "[[policies]] in line 14: the key `resource` is missing"),
        (
            '[[policies]]\ngroup = "Everyone"\nresource = "x"\nconditions = 1\n',
            "in line 17: `conditions` must be a list",
        ),
        (
            '[[policies]]\ngroup = "Everyone"\nresource = "x"\nconditions = [{ property = "x", operator = "y" }]\n',
            "[[policies]] in line 17: condition 1: the key `values` is missing",
        ),
        (
            '[[sites]]\nname = "x\n',
            "not valid TOML in line 15, column 10: the text is not closed by a quote on its line",
        ),
    ],
)
def test_an_error_says_what_there_is_or_what_is_meant(text: str, complaint: str) -> None:
    head = _HEAD if not re.match(r"\w+ =", text) else _HEAD.replace("[account]", f"{text}[account]")
    line = 1 if head != _HEAD else 14

    assert complaint.replace("line 14", f"line {line}") in _error(_HEAD + text if head == _HEAD else head)


def test_all_errors_are_reported_in_the_order_of_their_lines() -> None:
    text = _HEAD + '[[actors]]\nname = "Ops"\ngroups = ["Admins"]\n[[sites]]\nnme = "x"\n[[sites]]\nname = ""\n'

    with pytest.raises(SeedError) as raised:
        _parse(text)

    assert [re.findall(r"line (\d+)", problem)[0] for problem in raised.value.problems] == ["16", "18", "20"]
    assert str(raised.value) == f"{raised.value.problems[0]} (and 2 more errors)"


def test_what_refers_to_a_table_with_an_error_is_not_an_error() -> None:
    text = _HEAD.replace('[[groups]]\nname = "Everyone"', '[[groups]]\nname = "Everyone"\nid = 7')

    with pytest.raises(SeedError) as raised:
        _parse(text)

    (problem,) = raised.value.problems
    assert problem.startswith("[[groups]] 'Everyone' in line 10: `id` must be a UUID")


def test_a_table_without_effect_is_a_warning() -> None:
    text = f"""{_HEAD}
[[groups]]
name = "Nobody"
{_RESOURCE}type = "ip"
address = "10.0.0.1"

[[resources]]
name = "Forgotten"
site = "HQ"
type = "ip"
address = "10.0.0.2"

[[policies]]
group = "Nobody"
resource = "Lab"
"""

    assert parse_seed(text, _CONTEXT).warnings == (
        "[[sites]] 'HQ' in line 5: no token of kind gateway is for this site, so nothing can reach it",
        "[[groups]] 'Nobody' in line 15: no actor is a member",
        "[[resources]] 'Forgotten' in line 24: no policy gives it to a group, so no client can use it",
        "[[policies]] in line 30: it gives access to nobody: 'Nobody' has no members",
    )


@pytest.mark.parametrize(
    "path", [_EXAMPLE, _EXAMPLE.parents[2] / "docker/portal.toml"], ids=lambda path: path.parent.name
)
def test_the_examples_have_no_warnings(path: Path) -> None:
    assert parse_seed(path.read_text(), _CONTEXT).warnings == ()


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


_KEYS = sorted(set(re.findall(r"^(\w+) = ", _EXAMPLE.read_text(), re.MULTILINE)))
_TABLES = sorted(set(re.findall(r"^\[+(\w+)", _EXAMPLE.read_text(), re.MULTILINE)))
_VALUES = ["7", "1.5", "true", "[]", "[7]", '[""]', "{}", "[{}]", "{ name = 7 }", "[{ name = 7 }]", "2030-01-01", '""']


@pytest.mark.parametrize("key", _KEYS)
@pytest.mark.parametrize("value", _VALUES)
def test_a_value_of_another_type_is_accepted_or_an_error(key: str, value: str) -> None:
    changed = re.sub(rf"^{key} = .*$", f"{key} = {value}", _EXAMPLE.read_text().replace("[\n", "["), flags=re.MULTILINE)

    try:
        _parse(changed)
    except SeedError as error:
        assert all(" in line " in problem for problem in error.problems)


@pytest.mark.parametrize("kind", _TABLES)
@pytest.mark.parametrize("value", _VALUES)
def test_a_table_of_another_type_is_accepted_or_an_error(kind: str, value: str) -> None:
    kept = re.sub(rf"^\[+{kind}\]+\n(?:[^\[\n].*\n)*", "", _HEAD, flags=re.MULTILINE)

    try:
        _parse(f"{kind} = {value}\n{kept}")
    except SeedError as error:
        assert str(error)

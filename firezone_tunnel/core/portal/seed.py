"""Reads the portal's TOML file into an `Account`. Errors and warnings are one sentence each, with the line number."""

from __future__ import annotations

import re
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, tzinfo
from typing import Any, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

import attrs
import msgspec

from firezone_tunnel.core.portal.account import (
    Account,
    Actor,
    DnsSettings,
    PeerRole,
    Policy,
    Resource,
    Site,
    Token,
    TurnServer,
    token_hash,
)
from firezone_tunnel.core.portal.conditions import parse_condition
from firezone_tunnel.core.portal.seed_lines import SeedLines
from firezone_tunnel.core.portal.seed_tables import (
    LISTS,
    SINGLE,
    AccountTable,
    ActorTable,
    DnsTable,
    NamedTable,
    PolicyTable,
    Report,
    ResourceTable,
    Table,
    TokenTable,
    TurnServerTable,
    read_table,
    suggest,
)
from firezone_tunnel.core.portal.seed_values import (
    check_host,
    check_https_url,
    parse_address,
    parse_filter,
    parse_resolver,
    parse_socket_address,
)
from firezone_tunnel.errors import ConfigurationError

_NAMESPACE = uuid.UUID("7d0f5a0e-6d49-5f2b-9a55-3f6f1c1f8e10")  # of ids that are derived from names
_HASH = re.compile(r"[0-9a-f]{64}")


class SeedContext(NamedTuple):
    """Access to files and time zones that the seed file names. Both may raise ValueError."""

    read_file: Callable[[str], str]
    time_zone: Callable[[str], tzinfo]


class Seed(NamedTuple):
    """A valid file. `warnings` name what is valid, but has no effect."""

    account: Account
    warnings: tuple[str, ...]


class SeedError(ConfigurationError):
    """An invalid file. `problems` has all errors, the text only the first of them."""

    def __init__(self, *problems: str) -> None:
        others = len(problems) - 1
        more = f" (and {others} more {'error' if others == 1 else 'errors'})" if others else ""
        super().__init__(problems[0] + more)
        self.problems = problems


def parse_seed(text: str, context: SeedContext) -> Seed:
    """Read the whole file.

    Raises: SeedError.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not all of tomllib's are TOMLDecodeErrors
        raise SeedError(_explain(text, error)) from None
    return _Reader(SeedLines(text, content), content, context).seed()


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


_Made = TypeVar("_Made", bound=_HasId)
_TableKind = TypeVar("_TableKind", bound=Table)
_NamedKind = TypeVar("_NamedKind", bound=NamedTable)
_R = TypeVar("_R")
_P = ParamSpec("_P")


@attrs.frozen
class _Place:
    """A table of the file, and a key in it. `number` is None for a table that there is only one of."""

    kind: str
    number: int | None = None
    key: str | None = None


class _Unusable(Exception):
    """The table has an error, which is in the list."""


class _Reader:
    """Reads one file. `_at` is what is being read, for error messages."""

    def __init__(self, lines: SeedLines, content: dict[str, Any], context: SeedContext) -> None:
        self._lines = lines
        self._content = content
        self._context = context
        self._problems: list[tuple[int, str]] = []
        self._numbers: dict[str, dict[str, int]] = {}  # by kind and id: the place among the tables of the kind
        self._ids: dict[str, dict[str, str]] = {}  # by kind and name
        self._at = _Place("account")
        self._account_id = ""

    def seed(self) -> Seed:
        self._check_table_names()
        head = self._single("account", AccountTable)
        dns = self._dns(self._single("dns", DnsTable) or DnsTable())
        self._account_id = "" if head is None else self._id(head.id, "account", head.slug)
        sites = self._named("sites", self._list("sites", NamedTable), self._site)
        groups = self._named("groups", self._list("groups", NamedTable), self._site)
        actors = self._named("actors", self._list("actors", ActorTable), self._actor)
        resources = self._named("resources", self._list("resources", ResourceTable), self._resource)
        tokens = self._each("tokens", self._list("tokens", TokenTable), self._token)
        policies = self._each("policies", self._list("policies", PolicyTable), self._policy)
        turn_servers = self._named("turn_servers", self._list("turn_servers", TurnServerTable), self._turn_server)
        if head is None or self._problems:
            raise SeedError(*(what for _, what in sorted(self._problems)))
        account = Account(
            id=self._account_id,
            name=head.name,
            slug=head.slug,
            dns=dns,
            sites=sites,
            groups={group.id: group.name for group in groups.values()},
            actors=actors,
            tokens={token.hash: token for token in tokens.values()},
            resources=resources,
            policies=tuple(policies.values()),
            turn_servers=turn_servers,
        )
        return Seed(account, tuple(self._warnings(account)))

    def _check_table_names(self) -> None:
        for name in self._content:
            if name not in SINGLE and name not in LISTS:
                self._note(_Place(name), f"no table has this name{suggest(name, [*SINGLE, *LISTS])}")

    def _single(self, kind: str, table: type[_TableKind]) -> _TableKind | None:
        place = _Place(kind)
        if kind not in self._content:
            if kind == "account":
                self._note(place, "the table is missing")
            return None
        if isinstance(self._content[kind], list):
            self._note(place, f"there can be only one: write [{kind}]")
            return None
        return read_table(table, self._content[kind], self._report_in(place))

    def _report_in(self, place: _Place) -> Report:
        """A reporter of the errors in one table."""

        def report(key: str | None, what: str) -> None:
            self._note(attrs.evolve(place, key=key), what)

        return report

    def _list(self, kind: str, table: type[_TableKind]) -> dict[int, _TableKind]:
        """The tables without errors, by their place in the file."""
        raw = self._content.get(kind, [])
        if not isinstance(raw, list):
            self._note(_Place(kind), f"there can be several: write [[{kind}]]")
            return {}
        found = {}
        for number, one in enumerate(raw):
            read = read_table(table, one, self._report_in(_Place(kind, number)))
            if read is not None:
                found[number] = read
        return found

    def _site(self, table: NamedTable) -> Site:
        """A site; a group has the same keys."""
        return Site(self._id(table.id, self._at.kind, table.name), table.name)

    def _actor(self, table: ActorTable) -> Actor:
        members = tuple(self._find("groups", name, key="groups") for name in table.groups)
        return Actor(self._id(table.id, "actors", table.name), table.name, table.email, members)

    def _token(self, table: TokenTable) -> Token:
        role = PeerRole(table.kind)
        if (role is PeerRole.CLIENT) is (table.actor is None):
            self._fail("`actor` is required for a client's token, and allowed for no other")
        if (role is PeerRole.GATEWAY) is (table.site is None):
            self._fail("`site` is required for a gateway's token, and allowed for no other")
        owner = self._account_id
        if table.actor is not None:
            owner = self._find("actors", table.actor, key="actor")
        if table.site is not None:
            owner = self._find("sites", table.site, key="site")
        hashed = self._token_hash(table)
        expires_at = None
        if table.expires_at is not None:
            if table.expires_at.tzinfo is None:
                self._fail("`expires_at` needs an offset, as in 2030-01-01T00:00:00Z", key="expires_at")
            try:
                expires_at = int(table.expires_at.astimezone(UTC).timestamp())
            except OverflowError:
                self._fail("`expires_at` is outside of the years 1 to 9999 in UTC", key="expires_at")
        return Token(self._id(None, "tokens", hashed), role, hashed, owner, expires_at)

    def _token_hash(self, table: TokenTable) -> str:
        given = [value for value in (table.token, table.token_file, table.sha3_256) if value is not None]
        if len(given) != 1:
            self._fail("exactly one of `token`, `token_file` and `sha3_256` must be given")
        if table.sha3_256 is not None:
            if not _HASH.fullmatch(table.sha3_256):
                self._fail("`sha3_256` is not 64 lower-case hex digits", key="sha3_256")
            return table.sha3_256
        text = table.token
        if text is None:
            text = self._try("token_file", self._context.read_file, given[0])
        text = "".join(text.split())
        if not text:
            self._fail("the token is empty")
        return token_hash(text)

    def _resource(self, table: ResourceTable) -> Resource:
        names = [*table.sites, *([table.site] if table.site is not None else [])]
        if not names:
            self._fail("a resource needs a `site` (or `sites`)")
        if table.ip_stack is not None and table.type != "dns":
            self._fail("`ip_stack` is for DNS resources only", key="ip_stack")
        if table.filters and table.type == "internet":
            self._fail("an internet resource has no filters", key="filters")
        found = {self._find("sites", name, key="sites" if name in table.sites else "site") for name in names}
        return Resource(
            id=self._id(table.id, "resources", table.name),
            name=table.name,
            type=table.type,
            address=self._try("address", parse_address, table.type, table.address),
            address_description=table.address_description,
            ip_stack=(table.ip_stack or "dual") if table.type == "dns" else None,
            sites=tuple(sorted(found)),
            filters=tuple(self._try("filters", parse_filter, text) for text in table.filters),
        )

    def _policy(self, table: PolicyTable) -> Policy:
        group = self._find("groups", table.group, key="group")
        resource = self._find("resources", table.resource, key="resource")
        conditions = tuple(
            self._try("conditions", parse_condition, one.property, one.operator, one.values, self._context.time_zone)
            for one in table.conditions
        )
        name = f"{group}:{resource}:{msgspec.json.encode(table.conditions).decode()}"
        return Policy(self._id(table.id, "policies", name), group, resource, conditions)

    def _turn_server(self, table: TurnServerTable) -> TurnServer:
        addresses = tuple(self._try("addresses", parse_socket_address, text) for text in table.addresses)
        if len({address.is_ipv6 for address in addresses}) != len(addresses):
            self._fail("a TURN server can have at most one address of each family", key="addresses")
        return TurnServer(
            id=self._id(table.id, "turn_servers", table.name),
            name=table.name,
            addresses=addresses,
            username=table.username,
            password=table.password,
            realm=table.realm,
        )

    def _dns(self, table: DnsTable) -> DnsSettings:
        self._at = _Place("dns")
        try:
            for url in table.upstream_doh:
                self._try("upstream_doh", check_https_url, url)
            if table.search_domain is not None:
                self._try("search_domain", check_host, table.search_domain)
            upstream = tuple(self._try("upstream", parse_resolver, text) for text in table.upstream)
        except _Unusable:
            return DnsSettings()
        return DnsSettings(upstream, tuple(table.upstream_doh), table.search_domain)

    def _named(
        self, kind: str, tables: Mapping[int, _NamedKind], make: Callable[[_NamedKind], _Made]
    ) -> dict[str, _Made]:
        """Tables that others refer to by name: it must be unique even where ids differ."""
        first: dict[str, int] = {}
        for number, table in tables.items():
            if first.setdefault(table.name, number) != number:
                self._note(_Place(kind, number, "name"), f"the name is used twice{self._too(kind, first[table.name])}")
        made = self._each(kind, {number: tables[number] for number in first.values()}, make)
        self._ids[kind] = {tables[self._numbers[kind][id_]].name: id_ for id_ in made}
        return made

    def _each(
        self, kind: str, tables: Mapping[int, _TableKind], make: Callable[[_TableKind], _Made]
    ) -> dict[str, _Made]:
        made: dict[str, _Made] = {}
        numbers = self._numbers.setdefault(kind, {})
        for number, table in tables.items():
            self._at = _Place(kind, number)
            try:
                one = make(table)
            except _Unusable:
                continue
            if one.id in made:
                self._note(self._at, f"it is a duplicate{self._too(kind, numbers[one.id])}")
                continue
            made[one.id] = one
            numbers[one.id] = number
        return made

    def _too(self, kind: str, number: int) -> str:
        line = self._lines.find(kind, number)
        return f", also in line {line}" if line else ""

    def _find(self, kind: str, name: str, *, key: str) -> str:
        """The id of the thing with this name."""
        if name in self._ids[kind]:
            return self._ids[kind][name]
        tables: list[Any] = self._content[kind] if isinstance(self._content.get(kind), list) else []
        names = [str(one["name"]) for one in tables if isinstance(one, dict) and "name" in one]
        if name not in names:  # else that table has an error of its own
            self._note(attrs.evolve(self._at, key=key), f"there is no {kind[:-1]} {name!r}{suggest(name, names)}")
        raise _Unusable

    def _id(self, given: uuid.UUID | None, kind: str, name: str) -> str:
        return str(given or uuid.uuid5(_NAMESPACE, f"{self._account_id}/{kind}/{name}"))

    def _try(self, key: str, parse: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return parse(*args, **kwargs)
        except ValueError as error:
            self._fail(str(error), key=key)

    def _fail(self, what: str, *, key: str | None = None) -> NoReturn:
        self._note(attrs.evolve(self._at, key=key), what)
        raise _Unusable

    def _note(self, place: _Place, what: str) -> None:
        """Add a problem; the list is ordered by lines in the end."""
        line = self._lines.find(place.kind, place.number, place.key) or 0
        self._problems.append((line, f"{self._where(place, line)}: {what}"))

    def _where(self, place: _Place, line: int | None) -> str:
        table = f"[{place.kind}]"
        if place.number is not None:
            raw = self._content[place.kind][place.number]
            name = raw.get("name") if isinstance(raw, dict) else None
            table = f"[{table}] {name!r}" if isinstance(name, str) else f"[{table}]"
        return f"{table} in line {line}" if line else table

    def _warnings(self, account: Account) -> Iterator[str]:
        """Sentences about what has no effect."""
        with_policy = {policy.resource for policy in account.policies}
        with_gateway = {token.owner for token in account.tokens.values() if token.role is PeerRole.GATEWAY}
        with_members = {group for actor in account.actors.values() for group in actor.groups}
        for site in account.sites:
            if site not in with_gateway:
                yield self._warning("sites", site, "no token of kind gateway is for this site, so nothing can reach it")
        for group in account.groups:
            if group not in with_members:
                yield self._warning("groups", group, "no actor is a member")
        for resource in account.resources:
            if resource not in with_policy:
                yield self._warning("resources", resource, "no policy gives it to a group, so no client can use it")
        for policy in account.policies:
            if policy.group not in with_members:
                group = account.groups[policy.group]
                yield self._warning("policies", policy.id, f"it gives access to nobody: {group!r} has no members")

    def _warning(self, kind: str, id_: str, what: str) -> str:
        place = _Place(kind, self._numbers[kind][id_])
        return f"{self._where(place, self._lines.find(place.kind, place.number))}: {what}"


_TOML_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)
_TOML_ADVICE = {
    "Invalid value": "a value is missing, or a text is not in quotes",
    "Invalid statement": "this is neither `key = value` nor the [name] of a table",
    "Invalid initial character for a key part": "a key or the name of a table is missing",
    "Expected '=' after a key in a key/value pair": "`=` is missing after a key",
    "Expected newline or end of document after a statement": "there is more than one value, or a quote is missing",
    "Illegal character '\\n'": "the text is not closed by a quote on its line",
    "Unterminated string": "the text is not closed by a quote",
    "Unclosed array": "the list is not closed by `]`, or a comma is missing",
    "Unclosed inline table": "the table is not closed by `}`, or a comma is missing",
    "Cannot overwrite a value": "the key is given twice",
    "Unescaped '\\' in a string": "write \\\\ for a backslash in a text",
}


def _explain(text: str, error: Exception) -> str:
    """Our words for the parser's error, where it has an equivalent."""
    found = _TOML_PLACE.fullmatch(str(error))
    if found is None:
        return f"not valid TOML: {error}"
    what = _TOML_ADVICE.get(found[1], found[1][:1].lower() + found[1][1:])
    place = f"line {found[2]}, column {found[3]}" if found[2] else f"line {len(text.splitlines())}, the last"
    return f"not valid TOML in {place}: {what}"

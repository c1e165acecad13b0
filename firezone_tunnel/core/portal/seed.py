"""Reads the portal's TOML file into an `Account`. An error is one sentence with the line number."""

from __future__ import annotations

import datetime
import ipaddress
import re
import tomllib
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import tzinfo
from typing import Annotated, Literal, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from firezone_tunnel.core.messages.common import Filter
from firezone_tunnel.core.portal.account import (
    Account,
    Actor,
    DnsSettings,
    IpStack,
    PeerRole,
    Policy,
    Resource,
    ResourceType,
    Site,
    Token,
    TurnServer,
    token_hash,
)
from firezone_tunnel.core.portal.conditions import parse_condition
from firezone_tunnel.core.portal.tunnel_addresses import RESERVED
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import ConfigurationError

_NAMESPACE = uuid.UUID("7d0f5a0e-6d49-5f2b-9a55-3f6f1c1f8e10")  # of ids that are derived from names
_DNS_PORT = 53
_PATTERN_LABEL = re.compile(r"\*\*|[a-z0-9_*?-]{1,63}")
_HOST_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_HASH = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"\$\.(\w+)(?:\[(\d+)\])?")

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class SeedContext(NamedTuple):
    """Access to files and time zones that the seed file names. Both may raise ValueError."""

    read_file: Callable[[str], str]
    time_zone: Callable[[str], tzinfo]


def parse_seed(text: str, context: SeedContext) -> Account:
    """Read the whole file.

    Raises: ConfigurationError.
    """
    return _Reader(text, context).account()


class _Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A table of the file. An unknown key is an error, most likely a typo."""


class _AccountTable(_Table, frozen=True, kw_only=True):
    name: Name
    slug: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_-]{1,63}$")]
    id: uuid.UUID | None = None


class _DnsTable(_Table, frozen=True, kw_only=True):
    upstream: list[str] = []
    upstream_doh: list[str] = []
    search_domain: str | None = None


class _Named(_Table, frozen=True, kw_only=True):
    name: Name
    id: uuid.UUID | None = None


class _ActorTable(_Named, frozen=True, kw_only=True):
    email: str | None = None
    groups: list[str] = []


class _TokenTable(_Table, frozen=True, kw_only=True):
    kind: Literal["client", "gateway", "relay"]
    actor: str | None = None
    site: str | None = None
    token: str | None = None
    token_file: str | None = None
    sha3_256: str | None = None
    expires_at: datetime.datetime | None = None


class _ResourceTable(_Named, frozen=True, kw_only=True):
    type: ResourceType
    address: str = ""
    address_description: str | None = None
    ip_stack: IpStack | None = None
    site: str | None = None
    sites: list[str] = []
    filters: list[str] = []


class _ConditionTable(_Table, frozen=True, kw_only=True):
    property: str
    operator: str
    values: Annotated[list[str], msgspec.Meta(min_length=1)]


class _PolicyTable(_Table, frozen=True, kw_only=True):
    group: str
    resource: str
    conditions: list[_ConditionTable] = []
    id: uuid.UUID | None = None


class _TurnServerTable(_Named, frozen=True, kw_only=True):
    addresses: Annotated[list[str], msgspec.Meta(min_length=1, max_length=2)]
    username: Name
    password: Name
    realm: Name | None = None


class _File(_Table, frozen=True, kw_only=True):
    account: _AccountTable
    dns: _DnsTable = _DnsTable()
    sites: list[_Named] = []
    groups: list[_Named] = []
    actors: list[_ActorTable] = []
    tokens: list[_TokenTable] = []
    resources: list[_ResourceTable] = []
    policies: list[_PolicyTable] = []
    turn_servers: list[_TurnServerTable] = []


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)
_T = TypeVar("_T")
_R = TypeVar("_R")
_P = ParamSpec("_P")


class _Reader:
    """Reads one file. `_at` is the table being read, for error messages."""

    def __init__(self, text: str, context: SeedContext) -> None:
        self._text = text
        self._context = context
        self._at: tuple[str, int | None] = ("account", None)
        self._account_id = ""

    def account(self) -> Account:
        file = self._file()
        self._account_id = self._id(file.account.id, "account", file.account.slug)
        sites = {one.id: one for one in self._named("sites", file.sites)}
        groups = {one.id: one.name for one in self._named("groups", file.groups)}
        actors = self._each("actors", file.actors, lambda table: self._actor(table, groups))
        resources = self._each("resources", file.resources, lambda table: self._resource(table, sites))
        tokens = self._each("tokens", file.tokens, lambda table: self._token(table, actors, sites))
        policies = self._each("policies", file.policies, lambda table: self._policy(table, groups, resources))
        self._check_names(actors.values(), "actors")
        turn_servers = self._each("turn_servers", file.turn_servers, self._turn_server)
        self._check_names(resources.values(), "resources")
        self._check_names(turn_servers.values(), "turn_servers")
        return Account(
            id=self._account_id,
            name=file.account.name,
            slug=file.account.slug,
            dns=self._dns(file.dns),
            sites=sites,
            groups=groups,
            actors=actors,
            tokens={token.hash: token for token in tokens.values()},
            resources=resources,
            policies=tuple(policies.values()),
            turn_servers=turn_servers,
        )

    def _file(self) -> _File:
        try:
            raw = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            end = f"at line {len(self._text.splitlines())}, the last"
            what = str(error).replace("at end of document", end)
            raise ConfigurationError(f"not valid TOML: {what}") from error
        try:
            return msgspec.convert(raw, _File, strict=True)
        except msgspec.ValidationError as error:
            found = _PATH.search(str(error))
            if found is not None:
                self._at = (found[1], int(found[2]) if found[2] else None)
            what, _, _ = str(error).partition(" - at `")
            self._fail(what[:1].lower() + what[1:])

    def _named(self, kind: str, tables: Iterable[_Named]) -> Iterable[Site]:
        named = self._each(kind, tables, lambda one: Site(self._id(one.id, kind, one.name), one.name))
        self._check_names(named.values(), kind)
        return named.values()

    def _actor(self, table: _ActorTable, groups: Mapping[str, str]) -> Actor:
        members = tuple(self._find("group", name, groups) for name in table.groups)
        return Actor(self._id(table.id, "actors", table.name), table.name, table.email, members)

    def _token(self, table: _TokenTable, actors: Mapping[str, Actor], sites: Mapping[str, Site]) -> Token:
        role = PeerRole(table.kind)
        if (role is PeerRole.CLIENT) is (table.actor is None):
            self._fail("`actor` is required for a client's token, and allowed for no other")
        if (role is PeerRole.GATEWAY) is (table.site is None):
            self._fail("`site` is required for a gateway's token, and allowed for no other")
        owner = self._account_id
        if table.actor is not None:
            owner = self._find("actor", table.actor, {one.id: one.name for one in actors.values()})
        if table.site is not None:
            owner = self._find("site", table.site, {one.id: one.name for one in sites.values()})
        hashed = self._token_hash(table)
        expires_at = None
        if table.expires_at is not None:
            if table.expires_at.tzinfo is None:
                self._fail("`expires_at` needs an offset, as in 2030-01-01T00:00:00Z")
            expires_at = int(table.expires_at.timestamp())
        return Token(self._id(None, "tokens", hashed), role, hashed, owner, expires_at)

    def _token_hash(self, table: _TokenTable) -> str:
        given = [value for value in (table.token, table.token_file, table.sha3_256) if value is not None]
        if len(given) != 1:
            self._fail("exactly one of `token`, `token_file` and `sha3_256` must be given")
        if table.sha3_256 is not None:
            if not _HASH.fullmatch(table.sha3_256):
                self._fail("`sha3_256` is not 64 lower-case hex digits")
            return table.sha3_256
        text = table.token
        if text is None:
            text = self._try(self._context.read_file, given[0])
        text = "".join(text.split())
        if not text:
            self._fail("the token is empty")
        return token_hash(text)

    def _resource(self, table: _ResourceTable, sites: Mapping[str, Site]) -> Resource:
        names = [*table.sites, *([table.site] if table.site is not None else [])]
        if not names:
            self._fail("a resource needs a `site` (or `sites`)")
        if table.ip_stack is not None and table.type != "dns":
            self._fail("`ip_stack` is for DNS resources only")
        if table.filters and table.type == "internet":
            self._fail("an internet resource has no filters")
        found = {self._find("site", name, {one.id: one.name for one in sites.values()}) for name in names}
        return Resource(
            id=self._id(table.id, "resources", table.name),
            name=table.name,
            type=table.type,
            address=self._try(_address, table),
            address_description=table.address_description,
            ip_stack=(table.ip_stack or "dual") if table.type == "dns" else None,
            sites=tuple(sorted(found)),
            filters=tuple(self._try(_filter, text) for text in table.filters),
        )

    def _policy(self, table: _PolicyTable, groups: Mapping[str, str], resources: Mapping[str, Resource]) -> Policy:
        group = self._find("group", table.group, groups)
        resource = self._find("resource", table.resource, {one.id: one.name for one in resources.values()})
        conditions = tuple(
            self._try(parse_condition, one.property, one.operator, one.values, self._context.time_zone)
            for one in table.conditions
        )
        name = f"{group}:{resource}:{msgspec.json.encode(table.conditions).decode()}"
        return Policy(self._id(table.id, "policies", name), group, resource, conditions)

    def _turn_server(self, table: _TurnServerTable) -> TurnServer:
        addresses = tuple(self._try(SocketAddress.parse, text) for text in table.addresses)
        if len({address.is_ipv6 for address in addresses}) != len(addresses):
            self._fail("a TURN server can have at most one address of each family")
        return TurnServer(
            id=self._id(table.id, "turn_servers", table.name),
            name=table.name,
            addresses=addresses,
            username=table.username,
            password=table.password,
            realm=table.realm,
        )

    def _dns(self, table: _DnsTable) -> DnsSettings:
        self._at = ("dns", None)
        for url in table.upstream_doh:
            self._try(_check_https_url, url)
        if table.search_domain is not None:
            self._try(_check_host, table.search_domain)
        upstream = tuple(self._try(_resolver, text) for text in table.upstream)
        return DnsSettings(upstream, tuple(table.upstream_doh), table.search_domain)

    def _each(self, kind: str, tables: Iterable[_T], make: Callable[[_T], T]) -> dict[str, T]:
        made: dict[str, T] = {}
        for number, table in enumerate(tables):
            self._at = (kind, number)
            one = make(table)
            if one.id in made:
                self._fail("it is a duplicate")
            made[one.id] = one
        return made

    def _check_names(self, things: Iterable[Site | Actor | Resource | TurnServer], kind: str) -> None:
        """Tables refer to each other by name, so a name must be unique even where ids differ."""
        seen: set[str] = set()
        for number, thing in enumerate(things):
            self._at = (kind, number)
            if thing.name in seen:
                self._fail(f"the name {thing.name!r} is used twice")
            seen.add(thing.name)

    def _find(self, kind: str, name: str, names: Mapping[str, str]) -> str:
        found = next((id_ for id_, known in names.items() if known == name), None)
        if found is None:
            self._fail(f"there is no {kind} named {name!r}")
        return found

    def _id(self, given: uuid.UUID | None, kind: str, name: str) -> str:
        return str(given or uuid.uuid5(_NAMESPACE, f"{self._account_id}/{kind}/{name}"))

    def _try(self, parse: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return parse(*args, **kwargs)
        except ValueError as error:
            self._fail(str(error))

    def _fail(self, what: str) -> NoReturn:
        kind, number = self._at
        line = _line_of(self._text, kind, number or 0)
        where = f"[[{kind}]]" if number is not None else f"[{kind}]"
        raise ConfigurationError(f"{where}{f' in line {line}' if line else ''}: {what}")


def _address(table: _ResourceTable) -> str:
    """The address in its wire form."""
    if table.type == "internet":
        if table.address:
            raise ValueError("an internet resource has no address")
        return ""
    if table.type == "dns":
        return _pattern(table.address)
    if "%" in table.address:
        raise ValueError(f"{table.address!r} has a scope, which peers can't parse")
    network = ipaddress.ip_network(table.address, strict=False)
    if table.type == "ip" and network.num_addresses != 1:
        raise ValueError(f"{table.address!r} is a network, not an address: use type cidr")
    if network.prefixlen == 0:
        raise ValueError(f"{table.address} covers everything: use type internet")
    if network.is_loopback:
        raise ValueError(f"{table.address} is the loopback network, which every host has for itself")
    if any(network.version == one.version and network.overlaps(one) for one in RESERVED):
        raise ValueError(f"{table.address} overlaps the tunnel's own addresses (100.64.0.0/10, fd00:2021:1111::/48)")
    return str(network)


def _pattern(text: str) -> str:
    pattern = text.lower().rstrip(".")
    labels = pattern.split(".")
    if not pattern or len(pattern) > 253 or not all(_PATTERN_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is not a domain name or pattern")
    last = labels[-1]
    if "*" in last or "?" in last or last == "localhost":
        raise ValueError(f"{text!r}: the last label must be a plain top-level domain")
    if last.isdigit():
        raise ValueError(f"{text!r} is an IP address: use type ip")
    return pattern


def _check_host(text: str) -> None:
    if len(text) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in text.lower().split(".")):
        raise ValueError(f"{text!r} is not a domain name")


def _check_https_url(text: str) -> None:
    """An unreadable URL would make clients drop the whole `init`."""
    url = urlsplit(text) if text.isascii() and text.isprintable() and " " not in text else None
    if url is None or url.scheme != "https" or not url.hostname or url.port == 0:
        raise ValueError(f"{text!r} is not a https:// URL")


def _filter(text: str) -> Filter:
    """`icmp`, `tcp`, `udp/53` or `tcp/8000-8080`."""
    protocol, _, ports = text.replace(" ", "").lower().partition("/")
    if protocol == "icmp" and not ports:
        return Filter(protocol="icmp")
    first, dash, last = ports.partition("-")
    if protocol not in {"tcp", "udp"} or (ports and not (first.isdigit() and (last.isdigit() if dash else True))):
        raise ValueError(f"{text!r} is not a filter (icmp, tcp, udp/53, tcp/8000-8080)")
    start, end = int(first or 0), int(last or first or 0xFFFF)
    if not start <= end <= 0xFFFF:
        raise ValueError(f"{text!r} is not a valid port range")
    return Filter(protocol="tcp" if protocol == "tcp" else "udp", port_range_start=start, port_range_end=end)


def _resolver(text: str) -> tuple[str, int]:
    host, port = text, str(_DNS_PORT)
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":") or str(_DNS_PORT)
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    address = ipaddress.ip_address(host)
    if not port.isdigit() or not 0 < int(port) <= 0xFFFF or "%" in host:
        raise ValueError(f"{text!r} is not the address of a resolver")
    if any(address in one for one in RESERVED):
        raise ValueError(f"the resolver {text} lies in the tunnel's own addresses")
    return str(address), int(port)


def _line_of(text: str, kind: str, number: int) -> int | None:
    """The line of the n-th `[kind]` or `[[kind]]` header; None if the file has no such header."""
    header = re.compile(rf"\s*\[\[?\s*{re.escape(kind)}\s*\]\]?\s*(?:#.*)?")
    lines = [place for place, line in enumerate(text.splitlines(), 1) if header.fullmatch(line)]
    return lines[number] if number < len(lines) else None

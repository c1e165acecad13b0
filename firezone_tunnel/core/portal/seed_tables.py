"""The tables and keys of the portal's seed file, and their validation in words for the operator."""

from __future__ import annotations

import datetime
import difflib
import types
import uuid
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from firezone_tunnel.core.portal.account import IpStack, ResourceType

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, description="text of 1 to 255 characters")]
Slug = Annotated[
    str,
    msgspec.Meta(
        pattern="^[a-z0-9_-]{1,63}$", description="1 to 63 lower-case letters, digits, hyphens and underscores"
    ),
]


class Table(msgspec.Struct, kw_only=True, frozen=True):
    """A table of the file."""


class AccountTable(Table, frozen=True, kw_only=True):
    name: Name
    slug: Slug
    id: uuid.UUID | None = None


class DnsTable(Table, frozen=True, kw_only=True):
    upstream: list[str] = []
    upstream_doh: list[str] = []
    search_domain: str | None = None


class NamedTable(Table, frozen=True, kw_only=True):
    name: Name
    id: uuid.UUID | None = None


class ActorTable(NamedTable, frozen=True, kw_only=True):
    email: str | None = None
    groups: list[str] = []


class TokenTable(Table, frozen=True, kw_only=True):
    kind: Literal["client", "gateway", "relay"]
    actor: str | None = None
    site: str | None = None
    token: str | None = None
    token_file: str | None = None
    sha3_256: str | None = None
    expires_at: datetime.datetime | None = None


class ResourceTable(NamedTable, frozen=True, kw_only=True):
    type: ResourceType
    address: str = ""
    address_description: str | None = None
    ip_stack: IpStack | None = None
    site: str | None = None
    sites: list[str] = []
    filters: list[str] = []


class ConditionTable(Table, frozen=True, kw_only=True):
    property: str
    operator: str
    values: Annotated[list[str], msgspec.Meta(min_length=1, description="a list of texts, with at least one")]


class PolicyTable(Table, frozen=True, kw_only=True):
    group: str
    resource: str
    conditions: list[ConditionTable] = []
    id: uuid.UUID | None = None


class TurnServerTable(NamedTable, frozen=True, kw_only=True):
    addresses: Annotated[list[str], msgspec.Meta(min_length=1, max_length=2, description="a list of 1 or 2 texts")]
    username: Name
    password: Name
    realm: Name | None = None


SINGLE = ("account", "dns")
LISTS = ("sites", "groups", "actors", "tokens", "resources", "policies", "turn_servers")

T = TypeVar("T", bound=Table)
Report = Callable[[str | None, str], None]
"""Takes the key that is wrong, if it is one key, and what is wrong with it."""


def read_table(kind: type[T], raw: object, report: Report) -> T | None:
    """The table as `kind`; None if anything in it is wrong, which is then reported."""
    if not isinstance(raw, dict):
        report(None, "it is not a table")
        return None
    is_valid = True

    def fail(key: str | None, what: str) -> None:
        nonlocal is_valid
        is_valid = False
        report(key, what)

    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    unknown = [key for key in raw if key not in fields]
    misspelt = [_closest(key, fields) for key in unknown]
    for key in unknown:
        fail(key, f"the key `{key}` is unknown{suggest(key, fields, quote='`')}")
    for name, field in fields.items():
        if name in raw:
            _check_value(name, raw[name], field.type, fail)
        elif field.required and name not in misspelt:
            fail(None, f"the key `{name}` is missing")
    return msgspec.convert(raw, kind, strict=True) if is_valid else None


def suggest(wrong: str, existing: Iterable[str], *, quote: str = "'") -> str:
    """The end of an error message: a name that may be meant, or the names that exist."""
    names = list(existing)
    close = _closest(wrong, names)
    listed = ", ".join(f"{quote}{name}{quote}" for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    known = f" (known: {listed}{more})" if listed else " (none is known)"
    return known if close is None else f"; did you mean {quote}{close}{quote}?{known}"


def _closest(wrong: str, names: Iterable[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in names}
    found = difflib.get_close_matches(wrong.lower(), by_lower_case, 1)
    return by_lower_case[found[0]] if found else None


_LISTED = 12
_EXPECTED = {
    str: "text",
    list[str]: "a list of texts",
    uuid.UUID: "a UUID",
    datetime.datetime: "a date and time, such as 2030-01-01T00:00:00Z",
}


def _within(fail: Report, name: str, where: str) -> Report:
    """A reporter of the errors in a table that is an entry of the list `name`."""

    def report(_: str | None, what: str) -> None:
        fail(name, f"{where}: {what}")

    return report


def _check_value(name: str, value: object, type_: Any, fail: Report) -> None:
    if get_origin(type_) is list and issubclass(get_args(type_)[0], Table):
        if not isinstance(value, list):
            fail(name, f"`{name}` must be a list of tables")
            return
        for number, entry in enumerate(value, 1):
            where = f"{name.removesuffix('s')} {number}"
            read_table(get_args(type_)[0], entry, _within(fail, name, where))
        return
    try:
        msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError:
        fail(name, f"`{name}` {_complaint(value, type_)}")


def _complaint(value: object, type_: Any) -> str:
    if get_origin(type_) in {types.UnionType, Union}:
        type_ = next(one for one in get_args(type_) if one is not types.NoneType)
    if get_origin(type_) is Annotated:
        return f"must be {type_.__metadata__[0].description}"
    if get_origin(type_) is not Literal:
        return f"must be {_EXPECTED[type_]}"
    choices = sorted(get_args(type_))
    return f"can't be {value!r}{suggest(str(value), choices)}"

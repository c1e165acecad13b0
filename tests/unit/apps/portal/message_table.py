"""The tables of docs/protocol/portal-messages.md, and the check of a message against them."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

PAGE = Path(__file__).parents[4] / "docs/protocol/portal-messages.md"

_SECTION = re.compile(r"^### [\d.]+ (\w+)$", re.MULTILINE)
_ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
_EVENT = re.compile(r"^\| (client|gateway|relay) \| `(\w+)` \| (\w+) \| (sent|–) \| (sent|–) \|$", re.MULTILINE)
_PRESENCES = {
    "required", "required, or null", "optional", "optional, or null", "either", "not read", "ours only, or null",
}  # fmt: skip
_DOMAIN = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.IGNORECASE)
_PATTERN = re.compile(r"(\*\*|[a-z0-9_*?-]{1,63})(\.(\*\*|[a-z0-9_*?-]{1,63}))*")


class Violation(AssertionError):
    """A message that its table does not allow."""


@attrs.frozen
class Receiver:
    """Whom a message is for. `generation` is 1 or 2."""

    role: str
    generation: int
    is_ours: bool = False


@attrs.frozen
class Field:
    """A row. `presences` has V1's cell, then V2's."""

    name: str
    type: str
    presences: tuple[str, str]


@attrs.frozen
class Shape:
    """One table of an object. `number` tells several tables of one name apart."""

    name: str
    number: int
    fields: tuple[Field, ...]

    def fits(self, value: dict[str, Any]) -> bool:
        """Whether the literals match, which tell the tables of one name apart."""
        return all(
            value.get(field.name) in _literals(field.type) for field in self.fields if field.type.startswith('"')
        )


@attrs.define
class MessageTable:
    """`events` maps (generation, role, event) to the payload's type; `seen` collects the rows that were used."""

    events: dict[tuple[int, str, str], str]
    shapes: dict[str, list[Shape]]
    seen: set[tuple[Any, ...]] = attrs.Factory(set)

    def rows(self) -> set[tuple[Any, ...]]:
        """All rows: events by generation, fields by table."""
        fields = {
            (shape.name, shape.number, field.name)
            for shapes in self.shapes.values()
            for shape in shapes
            for field in shape.fields
        }
        return fields | set(self.events)

    def check_frame(self, frame: Any, to: Receiver) -> None:
        """Check one frame in object form.

        Raises: Violation.
        """
        key = (to.generation, to.role, frame["event"])
        if key not in self.events:
            raise Violation(f"{key} is not in the table")
        self.seen.add(key)
        self.check(frame, "Frame", to, "frame", payload=self.events[key])

    def check(self, value: Any, type_: str, to: Receiver, where: str, *, payload: str = "") -> None:
        """Check a value of this type. `payload` is the type of a frame's payload.

        Raises: Violation.
        """
        if type_ == "payload":
            type_ = payload
        if type_.startswith("["):
            if not isinstance(value, list):
                raise Violation(f"{where} is not an array: {value!r}")
            for number, one in enumerate(value):
                self.check(one, type_[1:-1], to, f"{where}[{number}]")
            if type_ == "[Relay]":
                _check_adjacent([relay["id"] for relay in value], where)
        elif type_.startswith("JWT of "):
            self.check(_claims(value), type_.removeprefix("JWT of "), to, where)
        elif type_ in self.shapes:
            self._check_object(value, type_, to, where, payload)
        elif not _is_scalar(value, type_):
            raise Violation(f"{where} is not {type_}: {value!r}")

    def _check_object(self, value: Any, name: str, to: Receiver, where: str, payload: str) -> None:
        if not isinstance(value, dict):
            raise Violation(f"{where} is not an object: {value!r}")
        shape = next((one for one in self.shapes[name] if one.fits(value)), None)
        if shape is None:
            raise Violation(f"{where} matches no table of {name}: {value!r}")
        names = [field.name for field in shape.fields]
        if unknown := [key for key in value if key not in names]:
            raise Violation(f"{where} has {unknown}, which the table of {name} lacks")
        either = [field.name for field in shape.fields if field.presences[to.generation - 1] == "either"]
        if either and sum(one in value for one in either) != 1:
            raise Violation(f"{where} has not exactly one of {either}")
        for field in shape.fields:
            presence = field.presences[to.generation - 1]
            if field.name not in value:
                if presence.startswith("required"):
                    raise Violation(f"{where} lacks {field.name}")
                continue
            if presence.startswith("ours only") and not to.is_ours:
                raise Violation(f"{where} has {field.name}, which is for our own peers")
            self.seen.add((name, shape.number, field.name))
            if value[field.name] is not None:
                self.check(value[field.name], field.type, to, f"{where}.{field.name}", payload=payload)
            elif not presence.endswith("or null"):
                raise Violation(f"{where}.{field.name} is null")


def read_table() -> MessageTable:
    """Read the page."""
    text = PAGE.read_text()
    shapes: dict[str, list[Shape]] = {}
    _, *sections = _SECTION.split(text)
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        fields = tuple(Field(field, type_, (v1, v2)) for field, type_, v1, v2 in _ROW.findall(_own(section)))
        assert {presence for field in fields for presence in field.presences} <= _PRESENCES, name
        shapes.setdefault(name, []).append(Shape(name, len(shapes.get(name, ())), fields))
    events = {
        (generation, role, event): payload
        for role, event, payload, *cells in _EVENT.findall(text)
        for generation, cell in enumerate(cells, 1)
        if cell == "sent"
    }
    return MessageTable(events, shapes)


def _own(section: str) -> str:
    """A section without the headings of the next chapter."""
    return section.partition("\n## ")[0]


def _literals(type_: str) -> list[str]:
    return re.findall(r'"([^"]*)"', type_)


def _claims(token: Any) -> Any:
    """The claims of a compact JWT (RFC 7515, section 3.1).

    Raises: Violation.
    """
    parts = token.split(".") if isinstance(token, str) else []
    if len(parts) != 3 or not all(parts) or "=" in token:
        raise Violation(f"not a compact JWT: {token!r}")
    header, claims, _ = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in parts)
    if json.loads(header)["alg"] != "HS256":
        raise Violation(f"not HS256: {header!r}")
    return json.loads(claims)


def _check_adjacent(ids: list[str], where: str) -> None:
    changes = [id_ for number, id_ in enumerate(ids) if number == 0 or ids[number - 1] != id_]
    if len(changes) != len(set(changes)):
        raise Violation(f"{where}: the entries of one relay are not adjacent")


def _is_scalar(value: Any, type_: str) -> bool:
    if type_.startswith('"'):
        return value in _literals(type_)
    kinds = [_SCALARS[kind] for kind in type_.split(", ")]
    return any(_holds(kind, value) for kind in kinds)


def _holds(check: Callable[[Any], object], value: Any) -> bool:
    try:
        return check(value) is not False
    except (ValueError, TypeError, AttributeError):
        return False


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_address(value: Any, *versions: int) -> bool:
    """As Rust's parser reads it: no scope."""
    return "%" not in value and ipaddress.ip_address(_text(value)).version in versions


def _is_socket_address(value: Any) -> bool:
    host, _, port = _text(value).rpartition(":")
    is_port = port.isascii() and port.isdigit() and int(port) <= 0xFFFF
    return is_port and (_is_address(host[1:-1], 6) if host.startswith("[") else _is_address(host, 4))


def _is_url(value: Any) -> bool:
    url = urlsplit(_text(value))
    is_printable = value.isascii() and value.isprintable() and " " not in value
    return is_printable and url.scheme == "https" and bool(url.hostname) and (url.port or 1) > 0


def _is_utc_time(value: Any) -> bool:
    return datetime.fromisoformat(_text(value)).utcoffset() == timedelta(0)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


_SCALARS: dict[str, Callable[[Any], object]] = {
    "text": _is_text,
    "int": _is_int,
    "bool": lambda value: isinstance(value, bool),
    "UUID": lambda value: str(uuid.UUID(value)) == value,
    "Unix": lambda value: _is_int(value) and value > 0,
    "Key": lambda value: len(base64.b64decode(_text(value), validate=True)) == 32,
    "IPv4": lambda value: _is_address(value, 4),
    "IPv6": lambda value: _is_address(value, 6),
    "IP:port": _is_socket_address,
    "network": lambda value: "%" not in value and ipaddress.ip_network(_text(value)) and "/" in value,
    "URL": _is_url,
    "domain": lambda value: len(value) <= 253 and _DOMAIN.fullmatch(value) is not None,
    "pattern": lambda value: len(value) <= 253 and _PATTERN.fullmatch(value) is not None,
    "time": _is_utc_time,
    "ref": lambda value: _is_int(value) or _is_text(value),
}


def frames_in(text: str) -> Iterator[dict[str, Any]]:
    """The portal's frames in a recorded session, each with its peer."""
    for line in text.splitlines():
        row = json.loads(line)
        if row["at"] == "portal" and row.get("dir") == "out":
            yield row

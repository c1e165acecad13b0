"""Phoenix frames as JSON text, in both forms that a Phoenix socket speaks (docs/protocol/portal-protocol.md, 1.5).

Object form (`vsn` absent or 1.0.0): {"topic": …, "event": …, "payload": …, "ref": …}
Array form (`vsn` 2.0.0): [join_ref, ref, topic, event, payload]
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import attrs
import msgspec

from firezone_tunnel.errors import ProtocolError

Ref = int | str | None
"""Upstream's peers use integers, the npm client strings: a reply keeps the type."""


class MalformedFrame(ProtocolError):
    """The text isn't a frame in this form. `is_truncated`: the JSON ends too early; empty text counts as that."""

    def __init__(self, message: str, *, is_truncated: bool = False) -> None:
        super().__init__(message)
        self.is_truncated = is_truncated


class Form(enum.Enum):
    OBJECT = "object"
    ARRAY = "array"


@attrs.frozen
class Frame:
    """One message on a topic. A push has no `ref`; `join_ref` exists in array form only."""

    topic: str
    event: str
    payload: Any
    ref: Ref = None
    join_ref: Ref = None


def decode(text: bytes | str, form: Form) -> Frame:
    """Parse one text frame. Unknown keys of an object are ignored.

    Raises: MalformedFrame.
    """
    try:
        if form is Form.ARRAY:
            join_ref, ref, topic, event, payload = _ARRAY.decode(text)
            return Frame(topic, event, payload, ref, join_ref)
        wire = _OBJECT.decode(text)
        return Frame(wire.topic, wire.event, wire.payload, wire.ref)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        is_truncated = isinstance(error, msgspec.DecodeError) and str(error) == _TRUNCATED
        raise MalformedFrame(f"not a Phoenix frame in {form.value} form: {error}", is_truncated=is_truncated) from None


def encode(frame: Frame, form: Form) -> bytes:
    """The frame as JSON text. The payload may be whatever msgspec encodes; object form leaves out `join_ref`."""
    if form is Form.ARRAY:
        return _ENCODER.encode((frame.join_ref, frame.ref, frame.topic, frame.event, frame.payload))
    return _ENCODER.encode(_ObjectForm(frame.topic, frame.event, frame.payload, frame.ref))


def reply(frame: Frame, status: Literal["ok", "error"], response: object) -> Frame:
    """The answer to a frame: `phx_reply` with its topic and refs (docs/protocol/portal-protocol.md, 1.6).

    Upstream's peers accept a join reply only if the response is the empty object.
    """
    return attrs.evolve(frame, event="phx_reply", payload={"status": status, "response": response})


class _ObjectForm(msgspec.Struct):
    topic: str
    event: str
    payload: Any = None
    ref: int | str | None = None


_ENCODER = msgspec.json.Encoder()
_OBJECT = msgspec.json.Decoder(_ObjectForm)
_ARRAY = msgspec.json.Decoder(tuple[int | str | None, int | str | None, str, str, Any])
_TRUNCATED = "Input data was truncated"  # msgspec has no type of its own for it

"""Phoenix frames in both forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.phoenix.codec import Form, Frame, MalformedFrame, decode, encode, reply
from firezone_tunnel.errors import ProtocolError

_VECTORS = sorted((Path(__file__).parents[3] / "data" / "vectors").glob("*.jsonl"))

_refs = st.none() | st.integers(0, 2**63) | st.text(max_size=5)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
_frames = st.builds(Frame, topic=st.text(), event=st.text(), payload=_json, ref=_refs, join_ref=_refs)


def test_object_form_has_the_keys_that_a_portal_wants_and_no_join_ref() -> None:
    frame = Frame("client", "phx_join", None, 0, join_ref=0)

    assert encode(frame, Form.OBJECT) == b'{"topic":"client","event":"phx_join","payload":null,"ref":0}'


def test_array_form_is_a_list_of_five() -> None:
    frame = Frame("client", "init", {"a": 1}, None, "3")

    assert encode(frame, Form.ARRAY) == b'["3",null,"client","init",{"a":1}]'


@given(_frames)
def test_array_form_survives_a_round_trip(frame: Frame) -> None:
    assert decode(encode(frame, Form.ARRAY), Form.ARRAY) == frame


@given(_frames)
def test_object_form_survives_a_round_trip_but_for_the_join_ref(frame: Frame) -> None:
    back = decode(encode(frame, Form.OBJECT), Form.OBJECT)

    assert (back.topic, back.event, back.payload, back.ref) == (frame.topic, frame.event, frame.payload, frame.ref)
    assert back.join_ref is None


@pytest.mark.parametrize("ref", [0, 7, "7", None])
def test_a_reply_keeps_topic_and_refs_with_their_types(ref: Any) -> None:
    answer = reply(Frame("client", "x", {}, ref, ref), "ok", {})

    assert answer == Frame("client", "phx_reply", {"status": "ok", "response": {}}, ref, ref)
    assert type(answer.ref) is type(ref)


def test_ref_and_unknown_keys_may_be_absent_or_present() -> None:
    frame = decode('{"topic":"client","event":"x","payload":"text","join_ref":null,"more":[1]}', Form.OBJECT)

    assert frame == Frame("client", "x", "text")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('["1","2","client","x",{}]', Form.OBJECT),
        ('{"topic":"client","event":"x","payload":{}}', Form.ARRAY),
        ('{"event":"x","payload":{},"ref":0}', Form.OBJECT),
        ('{"topic":7,"event":"x","payload":{},"ref":0}', Form.OBJECT),
        ('{"topic":"client","event":"x","payload":{},"ref":1.5}', Form.OBJECT),
        ('{"topic":"client","event":"x","payload":{},"ref":true}', Form.OBJECT),
        ('[null,null,"client","x"]', Form.ARRAY),
        ('[null,null,"client","x",{},{}]', Form.ARRAY),
        ('[null,{},"client","x",{}]', Form.ARRAY),
        ("[" * 100_000, Form.ARRAY),
        ('{"topic":"a","event":"b","payload":' + "[" * 100_000, Form.OBJECT),
        ('{"topic":"a","event":"b","payload":' + "1" * 5_000 + "}", Form.OBJECT),
        ('{"topic":"\ud800","event":"x","payload":{}}', Form.OBJECT),
    ],
)
def test_text_that_is_not_a_frame_is_malformed(text: str, form: Form) -> None:
    with pytest.raises(MalformedFrame) as caught:
        decode(text, form)

    assert not caught.value.is_truncated


@pytest.mark.parametrize("text", [b"", b"{", b'{"topic":"client","event":"x"', b'{"topic":"cli'])
def test_a_truncated_frame_is_distinguished_from_a_malformed_one(text: bytes) -> None:
    with pytest.raises(MalformedFrame) as caught:
        decode(text, Form.OBJECT)

    assert caught.value.is_truncated


@given(st.binary() | st.text() | _json.map(json.dumps), st.sampled_from(Form))
def test_any_input_is_a_frame_or_a_protocol_error(text: bytes | str, form: Form) -> None:
    try:
        frame = decode(text, form)
    except ProtocolError:
        return
    assert decode(encode(frame, form), form) == frame


@pytest.mark.parametrize("path", _VECTORS, ids=lambda path: path.stem)
def test_recorded_frames_of_upstream_are_read_and_written_as_they_were(path: Path) -> None:
    frames = [record["frame"] for record in map(json.loads, path.read_text().splitlines()) if "frame" in record]
    assert frames

    for frame in frames:
        decoded = decode(json.dumps(frame), Form.OBJECT)
        assert json.loads(encode(decoded, Form.OBJECT)) == frame

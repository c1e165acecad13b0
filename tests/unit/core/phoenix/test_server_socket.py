"""The portal's side of a Phoenix socket: mailbox, topics, replies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.phoenix.codec import Form
from firezone_tunnel.core.phoenix.server_socket import JoinRequested, Left, MessageReceived, ServerSocket
from firezone_tunnel.errors import ProtocolError

_OK = {"status": "ok", "response": {}}


class _Peer:
    """Feeds a socket and reads its frames."""

    def __init__(self, form: Form = Form.OBJECT) -> None:
        self.form = form
        self.socket = ServerSocket(topic="client", form=form, now=0.0)

    def say(
        self, event: str, payload: Any = None, *, ref: Any = 1, topic: str = "client", join_ref: Any = None
    ) -> None:
        frame: Any = {"topic": topic, "event": event, "payload": payload, "ref": ref}
        if self.form is Form.ARRAY:
            frame = [join_ref, ref, topic, event, payload]
        self.socket.handle_text(json.dumps(frame), 0.0)

    def heard(self) -> list[Any]:
        return [json.loads(text) for text in self.socket.transmits()]

    def join(self) -> None:
        self.say("phx_join", ref=0)
        request = self.socket.next_message()
        assert isinstance(request, JoinRequested)
        self.socket.accept_join(request, "init", {})
        self.socket.done()
        self.heard()


@pytest.fixture
def peer() -> _Peer:
    return _Peer()


def test_a_join_is_answered_before_its_first_push(peer: _Peer) -> None:
    peer.say("phx_join", ref=0)
    request = peer.socket.next_message()
    assert isinstance(request, JoinRequested)

    peer.socket.accept_join(request, "init", {"a": 1})

    reply, init = peer.heard()
    assert reply == {"topic": "client", "event": "phx_reply", "payload": _OK, "ref": 0}
    assert (init["event"], init["payload"], init["ref"]) == ("init", {"a": 1}, None)


def test_in_array_form_replies_and_pushes_name_the_join() -> None:
    peer = _Peer(Form.ARRAY)
    peer.say("phx_join", {}, ref="3", join_ref="3")
    request = peer.socket.next_message()
    assert isinstance(request, JoinRequested)

    peer.socket.accept_join(request, "init", {})

    assert peer.heard() == [["3", "3", "client", "phx_reply", _OK], ["3", None, "client", "init", {}]]


def test_messages_pushed_during_a_join_come_after_the_first_push(peer: _Peer) -> None:
    peer.say("phx_join", ref=0)
    request = peer.socket.next_message()
    assert isinstance(request, JoinRequested)

    peer.socket.push("reject_access", {})
    assert peer.heard() == []
    peer.socket.accept_join(request, "init", {})

    assert [frame["event"] for frame in peer.heard()] == ["phx_reply", "init", "reject_access"]


def test_without_a_channel_nothing_is_pushed(peer: _Peer) -> None:
    peer.socket.push("reject_access", {})

    assert peer.heard() == []


def test_one_message_is_handed_out_at_a_time(peer: _Peer) -> None:
    peer.join()
    peer.say("first")
    peer.say("second")

    first = peer.socket.next_message()
    assert peer.socket.next_message() is None
    peer.socket.done()
    second = peer.socket.next_message()

    assert isinstance(first, MessageReceived)
    assert isinstance(second, MessageReceived)
    assert (first.event, second.event) == ("first", "second")


def test_a_message_behind_a_join_waits_for_it(peer: _Peer) -> None:
    peer.say("phx_join", ref=0)
    peer.say("create_flow", {}, ref=1)
    request = peer.socket.next_message()
    assert isinstance(request, JoinRequested)

    peer.socket.refuse_join(request, "invalid_version")
    peer.socket.done()

    assert peer.socket.next_message() is None
    reasons = [frame["payload"]["response"]["reason"] for frame in peer.heard()]
    assert reasons == ["invalid_version", "unmatched topic"]


def test_a_heartbeat_is_answered_while_the_handler_is_busy(peer: _Peer) -> None:
    peer.say("phx_join", ref=0)
    peer.socket.next_message()

    peer.say("heartbeat", {}, ref=7, topic="phoenix")

    assert peer.heard() == [{"topic": "phoenix", "event": "phx_reply", "payload": _OK, "ref": 7}]


@pytest.mark.parametrize(("topic", "event"), [("client", "x"), ("gateway", "phx_join"), ("phoenix", "x")])
def test_a_topic_that_was_not_joined_is_unmatched(peer: _Peer, topic: str, event: str) -> None:
    peer.say(event, topic=topic)

    assert peer.socket.next_message() is None
    assert [frame["payload"]["response"] for frame in peer.heard()] == [{"reason": "unmatched topic"}]


def test_a_second_join_ends_the_first_channel(peer: _Peer) -> None:
    peer.join()
    peer.say("phx_join", ref=5)

    assert peer.socket.next_message() == Left()
    assert [frame["event"] for frame in peer.heard()] == ["phx_close"]
    peer.socket.done()

    assert isinstance(peer.socket.next_message(), JoinRequested)


def test_a_peer_may_leave(peer: _Peer) -> None:
    peer.join()
    peer.say("phx_leave", {}, ref=5)

    assert peer.socket.next_message() == Left()
    assert [frame["event"] for frame in peer.heard()] == ["phx_reply", "phx_close"]
    assert not peer.socket.is_joined


def test_a_crash_ends_the_channel(peer: _Peer) -> None:
    peer.join()

    peer.socket.crash_channel()
    peer.say("x")
    peer.socket.next_message()

    assert [frame["event"] for frame in peer.heard()] == ["phx_error", "phx_reply"]


@pytest.mark.parametrize("ref", [0, 7, "7", None])
def test_a_ref_comes_back_as_it_is(peer: _Peer, ref: Any) -> None:
    peer.say("heartbeat", {}, ref=ref, topic="phoenix")

    (reply,) = peer.heard()
    assert reply["ref"] == ref
    assert type(reply["ref"]) is type(ref)


def test_silence_is_noticed(peer: _Peer) -> None:
    assert not peer.socket.is_idle(74.9)
    assert peer.socket.is_idle(75.0)


def test_a_mailbox_is_bounded(peer: _Peer) -> None:
    peer.join()
    for _ in range(300):
        assert not peer.socket.is_full or len(peer.heard()) == 0
        peer.say("x")

    assert peer.socket.is_full


@given(st.text(), st.sampled_from(Form))
def test_any_text_is_a_frame_or_a_protocol_error(text: str, form: Form) -> None:
    socket = ServerSocket(topic="client", form=form, now=0.0)

    try:
        socket.handle_text(text, 0.0)
    except ProtocolError:
        assert list(socket.transmits()) == []

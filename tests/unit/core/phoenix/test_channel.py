"""The client's side of a Phoenix socket: joins, heartbeats, retries."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.phoenix.channel import (
    DIAL_TIMEOUT,
    IDENTITY_SHARED,
    PROBE_TIMEOUT,
    QUEUE_CAPACITY,
    STALLED_AFTER,
    STEADY_AFTER,
    TRANSITIONS,
    Channel,
    ChannelLost,
    ChannelState,
    Dial,
    Fatal,
    HangUp,
    IdentityShared,
    Joined,
    Lost,
    PushReceived,
    Stalled,
    UpgradeRefused,
)
from firezone_tunnel.errors import AuthenticationError, PortalError

_VECTORS = sorted((Path(__file__).parents[3] / "data" / "vectors").glob("*.jsonl"))


class _World:
    """A channel, its clock, and a portal that answers on demand."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("entropy", lambda count: b"\x80" + bytes(count - 1))  # the middle of each interval
        self.now = 100.0
        self.channel = Channel(topic="client", **options)

    def events(self) -> list[Any]:
        return list(self.channel.events())

    def lost(self) -> list[Lost]:
        return [event for event in self.events() if isinstance(event, Lost)]

    def sent(self) -> list[Any]:
        return [json.loads(text) for text in self.channel.transmits()]

    def hear(self, event: str, payload: Any = None, *, ref: Any = None, topic: str = "client") -> None:
        frame = {"topic": topic, "event": event, "payload": payload, "ref": ref}
        self.channel.handle_text(json.dumps(frame), self.now)

    def hear_reply(self, ref: Any, *, reason: str | None = None, topic: str = "client") -> None:
        response = {} if reason is None else {"reason": reason}
        status = "ok" if reason is None else "error"
        self.hear("phx_reply", {"status": status, "response": response}, ref=ref, topic=topic)

    def open(self) -> None:
        self.channel.connect(self.now)
        self.channel.handle_open(self.now)

    def join(self) -> None:
        self.open()
        self.hear_reply(0)
        self.events()
        self.sent()

    def advance(self, seconds: float) -> None:
        """Advance the clock by `seconds`, calling the channel at each of its deadlines."""
        end = self.now + seconds
        while (timeout := self.channel.next_timeout()) is not None and timeout.at <= end:
            self.now = timeout.at
            self.channel.handle_timeout(self.now)
        self.now = end


@pytest.fixture
def world() -> _World:
    return _World()


@pytest.fixture
def joined() -> _World:
    world = _World()
    world.join()
    return world


def test_it_dials_when_asked_to_and_not_before(world: _World) -> None:
    assert world.channel.next_timeout() is None

    world.channel.connect(world.now)

    assert world.events() == [Dial(1)]


def test_the_join_is_the_first_frame_with_ref_0(world: _World) -> None:
    world.open()

    assert world.sent() == [{"topic": "client", "event": "phx_join", "payload": None, "ref": 0}]


def test_a_relay_joins_with_its_stamp_secret() -> None:
    world = _World(join_payload={"stamp_secret": "ab"})

    world.open()

    assert world.sent()[0]["payload"] == {"stamp_secret": "ab"}


def test_messages_wait_for_the_join(world: _World) -> None:
    world.open()
    world.sent()

    assert world.channel.send("create_flow", {"resource_id": "a"})
    assert world.sent() == []
    world.hear_reply(0)

    assert world.events()[-1] == Joined()
    assert world.sent() == [{"topic": "client", "event": "create_flow", "payload": {"resource_id": "a"}, "ref": 1}]


def test_identical_messages_that_wait_are_sent_once(joined: _World) -> None:
    for _ in range(4):
        assert joined.channel.send("no_relays", {})
    joined.channel.send("no_relays", {"other": 1})

    assert [frame["payload"] for frame in joined.sent()] == [{}, {"other": 1}]
    assert joined.channel.counters.duplicates == 3


def test_a_message_that_was_sent_may_be_sent_again(joined: _World) -> None:
    joined.channel.send("no_relays", {})
    joined.sent()
    joined.channel.send("no_relays", {})

    assert len(joined.sent()) == 1


def test_without_a_connection_nothing_is_kept(world: _World) -> None:
    assert not world.channel.send("create_flow", {})
    world.channel.connect(world.now)
    assert not world.channel.send("create_flow", {})
    world.channel.handle_open(world.now)
    world.hear_reply(0)

    assert [frame["event"] for frame in world.sent()] == ["phx_join"]
    assert world.channel.counters.refused_not_connected == 2


def test_a_full_queue_refuses(world: _World) -> None:
    world.open()

    accepted = [world.channel.send("x", number) for number in range(QUEUE_CAPACITY + 2)]

    assert accepted.count(True) == QUEUE_CAPACITY
    assert world.channel.counters.refused_full == 2


def test_a_caller_that_stops_taking_loses_nothing(joined: _World) -> None:
    for number in range(3):
        joined.channel.send("x", number)

    (first,) = itertools.islice(joined.channel.transmits(), 1)

    assert json.loads(first)["payload"] == 0
    assert [frame["payload"] for frame in joined.sent()] == [1, 2]


def test_refs_start_anew_with_each_connection_and_nothing_survives(joined: _World) -> None:
    joined.channel.send("x", 1)
    joined.channel.handle_lost("gone", joined.now)
    joined.advance(1.0)
    joined.channel.handle_open(joined.now)
    joined.hear_reply(0)

    assert [(frame["event"], frame["ref"]) for frame in joined.sent()] == [("phx_join", 0)]


def test_messages_of_the_portal_come_through(joined: _World) -> None:
    joined.channel.handle_text('{"topic":"client","event":"init","payload":{"a":1}}', joined.now)
    joined.channel.handle_text(
        '{"topic":"client","event":"new","payload":"text","ref":null,"join_ref":null}', joined.now
    )

    assert joined.events() == [PushReceived("init", {"a": 1}), PushReceived("new", "text")]


@pytest.mark.parametrize(
    ("topic", "event"), [("gateway", "init"), ("client", "phx_leave"), ("client", "phx_reply"), ("phoenix", "x")]
)
def test_meaningless_messages_are_counted(joined: _World, topic: str, event: str) -> None:
    joined.hear(event, {}, topic=topic)

    assert joined.events() == []
    assert joined.channel.counters.unknown == 1


def test_an_unreadable_frame_is_counted_and_dropped(joined: _World) -> None:
    joined.channel.handle_text('{"topic":1}', joined.now)

    assert joined.events() == []
    assert joined.channel.counters.malformed == 1
    assert joined.channel.state is ChannelState.JOINED


@pytest.mark.parametrize("text", [b"", b'{"topic":"client"'])
def test_a_frame_that_ends_too_early_means_reconnecting(joined: _World, text: bytes) -> None:
    joined.channel.handle_text(text, joined.now)

    assert [type(event) for event in joined.events()] == [HangUp, Lost]


def test_a_join_that_is_not_answered_within_5_seconds_is_given_up(world: _World) -> None:
    world.open()
    world.events()

    world.advance(4.9)
    assert world.events() == []
    world.advance(0.1)

    assert [event.reason for event in world.lost()] == ["no answer to the join within 5 s"]


@pytest.mark.parametrize("reason", ["invalid_version", "disabled", "unmatched topic", "join crashed", "other"])
def test_a_refused_join_is_final(world: _World, reason: str) -> None:
    world.open()

    world.hear_reply(0, reason=reason)

    *_, hang_up, fatal = world.events()
    assert isinstance(hang_up, HangUp)
    assert isinstance(fatal, Fatal)
    assert type(fatal.error) is PortalError
    assert reason in str(fatal.error)
    assert world.channel.next_timeout() is None


@pytest.mark.parametrize("ref", [1, "0", None])
def test_only_the_reply_to_the_join_completes_it(world: _World, ref: Any) -> None:
    world.open()
    world.hear_reply(ref)

    assert world.channel.state is ChannelState.JOINING


def test_a_connection_that_does_not_come_about_in_15_seconds_is_given_up(world: _World) -> None:
    world.channel.connect(world.now)
    world.events()

    world.advance(15.0)

    stalled, hang_up, lost = world.events()
    assert isinstance(stalled, Stalled)
    assert isinstance(hang_up, HangUp)
    assert (lost.reason, lost.attempt, lost.was_joined) == ("no connection within 15 s", 1, False)


def test_an_attempt_that_takes_long_names_what_is_missing_once(world: _World) -> None:
    world.channel.connect(world.now)
    world.channel.handle_progress("a TCP connection")
    world.advance(2.0)
    world.channel.handle_progress("the TLS handshake")
    world.events()

    world.advance(STALLED_AFTER)
    assert world.events() == [Stalled("the TLS handshake")]
    world.channel.handle_progress("the answer")
    world.advance(DIAL_TIMEOUT)

    assert world.lost()[0].reason == "no connection within 15 s: the answer is missing"


def test_an_attempt_that_succeeds_in_time_is_not_stalled(world: _World) -> None:
    world.join()

    world.advance(STALLED_AFTER)

    assert world.events() == []


def test_heartbeats_keep_their_cadence_under_traffic(joined: _World) -> None:
    for _ in range(8):
        joined.advance(3.0)
        joined.channel.send("x", joined.now)
    joined.advance(1.0)

    beats = [frame for frame in joined.sent() if frame["event"] == "heartbeat"]
    assert [(frame["topic"], frame["payload"]) for frame in beats] == [("phoenix", {})] * 2


def test_a_late_heartbeat_is_noticed_and_does_not_shift_the_next(joined: _World) -> None:
    joined.now += 13.5
    joined.channel.handle_timeout(joined.now)

    timeout = joined.channel.next_timeout()
    assert joined.channel.counters.heartbeat_late_max == pytest.approx(3.5)
    assert timeout is not None
    assert timeout.at == pytest.approx(120.0)


def test_after_a_long_suspend_one_heartbeat_is_sent(joined: _World) -> None:
    joined.now += 3600.0
    joined.channel.handle_timeout(joined.now)

    assert [frame["event"] for frame in joined.sent()] == ["heartbeat"]
    timeout = joined.channel.next_timeout()
    assert timeout is not None
    assert joined.now < timeout.at <= joined.now + 10.0


def test_heartbeats_do_not_wait_for_a_join(joined: _World) -> None:
    joined.advance(6.0)
    joined.hear("phx_error", {})
    joined.channel.send("x", 1)
    joined.advance(4.0)

    assert [frame["event"] for frame in joined.sent()] == ["phx_join", "heartbeat"]


def test_answered_heartbeats_keep_the_connection(joined: _World) -> None:
    for ref in range(1, 20):
        joined.advance(10.0)
        assert [frame["ref"] for frame in joined.sent()] == [ref]
        joined.hear_reply(ref, topic="phoenix")

    assert joined.channel.state is ChannelState.JOINED


def test_a_portal_that_sends_is_there_although_its_answers_are_late(joined: _World) -> None:
    for _ in range(20):
        joined.advance(10.0)
        joined.hear("resource_deleted", "x")

    assert joined.channel.state is ChannelState.JOINED
    joined.advance(40.0)
    assert [event.reason for event in joined.lost()] == ["too many unanswered heartbeats"]


def test_the_fourth_heartbeat_in_a_row_without_an_answer_ends_it(joined: _World) -> None:
    joined.advance(39.9)
    assert joined.channel.state is ChannelState.JOINED
    joined.advance(0.1)

    assert [event.reason for event in joined.lost()] == ["too many unanswered heartbeats"]


@pytest.mark.parametrize("unanswered", [0, 2])
def test_a_probe_is_a_heartbeat_now_and_its_answer_keeps_the_connection(joined: _World, unanswered: int) -> None:
    joined.advance(10.0 * unanswered)
    joined.sent()
    joined.now += 3600.0

    joined.channel.probe(joined.now)
    joined.channel.probe(joined.now)
    [beat] = joined.sent()
    joined.advance(1.4)
    joined.hear_reply(beat["ref"], topic="phoenix")
    joined.advance(5.0)

    assert (beat["event"], beat["ref"]) == ("heartbeat", unanswered + 1)
    assert joined.channel.state is ChannelState.JOINED
    assert joined.lost() == []


@pytest.mark.parametrize("heard", [[], ["an old push"], ["the reply to an old heartbeat"]])
def test_a_probe_without_an_answer_dials_at_once(joined: _World, heard: list[str]) -> None:
    """What the kernel has received before the pause proves nothing."""
    joined.advance(10.0)
    joined.now += 3600.0

    joined.channel.probe(joined.now)
    if "an old push" in heard:
        joined.hear("resource_deleted", "r")
    if "the reply to an old heartbeat" in heard:
        joined.hear_reply(1, topic="phoenix")
    joined.advance(PROBE_TIMEOUT - 0.1)
    assert joined.channel.state is ChannelState.JOINED
    joined.advance(0.1)

    assert [(event.delay, event.was_joined) for event in joined.lost()] == [(0.0, True)]
    assert joined.channel.state is ChannelState.DIALING


def test_a_probe_leaves_alone_what_has_a_deadline_already(world: _World) -> None:
    world.channel.connect(world.now)
    before = world.channel.next_timeout()

    world.channel.probe(world.now + 1.0)

    assert world.channel.next_timeout() == before
    world.channel.handle_open(world.now)
    world.channel.probe(world.now + 1.0)
    assert [frame["event"] for frame in world.sent()] == ["phx_join"]


def test_heartbeat_replies_with_wrong_refs_do_not_count(joined: _World) -> None:
    for number in range(4):
        joined.advance(10.0)
        joined.hear_reply(900 + number, topic="phoenix")
        joined.hear_reply("1", topic="phoenix")

    assert len(joined.lost()) == 1


def test_a_crashed_channel_is_joined_anew_on_the_same_socket(joined: _World) -> None:
    joined.advance(6.0)
    joined.hear("phx_error", {})

    assert joined.events() == [ChannelLost("the portal's channel crashed")]
    assert [(frame["event"], frame["ref"]) for frame in joined.sent()] == [("phx_join", 1)]
    joined.hear_reply(1)
    assert joined.events() == [Joined()]


def test_unmatched_topic_joins_anew_with_the_original_payload() -> None:
    world = _World(join_payload={"stamp_secret": "ab"})
    world.join()
    world.advance(6.0)
    world.channel.send("x", 1)
    world.channel.send("y", 1)
    world.sent()

    world.hear_reply(1, reason="unmatched topic")
    world.hear_reply(2, reason="unmatched topic")

    assert [(frame["event"], frame["payload"]) for frame in world.sent()] == [("phx_join", {"stamp_secret": "ab"})]


def test_an_old_unmatched_topic_does_not_join_a_joined_channel_again(joined: _World) -> None:
    joined.advance(6.0)
    joined.channel.send("x", 1)
    joined.sent()
    joined.hear("phx_error", {})
    joined.sent()
    joined.hear_reply(2)
    joined.advance(6.0)

    joined.hear_reply(1, reason="unmatched topic")

    assert joined.channel.state is ChannelState.JOINED
    assert [frame["event"] for frame in joined.sent()] == ["heartbeat"]


def test_a_channel_that_keeps_crashing_gets_a_new_socket_with_backoff(joined: _World) -> None:
    joined.advance(1.0)
    joined.hear("phx_error", {})

    assert [type(event) for event in joined.events()] == [HangUp, Lost]


@pytest.mark.parametrize("reason", ["disabled", "invalid_version", "other", "unmatched topic"])
def test_error_replies_to_other_topics_or_with_other_reasons_change_nothing(joined: _World, reason: str) -> None:
    joined.advance(6.0)
    joined.channel.send("x", 1)
    joined.sent()

    joined.hear_reply(1, reason=reason, topic="gateway" if reason == "unmatched topic" else "client")

    assert joined.channel.state is ChannelState.JOINED
    assert joined.channel.counters.errors == 1


def test_a_closed_channel_means_reconnecting(joined: _World) -> None:
    joined.hear("phx_close", {})

    assert [event.was_joined for event in joined.lost()] == [True]


def test_an_expired_token_is_final_and_asks_to_sign_in(joined: _World) -> None:
    joined.hear("disconnect", {"reason": "token_expired"})

    fatal = joined.events()[-1]
    assert isinstance(fatal.error, AuthenticationError)
    assert fatal.error.requires_sign_in


def test_a_displaced_device_is_told_why_and_comes_back(joined: _World) -> None:
    joined.hear("disconnect", {"reason": IDENTITY_SHARED})

    (lost,) = joined.lost()
    assert lost.reason == "another host connected with the identity of this device"
    assert (lost.is_identity_shared, lost.was_joined) == (True, True)


def test_the_refusal_of_another_host_with_our_identity_ends_nothing(joined: _World) -> None:
    joined.hear(IDENTITY_SHARED, {})

    assert joined.events() == [IdentityShared()]
    assert joined.channel.state is ChannelState.JOINED


@pytest.mark.parametrize("code", ["gateway_already_connected", "device_identity_conflict"])
def test_a_host_whose_identity_is_connected_already_is_refused_and_tries_again(world: _World, code: str) -> None:
    world.channel.connect(world.now)
    world.channel.handle_refused(UpgradeRefused(409, code, "Give it its own."), world.now)

    (lost,) = world.lost()
    assert lost.is_identity_shared
    assert lost.reason == f"the portal answered HTTP 409 ({code}): Give it its own."


@pytest.mark.parametrize("payload", [{"reason": "maintenance"}, {}, None, "token_expired"])
def test_another_disconnect_is_ignored(joined: _World, payload: Any) -> None:
    joined.hear("disconnect", payload)

    assert joined.events() == []
    assert joined.channel.counters.unknown == 1


@pytest.mark.parametrize(
    ("code", "requires_sign_in"),
    [("invalid_token", True), ("missing_token", True), ("something_new", False), (None, False)],
)
def test_401_is_final(world: _World, code: str | None, requires_sign_in: bool) -> None:
    world.channel.connect(world.now)
    world.channel.handle_refused(UpgradeRefused(401, code), world.now)

    fatal = world.events()[-1]
    assert isinstance(fatal.error, AuthenticationError)
    assert fatal.error.requires_sign_in is requires_sign_in
    assert world.channel.state is ChannelState.FAILED


@pytest.mark.parametrize("status", [301, 400, 402, 403, 408, 409, 422, 429, 500, 503])
def test_every_other_refusal_is_retried(world: _World, status: int) -> None:
    world.channel.connect(world.now)
    world.channel.handle_refused(UpgradeRefused(status, "a_code"), world.now)

    (lost,) = world.lost()
    assert f"HTTP {status} (a_code)" in lost.reason
    world.advance(lost.delay)
    assert world.events() == [Dial(2)]


def test_retry_after_is_the_delay_and_costs_no_backoff() -> None:
    world = _World(max_partition_time=1.0)
    world.channel.connect(world.now)
    delays = []
    for retry_after in (30.0, 60.0, 0.0, None):
        world.channel.handle_refused(UpgradeRefused(429, retry_after=retry_after), world.now)
        delays += [lost.delay for lost in world.lost()]
        world.advance(delays[-1])

    assert delays == [30.0, 60.0, 0.0, 0.5]


def test_a_retry_after_of_years_is_cut_to_an_hour(world: _World) -> None:
    world.channel.connect(world.now)
    world.channel.handle_refused(UpgradeRefused(503, retry_after=1e8), world.now)

    assert [lost.delay for lost in world.lost()] == [3600.0]


def test_delays_grow_by_half_to_a_minute(world: _World) -> None:
    delays = _fail_repeatedly(world, 16)

    assert delays[:4] == pytest.approx([0.5, 0.75, 1.125, 1.6875])
    assert delays[-1] == 60.0


@given(st.binary(min_size=64, max_size=64))
def test_delays_spread_by_half_and_never_exceed_a_minute(seed: bytes) -> None:
    stream = itertools.cycle(seed)
    world = _World(entropy=lambda count: bytes(next(stream) for _ in range(count)))

    for number, delay in enumerate(_fail_repeatedly(world, 16)):
        base = min(0.5 * 1.5**number, 60.0)
        assert base * 0.5 <= delay <= min(base * 1.5, 60.0)


def test_a_join_resets_the_delays(world: _World) -> None:
    _fail_repeatedly(world, 5)

    lost = _lose_after_a_join(world, 0.0)

    assert (lost.delay, lost.was_joined) == (0.5, True)
    assert _fail_repeatedly(world, 2) == [0.5, 0.75]


def test_joins_that_do_not_last_are_followed_by_growing_delays(world: _World) -> None:
    world.channel.connect(world.now)

    delays = [_lose_after_a_join(world, 1.0).delay for _ in range(16)]

    assert delays[:4] == pytest.approx([0.5, 0.75, 1.125, 1.6875])
    assert delays[-1] == 60.0
    assert _lose_after_a_join(world, STEADY_AFTER - 1.0).delay == 60.0


def test_a_join_that_lasts_ends_the_delays_between_joins(world: _World) -> None:
    world.channel.connect(world.now)
    for _ in range(16):
        _lose_after_a_join(world, 1.0)

    assert _lose_after_a_join(world, STEADY_AFTER).delay == 0.5


def test_two_hosts_with_one_identity_displace_each_other_ever_less_often() -> None:
    present, other = _World(), _World()
    present.join()
    other.channel.connect(other.now)
    delays = []
    for _ in range(30):
        _join(other)
        present.hear("disconnect", {"reason": IDENTITY_SHARED})
        (lost,) = present.lost()
        delays.append(lost.delay)
        present.advance(lost.delay)
        _stay(other, lost.delay)
        present, other = other, present

    assert delays[:4] == pytest.approx([0.5, 0.5, 0.75, 0.75])
    assert delays[-4:] == [60.0] * 4


def test_an_upgrade_alone_does_not_reset_the_delays(world: _World) -> None:
    _fail_repeatedly(world, 5)
    world.channel.handle_open(world.now)
    world.channel.handle_lost("gone", world.now)

    (lost,) = world.lost()
    assert lost.delay == pytest.approx(0.5 * 1.5**5)


def test_asking_to_connect_resets_the_delays_and_drops_what_there_is(world: _World) -> None:
    _fail_repeatedly(world, 5)
    world.channel.connect(world.now)

    assert [type(event) for event in world.events()] == [HangUp, Dial]
    world.channel.handle_lost("gone", world.now)
    assert [lost.delay for lost in world.lost()] == [0.5]


def test_a_client_tries_for_ever(world: _World) -> None:
    assert len(_fail_repeatedly(world, 2000)) == 2000


def test_a_gateway_gives_up_after_its_partition_time() -> None:
    world = _World(max_partition_time=24 * 3600.0)
    delays = _fail_repeatedly(world, 2000)

    assert 24 * 3600.0 - 60.0 < sum(delays) <= 24 * 3600.0
    assert world.channel.state is ChannelState.FAILED


def test_a_failed_channel_can_be_connected_again(world: _World) -> None:
    world.channel.connect(world.now)
    world.channel.handle_refused(UpgradeRefused(401), world.now)
    world.events()

    world.channel.connect(world.now)

    assert world.events() == [Dial(1)]


def test_a_closed_channel_wants_nothing(joined: _World) -> None:
    joined.channel.close()
    joined.channel.handle_lost("gone", joined.now)
    joined.hear("init", {})

    assert joined.events() == []
    assert joined.channel.next_timeout() is None
    assert not joined.channel.send("x", 1)


@pytest.mark.parametrize("path", _VECTORS, ids=lambda path: path.stem)
def test_we_send_a_recorded_portal_the_same_as_upstreams_programs(path: Path) -> None:
    """Our channel sends each peer's frames in their order, byte for byte as recorded."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for peer in ("client", "gateway", "relay"):
        frames = [
            (record["dir"], record["frame"]) for record in records if record.get("peer") == peer and "frame" in record
        ]
        join = frames[0][1]
        channel = Channel(topic=peer, entropy=bytes, join_payload=join["payload"])
        channel.connect(0.0)
        channel.handle_open(0.0)
        ours: list[Any] = []
        pushed = []
        for direction, frame in frames:
            if direction == "out":
                channel.handle_text(json.dumps(frame), 0.0)
                pushed += [frame["event"]] if frame["event"] != "phx_reply" else []
            elif frame["event"] not in {"phx_join", "heartbeat"}:
                assert channel.send(frame["event"], frame["payload"])
            ours += map(json.loads, channel.transmits())

        theirs = [frame for direction, frame in frames if direction == "in" and frame["event"] != "heartbeat"]
        assert [(event["event"], event["payload"]) for event in ours] == [
            (event["event"], event["payload"]) for event in theirs
        ]
        assert [event.event for event in channel.events() if isinstance(event, PushReceived)] == pushed


@given(st.binary() | st.text(), st.booleans())
def test_any_text_leaves_a_channel_that_works(text: bytes | str, is_joined: bool) -> None:
    world = _World()
    world.open()
    if is_joined:
        world.hear_reply(0)

    world.channel.handle_text(text, world.now)

    assert world.channel.state in {ChannelState.JOINING, ChannelState.JOINED, ChannelState.WAITING}


@given(st.lists(st.integers(0, 9), max_size=60))
def test_every_change_of_state_is_documented(steps: list[int]) -> None:
    world = _World(max_partition_time=3.0)
    seen = [world.channel.state]
    for step in steps:
        _take_step(world, step)
        world.events()
        world.sent()
        seen.append(world.channel.state)
        timeout = world.channel.next_timeout()
        assert (timeout is None) == (world.channel.state in {ChannelState.IDLE, ChannelState.FAILED})

    for before, after in itertools.pairwise(seen):
        assert before is after or after in TRANSITIONS[before]


def _take_step(world: _World, step: int) -> None:
    actions = [
        lambda: world.channel.connect(world.now),
        lambda: world.channel.handle_open(world.now),
        lambda: world.hear_reply(0),
        lambda: world.hear("phx_error", {}),
        lambda: world.hear("phx_close", {}),
        lambda: world.channel.handle_lost("gone", world.now),
        lambda: world.channel.handle_refused(UpgradeRefused(401), world.now),
        lambda: world.channel.send("x", world.now),
        world.channel.close,
        lambda: world.channel.handle_timeout(world.now),
    ]
    world.now += step
    actions[step]()


def _join(world: _World) -> None:
    world.channel.handle_open(world.now)
    world.hear_reply(0)
    world.events()


def _lose_after_a_join(world: _World, seconds: float) -> Lost:
    """Join, lose the connection after `seconds`, and wait for the next attempt."""
    _join(world)
    _stay(world, seconds)
    world.channel.handle_lost("gone", world.now)
    (lost,) = world.lost()
    world.advance(lost.delay)
    world.events()
    return lost


def _stay(world: _World, seconds: float) -> None:
    """Let time pass while the portal answers every heartbeat."""
    end = world.now + seconds
    while world.now < end:
        world.advance(min(1.0, end - world.now))
        for frame in world.sent():
            world.hear_reply(frame["ref"])
    world.events()


def _fail_repeatedly(world: _World, times: int) -> list[float]:
    """Lose every attempt. Returns the delays after each, until the channel gives up."""
    world.channel.connect(world.now)
    delays = []
    for _ in range(times):
        world.channel.handle_lost("gone", world.now)
        lost = world.lost()
        if not lost:
            break
        delays.append(lost[0].delay)
        world.advance(lost[0].delay)
    world.events()
    return delays

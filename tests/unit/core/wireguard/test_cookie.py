from __future__ import annotations

import hashlib

import pytest

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.wireguard.cookie import HANDSHAKES_PER_SECOND, CookieChecker, MacStamp
from firezone_tunnel.core.wireguard.handshake import CookieReply, HandshakeInitiation, StaticKey, parse

SOURCE = SocketAddress("192.0.2.1", 52625)
ELSEWHERE = SocketAddress("192.0.2.1", 52626)
BODY = b"\1\0\0\0" + bytes(range(112))


def test_a_message_with_a_valid_mac1_is_admitted(checker: CookieChecker, stamp: MacStamp) -> None:
    message = checker.admit(stamp.finish(BODY, 0.0), SOURCE, 0.0)

    assert isinstance(message, HandshakeInitiation)
    assert message.mac2 == bytes(16)


def test_mac1_is_always_verified(checker: CookieChecker) -> None:
    for_another = MacStamp(StaticKey(b"\2" * 32).public).finish(BODY, 0.0)

    assert checker.admit(for_another, SOURCE, 0.0) is None
    assert checker.counters.forged == 1


def test_other_messages_are_dropped(checker: CookieChecker) -> None:
    assert checker.admit(b"\4\0\0\0" + bytes(144), SOURCE, 0.0) is None
    assert checker.counters.malformed == 1


def test_cookie_replies_pass_without_macs(checker: CookieChecker) -> None:
    assert isinstance(checker.admit(b"\3\0\0\0" + bytes(60), SOURCE, 0.0), CookieReply)


def test_a_hundred_handshakes_a_second_are_not_load(checker: CookieChecker, stamp: MacStamp) -> None:
    for second in range(3):
        for _ in range(HANDSHAKES_PER_SECOND):
            assert isinstance(checker.admit(stamp.finish(BODY, 0.0), SOURCE, float(second)), HandshakeInitiation)


def test_forged_messages_do_not_make_load(checker: CookieChecker, stamp: MacStamp) -> None:
    for _ in range(1000):
        checker.admit(BODY + bytes(32), SOURCE, 0.0)

    assert isinstance(checker.admit(stamp.finish(BODY, 0.0), SOURCE, 0.0), HandshakeInitiation)


def test_under_load_a_sender_needs_a_cookie_to_be_admitted(checker: CookieChecker, stamp: MacStamp) -> None:
    raise_load(checker, stamp, 0.0)
    reply = parse(answer(checker, stamp, 0.0))
    assert isinstance(reply, CookieReply)

    assert stamp.handle_cookie_reply(reply, 0.0)
    again = stamp.finish(BODY, 0.1)

    assert again[-16:] != bytes(16)
    assert isinstance(checker.admit(again, SOURCE, 0.1), HandshakeInitiation)


def test_a_cookie_is_invalid_from_another_address(checker: CookieChecker, stamp: MacStamp) -> None:
    take_cookie(checker, stamp, 0.0)

    assert isinstance(checker.admit(stamp.finish(BODY, 0.1), ELSEWHERE, 0.1), bytes)


def test_load_ends_with_the_second(checker: CookieChecker, stamp: MacStamp) -> None:
    raise_load(checker, stamp, 0.0)

    assert isinstance(checker.admit(stamp.finish(BODY, 0.0), SOURCE, 1.0), HandshakeInitiation)


def test_the_secret_changes_every_two_minutes(checker: CookieChecker, stamp: MacStamp) -> None:
    take_cookie(checker, stamp, 0.0)
    cookied = stamp.finish(BODY, 119.0)

    raise_load(checker, MacStamp(StaticKey(b"\1" * 32).public), 119.0)
    assert isinstance(checker.admit(cookied, SOURCE, 119.0), HandshakeInitiation)
    raise_load(checker, MacStamp(StaticKey(b"\1" * 32).public), 120.0)
    assert isinstance(checker.admit(cookied, SOURCE, 120.0), bytes)


def test_an_old_cookie_is_not_presented(checker: CookieChecker, stamp: MacStamp) -> None:
    take_cookie(checker, stamp, 0.0)

    assert stamp.finish(BODY, 119.9)[-16:] != bytes(16)
    assert stamp.finish(BODY, 120.0)[-16:] == bytes(16)


def test_a_cookie_reply_must_answer_the_last_message(checker: CookieChecker, stamp: MacStamp) -> None:
    raise_load(checker, stamp, 0.0)
    reply = parse(answer(checker, stamp, 0.0))
    assert isinstance(reply, CookieReply)
    stamp.finish(BODY[:-1] + b"x", 0.0)

    assert not stamp.handle_cookie_reply(reply, 0.0)


def test_a_cookie_reply_is_taken_once_and_not_before_anything_was_sent(checker: CookieChecker, stamp: MacStamp) -> None:
    raise_load(checker, stamp, 0.0)
    reply = parse(answer(checker, stamp, 0.0))
    assert isinstance(reply, CookieReply)

    assert not MacStamp(StaticKey(b"\1" * 32).public).handle_cookie_reply(reply, 0.0)
    assert stamp.handle_cookie_reply(reply, 0.0)
    assert not stamp.handle_cookie_reply(reply, 0.0)


def test_an_answer_is_smaller_than_its_request(checker: CookieChecker, stamp: MacStamp) -> None:
    raise_load(checker, stamp, 0.0)

    assert len(answer(checker, stamp, 0.0)) == 64


def raise_load(checker: CookieChecker, stamp: MacStamp, now: float) -> None:
    for _ in range(HANDSHAKES_PER_SECOND):
        checker.admit(stamp.finish(BODY, -1e9), ELSEWHERE, now)


def answer(checker: CookieChecker, stamp: MacStamp, now: float) -> bytes:
    reply = checker.admit(stamp.finish(BODY, now), SOURCE, now)
    assert isinstance(reply, bytes)
    return reply


def take_cookie(checker: CookieChecker, stamp: MacStamp, now: float) -> None:
    raise_load(checker, stamp, now)
    reply = parse(answer(checker, stamp, now))
    assert isinstance(reply, CookieReply)
    assert stamp.handle_cookie_reply(reply, now)


@pytest.fixture
def checker() -> CookieChecker:
    calls = iter(range(1000))
    return CookieChecker(StaticKey(b"\1" * 32), lambda size: hashlib.shake_128(bytes([next(calls)])).digest(size))


@pytest.fixture
def stamp() -> MacStamp:
    return MacStamp(StaticKey(b"\1" * 32).public)

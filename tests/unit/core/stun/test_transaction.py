"""Requests that wait for answers (docs/protocol/data-plane.md, 3.4)."""

from __future__ import annotations

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun.message import Method
from firezone_tunnel.core.stun.transaction import BACKOFF, Transaction, Transactions

_SERVER = SocketAddress("192.0.2.1", 3478)


def test_four_transmissions_fill_eight_seconds() -> None:
    transactions, request = Transactions[Transaction](), _request()
    now, sent_at = 0.0, []
    while not request.is_exhausted:
        transactions.sent(request, b"same id", now)
        sent_at.append(now)
        now = transactions.next_due() or 0.0

    assert (sent_at, now) == ([0.0, 1.0, 2.5, 4.75], 8.125)


def test_a_late_transmission_delays_the_next_by_as_much() -> None:
    transactions, request = Transactions[Transaction](), _request()
    transactions.sent(request, b"1", 0.0)
    transactions.sent(request, b"2", 100.0)

    assert transactions.due(101.4) == []
    assert transactions.due(101.5) == [request]


def test_an_answer_to_any_transmission_belongs_to_the_request_until_it_is_finished() -> None:
    transactions, request, other = Transactions[Transaction](), _request(), _request()
    transactions.sent(request, b"1", 0.0)
    transactions.sent(request, b"2", 1.0)
    transactions.sent(other, b"3", 1.0)
    assert transactions.waiting_for(b"1") is transactions.waiting_for(b"2") is request
    assert request.latest_id == b"2"
    transactions.finish(request)

    assert transactions.waiting_for(b"1") is transactions.waiting_for(b"2") is None
    assert transactions.waiting_for(b"3") is other
    assert list(transactions) == [other]
    assert request not in transactions


def test_a_request_that_starts_over_has_all_its_transmissions_again() -> None:
    transactions, request = Transactions[Transaction](), _request()
    for number in range(len(BACKOFF)):
        transactions.sent(request, bytes([number]), 0.0)
    assert request.is_exhausted
    request.start_over()
    transactions.sent(request, b"again", 10.0)

    assert transactions.next_due() == 11.0
    assert not request.is_exhausted


def test_finishing_twice_does_no_harm() -> None:
    transactions, request = Transactions[Transaction](), _request()
    transactions.sent(request, b"1", 0.0)
    transactions.finish(request)
    transactions.finish(request)

    assert len(transactions) == 0
    assert transactions.next_due() is None


def _request() -> Transaction:
    return Transaction(Method.ALLOCATE, _SERVER, ())

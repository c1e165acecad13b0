"""The queue between two services."""

from __future__ import annotations

from twisted.internet.task import Clock

from firezone_tunnel.shell.reactor.queues import BoundedQueue


def test_nothing_is_delivered_in_the_turn_in_which_it_was_put() -> None:
    clock, got, queue = _queue()

    queue.put(1)

    assert got == []
    clock.advance(0)
    assert got == [1]


def test_order_is_kept_and_each_turn_delivers_one_item() -> None:
    clock, got, queue = _queue()
    for number in range(3):
        queue.put(number)

    for turn in range(3):
        _turn(clock)
        assert got == list(range(turn + 1))
    assert len(queue) == 0
    assert clock.getDelayedCalls() == []


def test_a_full_queue_takes_nothing_more_and_says_so() -> None:
    clock, got, queue = _queue(capacity=2)

    assert [queue.put(number) for number in range(4)] == [True, True, False, False]
    assert (len(queue), queue.refused) == (2, 2)
    clock.advance(0)
    assert got == [0, 1]
    assert queue.put(9) is True

    clock.advance(0)
    assert got == [0, 1, 9]


def test_an_item_put_during_a_delivery_comes_in_a_later_turn() -> None:
    clock = Clock()
    got: list[int] = []

    def consume(number: int) -> None:
        got.append(number)
        if number < 3:
            queue.put(number + 1)

    queue: BoundedQueue[int] = BoundedQueue(clock, 10, consume)
    queue.put(1)
    for turn in range(1, 4):
        _turn(clock)
        assert got == list(range(1, turn + 1))


def test_an_item_that_its_consumer_fails_on_does_not_hold_up_the_next() -> None:
    clock = Clock()
    got: list[int] = []

    def consume(number: int) -> None:
        if number == 0:
            raise ZeroDivisionError
        got.append(number)

    queue: BoundedQueue[int] = BoundedQueue(clock, 10, consume)
    queue.put(0)
    queue.put(1)
    for _ in range(2):
        try:
            clock.advance(0)
        except ZeroDivisionError:
            continue  # a reactor would log it and go on

    assert got == [1]


def test_closing_drops_waiting_items() -> None:
    clock, got, queue = _queue()
    queue.put(1)

    queue.close()
    clock.advance(0)

    assert got == []
    assert clock.getDelayedCalls() == []


def _turn(clock: Clock) -> None:
    """Run one turn of a reactor: calls scheduled in it run in the next. `advance(0)` would run them as well."""
    for call in list(clock.calls):
        clock.calls.remove(call)
        call.called = 1
        call.func(*call.args, **call.kw)


def _queue(capacity: int = 10) -> tuple[Clock, list[int], BoundedQueue[int]]:
    clock = Clock()
    got: list[int] = []
    return clock, got, BoundedQueue(clock, capacity, got.append)

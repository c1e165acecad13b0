"""The queue between two services."""

from __future__ import annotations

from firezone_tunnel.shell.reactor.queues import BoundedQueue
from tests.unit.shell.reactor.turns import Turns


def test_nothing_is_delivered_in_the_turn_in_which_it_was_put() -> None:
    turns, got, queue = _queue()

    queue.put(1)

    assert got == []
    turns.run()
    assert got == [1]


def test_order_is_kept_and_each_turn_delivers_one_item() -> None:
    turns, got, queue = _queue()
    for number in range(3):
        queue.put(number)

    for turn in range(3):
        turns.run()
        assert got == list(range(turn + 1))
    assert len(queue) == 0
    turns.run()
    assert got == [0, 1, 2]


def test_a_full_queue_takes_nothing_more_and_says_so() -> None:
    turns, got, queue = _queue(capacity=2)

    assert [queue.put(number) for number in range(4)] == [True, True, False, False]
    assert (len(queue), queue.refused) == (2, 2)
    turns.run()
    turns.run()
    assert got == [0, 1]
    assert queue.put(9) is True

    turns.run()
    assert got == [0, 1, 9]


def test_an_item_put_during_a_delivery_comes_in_a_later_turn() -> None:
    turns = Turns()
    got: list[int] = []

    def consume(number: int) -> None:
        got.append(number)
        if number < 3:
            queue.put(number + 1)

    queue: BoundedQueue[int] = BoundedQueue(turns, 10, consume)
    queue.put(1)
    for turn in range(1, 4):
        turns.run()
        assert got == list(range(1, turn + 1))


def test_an_item_that_its_consumer_fails_on_does_not_hold_up_the_next() -> None:
    turns = Turns()
    got: list[int] = []

    def consume(number: int) -> None:
        if number == 0:
            raise ZeroDivisionError
        got.append(number)

    queue: BoundedQueue[int] = BoundedQueue(turns, 10, consume)
    queue.put(0)
    queue.put(1)
    for _ in range(2):
        turns.run()

    assert got == [1]


def test_closing_drops_waiting_items() -> None:
    turns, got, queue = _queue()
    queue.put(1)

    queue.close()
    turns.run()

    assert got == []
    assert turns.readers == []


def _queue(capacity: int = 10) -> tuple[Turns, list[int], BoundedQueue[int]]:
    turns = Turns()
    got: list[int] = []
    return turns, got, BoundedQueue(turns, capacity, got.append)

"""The thread for blocking calls."""

from __future__ import annotations

import threading

import pytest
import pytest_twisted

from firezone_tunnel.shell.host.worker_thread import WorkerThread


@pytest_twisted.ensureDeferred
async def test_calls_run_in_one_thread_one_after_another() -> None:
    from twisted.internet import reactor

    worker = WorkerThread(reactor)
    order: list[int] = []

    def work(number: int) -> int:
        order.append(number)
        return threading.get_ident()

    threads = [await deferred for deferred in [worker.call(work, number) for number in range(5)]]
    await worker.stop()

    assert order == [0, 1, 2, 3, 4]
    assert len(dict.fromkeys(threads)) == 1
    assert threads[0] != threading.get_ident()


@pytest_twisted.ensureDeferred
async def test_exceptions_of_a_call_reach_the_caller() -> None:
    from twisted.internet import reactor

    worker = WorkerThread(reactor)

    with pytest.raises(ValueError, match="wrong"):
        await worker.call(int, "wrong")
    await worker.stop()


@pytest_twisted.ensureDeferred
async def test_stopping_waits_for_requested_calls_and_ends_the_thread() -> None:
    from twisted.internet import reactor

    worker = WorkerThread(reactor, name="fz-worker-test")
    done: list[str] = []
    worker.call(done.append, "work")

    await worker.stop()
    await worker.stop()

    assert done == ["work"]
    assert not [thread for thread in threading.enumerate() if "fz-worker-test" in thread.name]

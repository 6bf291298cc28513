"""Requests queue; a thread that would wait for itself is told so."""

from __future__ import annotations

import threading

import pytest

from lrs_edge.errors import UsageError
from lrs_edge.queueing import RequestQueue


def test_requests_of_other_threads_wait_their_turn() -> None:
    queue, order = RequestQueue(), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with queue.turn():
            inside.set()
            leave.wait(5)
            order.append("first")

    def second() -> None:
        with queue.turn():
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second"]


def test_a_thread_cannot_wait_for_itself() -> None:
    queue = RequestQueue()
    with queue.turn(), pytest.raises(UsageError, match="still streams"), queue.turn():
        pass
    with queue.turn():
        assert queue.is_mine
    assert not queue.is_mine

"""The queue and its tickets, without an engine: whichever thread submits, reads or cancels."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from lrs_edge.answer.answer import Progress
from lrs_edge.errors import CancelledError, QueueFullError, UsageError
from lrs_edge.requests.queue import RequestQueue
from lrs_edge.requests.stream import AnswerStream
from lrs_edge.requests.ticket import Ticket, Work

LONG = 20.0


class Gate:
    """Work that tells "a", waits to be let through, tells "b", and returns "ab"."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.ended = threading.Event()
        self.given_up = False

    def __call__(self, ticket: Ticket[str, str]) -> str:
        try:
            ticket.tell("a")
            self.entered.set()
            while not self.leave.wait(0.01):
                if ticket.is_given_up:
                    self.given_up = True
                    raise CancelledError("stopped")
            ticket.tell("b")
            return "ab"
        finally:
            self.ended.set()


def work(run: Callable[[Ticket[str, str]], str], deadline: float | None = None) -> Work[str, str]:
    return Work(run, lambda: "late", deadline)


def read(ticket: Ticket[str, str]) -> str:
    pieces = []
    while True:
        piece = ticket.poll()
        if piece is not None:
            pieces.append(piece)
        elif ticket.is_over:
            assert "".join(pieces) in ("ab", "")
            return ticket.result()
        else:
            ticket.wait()


def stream_of(ticket: Ticket[str, str], on_progress: object = None) -> AnswerStream:
    return AnswerStream(ticket, on_progress)  # type: ignore[arg-type]


def test_requests_are_answered_in_order_and_one_at_a_time() -> None:
    queue, order, inside = RequestQueue(), [], []

    def run(number: int) -> Callable[[Ticket[str, str]], str]:
        def do(_: Ticket[str, str]) -> str:
            inside.append(number)
            assert len(inside) == 1
            order.append(number)
            inside.remove(number)
            return str(number)

        return do

    first = Gate()
    tickets = [queue.submit(work(first)), *(queue.submit(work(run(n))) for n in range(20))]
    first.leave.set()
    assert [read(ticket) for ticket in tickets] == ["ab", *map(str, range(20))]
    assert order == list(range(20))


def test_an_idle_queue_has_no_thread() -> None:
    queue, gate = RequestQueue(), Gate()
    ticket = queue.submit(work(gate))
    gate.leave.set()
    assert read(ticket) == "ab"
    queue.close()
    assert not [t for t in threading.enumerate() if t.name == "lrs-edge-worker"]
    with pytest.raises(UsageError, match="closed"):
        queue.submit(work(gate))


def test_a_reader_that_never_reads_holds_nobody_up() -> None:
    queue, gate = RequestQueue(), Gate()
    gate.leave.set()
    unread = queue.submit(work(gate))
    assert read(queue.submit(work(gate))) == "ab"
    assert read(unread) == "ab"


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    queue, gate = RequestQueue(max_waiting=2), Gate()
    tickets = [queue.submit(work(gate)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="questions wait already"):
        queue.submit(work(gate))
    tickets[1].cancel("not wanted")
    tickets[1] = queue.submit(work(gate))
    gate.leave.set()
    assert [read(ticket) for ticket in tickets] == ["ab"] * 3
    assert read(queue.submit(work(gate))) == "ab"


def test_one_may_be_under_way_where_none_may_wait() -> None:
    queue, gate = RequestQueue(max_waiting=0), Gate()
    ticket = queue.submit(work(gate))
    with pytest.raises(QueueFullError):
        queue.submit(work(gate))
    gate.leave.set()
    assert read(ticket) == "ab"


def test_errors_reach_the_reader_and_not_the_next_request() -> None:
    queue, gate = RequestQueue(), Gate()

    def fail(ticket: Ticket[str, str]) -> str:
        ticket.tell("a")
        raise ZeroDivisionError("broken")

    bad, good = queue.submit(work(fail)), queue.submit(work(gate))
    gate.leave.set()
    assert bad.poll() in ("a", None)
    with pytest.raises(ZeroDivisionError, match="broken"):
        read(bad)
    assert read(good) == "ab"


def test_what_a_failed_request_held_is_freed() -> None:
    queue = RequestQueue()

    class Large:
        pass

    held: list[weakref.ref[Large]] = []

    def fail(_: Ticket[str, str]) -> str:
        large = Large()
        held.append(weakref.ref(large))
        raise ZeroDivisionError

    ticket = queue.submit(work(fail))
    with pytest.raises(ZeroDivisionError):
        read(ticket)
    queue.close()
    assert held[0]() is None


def test_a_waiting_request_ends_at_its_deadline_while_another_runs() -> None:
    queue, gate = RequestQueue(), Gate()
    busy = queue.submit(work(gate))
    waits = queue.submit(work(gate, time.monotonic() + 0.05))
    assert read(waits) == "late"
    gate.leave.set()
    assert read(busy) == "ab"


def test_the_worker_does_not_begin_what_is_too_late() -> None:
    queue, gate = RequestQueue(), Gate()
    gate.leave.set()
    assert read(queue.submit(work(gate, time.monotonic() - 1))) == "late"
    assert not gate.entered.is_set()


def test_streams_are_read_and_closed_in_other_threads() -> None:
    queue, gate = RequestQueue(), Gate()
    stream = stream_of(queue.submit(work(gate)))
    assert gate.entered.wait(LONG)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(LONG)
    reader.join(LONG)
    assert not reader.is_alive()
    assert found in (["a"], [])
    assert gate.ended.wait(LONG)
    assert gate.given_up
    with pytest.raises(UsageError, match="not finished"):
        _ = stream.answer


def test_pieces_are_shared_between_readers() -> None:
    queue, gate = RequestQueue(), Gate()
    stream, found = stream_of(queue.submit(work(gate))), []
    readers = [threading.Thread(target=lambda: found.extend(stream)) for _ in range(4)]
    for reader in readers:
        reader.start()
    gate.leave.set()
    for reader in readers:
        reader.join(LONG)
    assert sorted(found) == ["a", "b"]
    assert stream.answer == "ab"


def test_a_stream_nobody_holds_is_given_up() -> None:
    queue, gate = RequestQueue(), Gate()
    stream = stream_of(queue.submit(work(gate)))
    assert next(stream) == "a"
    del stream
    gc.collect()
    assert gate.ended.wait(LONG)
    assert gate.given_up


def test_an_owner_closes_its_own_only() -> None:
    queue, mine, others = RequestQueue(), Gate(), Gate()
    one, two = object(), object()
    running = queue.submit(work(mine), one)
    waiting = queue.submit(work(mine), one)
    other = queue.submit(work(others), two)
    queue.cancel(one, "the scene was closed")
    assert mine.ended.is_set() or not mine.entered.is_set()
    for ticket in (running, waiting):
        with pytest.raises(CancelledError, match="closed"):
            read(ticket)
    others.leave.set()
    assert read(other) == "ab"


def progress() -> Progress:
    return Progress("encode", None, 1, 1, 1, 1)


def test_progress_is_told_by_the_reader() -> None:
    queue, where = RequestQueue(), []

    def run(ticket: Ticket[object, str]) -> str:
        for event in ("a", progress(), "b"):
            ticket.tell(event)
        return "ab"

    ticket = queue.submit(Work(run, lambda: "late"))
    stream = stream_of(ticket, lambda _: where.append(threading.get_ident()))  # type: ignore[arg-type]
    assert list(stream) == ["a", "b"]
    assert where == [threading.get_ident()]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_or_interrupt_while_reading_gives_the_question_up(
    error: type[BaseException],
) -> None:
    queue, ended = RequestQueue(), threading.Event()

    def run(ticket: Ticket[object, str]) -> str:
        try:
            ticket.tell(progress())
            deadline = time.monotonic() + LONG
            while not ticket.is_given_up and time.monotonic() < deadline:
                ended.wait(0.01)
            assert ticket.is_given_up
            return "ab"
        finally:
            ended.set()

    def fail(_: Progress) -> None:
        raise error

    stream = stream_of(queue.submit(Work(run, lambda: "late")), fail)  # type: ignore[arg-type]
    with pytest.raises(error):
        next(stream)
    assert ended.wait(LONG)


def test_an_event_loop_reads_without_a_thread() -> None:
    queue, gate = RequestQueue(), Gate()

    async def main() -> list[str]:
        streams = [stream_of(queue.submit(work(gate))) for _ in range(12)]
        before = threading.active_count()

        async def one(stream: AnswerStream) -> str:
            text = ""
            async for piece in stream:
                text += piece
                gate.leave.set()
            return text

        found = await asyncio.gather(*map(one, streams))
        assert threading.active_count() <= before
        return found

    assert asyncio.run(main()) == ["ab"] * 12


def test_pieces_are_taken_in_threads_of_an_event_loop() -> None:
    queue, gate = RequestQueue(), Gate()
    gate.leave.set()

    async def one(stream: AnswerStream) -> str:
        text = ""
        while (piece := await asyncio.to_thread(next, stream, None)) is not None:
            text += piece
        return text

    async def main() -> list[str]:
        return await asyncio.gather(*(one(stream_of(queue.submit(work(gate)))) for _ in range(12)))

    assert asyncio.run(main()) == ["ab"] * 12


def test_a_wait_that_times_out_leaves_the_stream_usable() -> None:
    queue, gate = RequestQueue(), Gate()

    async def main() -> list[str]:
        stream = stream_of(queue.submit(work(gate)))
        found = [await anext(stream)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        gate.leave.set()
        return [*found, *[piece async for piece in stream]]

    assert asyncio.run(main()) == ["a", "b"]


def test_a_loop_that_ended_does_not_harm_the_worker() -> None:
    queue, gate = RequestQueue(), Gate()

    async def main() -> AnswerStream:
        stream = stream_of(queue.submit(work(gate)))
        assert await anext(stream) == "a"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        return stream

    stream = asyncio.run(main())
    gate.leave.set()
    assert list(stream) == ["b"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_instead_of_hanging() -> None:
    script = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from tests.test_requests import Gate, RequestQueue, UsageError, CancelledError, work
queue, gate = RequestQueue(), Gate()
ticket = queue.submit(work(gate))
gate.entered.wait(20)
child = os.fork()
if child == 0:
    told = 0
    try:
        queue.submit(work(gate))
    except UsageError as error:
        told += "fork" in str(error)
    try:
        ticket.poll()
    except CancelledError as error:
        told += "fork" in str(error)
    queue.close()
    os._exit(7 if told == 2 else 1)
_, status = os.waitpid(child, 0)
gate.leave.set()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 7


def test_a_program_that_ends_does_not_wait_for_what_nobody_reads() -> None:
    script = """
from tests.test_requests import Gate, RequestQueue, stream_of, work
queue, gate = RequestQueue(), Gate()
stream = stream_of(queue.submit(work(gate)))
assert next(stream) == "a"
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert ended.returncode == 0


def test_threads_of_a_program_whose_main_thread_ended_are_answered() -> None:
    script = """
import threading
from tests.test_requests import Gate, RequestQueue, read, work
queue, gate = RequestQueue(), Gate()
gate.leave.set()
def ask():
    threading.main_thread().join()
    print(read(queue.submit(work(gate))))
threading.Thread(target=ask).start()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], timeout=60, check=False, capture_output=True, text=True
    )
    assert ended.stdout == "ab\n"

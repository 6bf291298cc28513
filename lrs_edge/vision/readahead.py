"""Reading the next items in threads while the caller works on the last one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def reading_ahead(
    read: Callable[[Item], Result],
    items: Sequence[Item],
    ahead: int,
    given_up: threading.Event | None = None,
    threads: int = 1,
) -> Iterator[Iterator[Result]]:
    """Results of `read` for the items, in their order, from threads of its own.

    The threads are gone when the block ends, however it ends: an item that is being read is waited
    for, later ones are given up. What `read` raises comes out of the iterator. A single item is
    read by the caller, for nothing could be done meanwhile.

    Args:
        read: Called with each item.
        items: What to read.
        ahead: Results held at most that the caller has not taken, at least 1.
        given_up: Set when the block ends, so that items that are being read can end early.
        threads: Items read at once.
    """
    if len(items) < 2:
        yield map(read, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lrs-edge-read")
    try:
        yield _results(pool, read, items, ahead)
    finally:
        if given_up is not None:
            given_up.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _results(
    pool: ThreadPoolExecutor, read: Callable[[Item], Result], items: Sequence[Item], ahead: int
) -> Iterator[Result]:
    rest = iter(items)
    waiting: deque[Future[Result]] = deque(
        _submit(pool, read, item) for item in islice(rest, ahead)
    )
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(_submit(pool, read, item) for item in islice(rest, 1))
        yield result


def _submit(pool: ThreadPoolExecutor, read: Callable[[Item], Result], item: Item) -> Future[Result]:
    try:
        return pool.submit(read, item)
    except RuntimeError:
        # The program's main thread has ended, and pools take no more work; other threads may still
        # wait for answers.
        future: Future[Result] = Future()
        try:
            future.set_result(read(item))
        except Exception as error:
            future.set_exception(error)
        return future

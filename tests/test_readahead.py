"""Reading in a thread: order, bounds, errors, and that no thread is left."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.vision.readahead import reading_ahead


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lrs-edge-read")]


@settings(deadline=None)
@given(st.lists(st.integers()), st.integers(1, 5), st.integers(0, 30))
def test_results_come_in_order_from_several_threads(
    items: list[int], threads: int, taken: int
) -> None:
    found = []
    with reading_ahead(str, items, 2 * threads, threads=threads) as results:
        for result in results:
            found.append(result)
            if len(found) > taken:
                break
    assert found == [str(item) for item in items][: taken + 1]
    assert not readers()


@settings(deadline=None)
@given(st.lists(st.integers()), st.integers(1, 5), st.integers(0, 30))
def test_results_come_in_order_and_never_too_many(items: list[int], ahead: int, taken: int) -> None:
    started: list[int] = []

    def read(item: int) -> int:
        started.append(item)
        return item + 1

    found = []
    with reading_ahead(read, items, ahead) as results:
        for result in results:
            found.append(result)
            assert len(started) <= len(found) + ahead
            if len(found) > taken:
                break
    assert found == [item + 1 for item in items][: taken + 1]
    assert started == items[: len(started)]
    assert not readers()


def test_an_error_reaches_the_caller_in_its_turn() -> None:
    def read(item: int) -> int:
        return 10 // item

    with reading_ahead(read, [5, 2, 0, 1], 2) as results:
        assert [next(results), next(results)] == [2, 5]
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert not readers()


def test_an_error_of_the_caller_ends_the_thread() -> None:
    def stop_early() -> None:
        with reading_ahead(str, range(100), 3) as results:
            next(results)
            raise KeyError

    with pytest.raises(KeyError):
        stop_early()
    assert not readers()


def test_reads_happen_while_the_caller_works() -> None:
    reached = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            reached.set()
        return item

    with reading_ahead(read, [0, 1], 1) as results:
        assert next(results) == 0
        # Nobody asks for the second item, and yet it is read.
        assert reached.wait(10)


def test_items_are_read_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def read(item: int) -> int:
        together.wait()
        return item

    with reading_ahead(read, [0, 1, 2], 3, threads=3) as results:
        assert list(results) == [0, 1, 2]

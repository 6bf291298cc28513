"""Rows of tables are the arrays that they stand for, on the host and in an engine's memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.bundle.bundle import default_bundle_path
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.rows import (
    UNKNOWN,
    Rows,
    block_sources,
    joined,
    new_block,
    newline_sources,
    sources_of,
    text_sources,
)

WIDTH = 3

#: Parts of a sequence: rows of their table, and which of them are taken.
parts = st.lists(
    st.integers(1, 6).flatmap(
        lambda count: st.tuples(st.just(count), st.lists(st.integers(0, count - 1), max_size=8))
    ),
    min_size=1,
    max_size=5,
)


def taken(asked: list[tuple[int, list[int]]]) -> tuple[Rows, np.ndarray]:
    """Rows of tables of their own, every other part an array, and the same as one array."""
    rng = np.random.default_rng(0)
    found, arrays = [], []
    for number, (count, places) in enumerate(asked):
        table = rng.standard_normal((count, WIDTH)).astype(np.float32)
        chosen = np.array(places, np.int64)
        arrays.append(table[chosen])
        found.append(table[chosen] if number % 2 else Rows.of(table)[chosen])
    whole = joined(found)
    assert isinstance(whole, Rows)
    return whole, np.concatenate(arrays)


@settings(deadline=None)
@given(parts, st.data())
def test_rows_are_the_arrays_that_they_stand_for(
    asked: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    rows, wanted = taken(asked)
    assert rows.shape == wanted.shape
    np.testing.assert_array_equal(rows, wanted)
    twice = joined([rows, rows[::-1]])
    np.testing.assert_array_equal(twice, np.concatenate([wanted, wanted[::-1]]))
    start = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(start, len(rows)))
    np.testing.assert_array_equal(twice[start:end], wanted[start:end])
    if len(rows):
        places = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))), np.int64)
        np.testing.assert_array_equal(rows[places], wanted[places])


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    path = default_bundle_path() / "llm_segment0.onnx"
    return OnnxGraph.load(path, BackendOptions("cpu", threads=1))


@settings(deadline=None, max_examples=40)
@given(parts.filter(lambda asked: any(places for _, places in asked)))
def test_an_engine_gathers_the_same_numbers(
    graph: OnnxGraph, asked: list[tuple[int, list[int]]]
) -> None:
    rows, wanted = taken(asked)
    tables, places = rows._touched()
    found = graph.gather_rows([table.numpy() for table in tables], places)
    assert found.shape == (1, *wanted.shape)
    np.testing.assert_array_equal(found.numpy()[0], wanted)


def test_sources_tell_everything_apart() -> None:
    """Tokens of text, the newline, tiles: what must not be recognised equals nothing."""
    blocks = [block_sources(new_block(), 1024) for _ in range(3)]
    every = [*blocks, text_sources(np.arange(200_000)), newline_sources(), np.array([UNKNOWN])]
    assert len(np.unique(np.concatenate(every))) == sum(map(len, every))
    assert (text_sources(np.array([7, 7])) == text_sources(np.array([7]))).all()
    assert (sources_of(np.zeros((2, WIDTH), np.float32)) == UNKNOWN).all()


def test_arrays_stay_arrays() -> None:
    """Whoever builds sequences of other things than embeddings gets them back as they were."""
    numbers = joined([np.array([[1, 2]]), np.array([[3, 4]])])  # type: ignore[list-item]
    assert isinstance(numbers, np.ndarray)
    assert numbers.dtype == np.int64

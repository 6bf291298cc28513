"""Weights as graphs' writers get them: a matrix whole, or some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from lrs_edge_export.checkpoints.tensors import Array


@runtime_checkable
class RowSource(Protocol):
    """A matrix [N, K] that can be read some rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        ...

    def chunks(self, rows: int) -> Iterator[Array]:
        """All rows in order, float32 [at most `rows`, K] at a time."""
        ...


#: Gives a weight whole, or row by row.
Load = Callable[[], Array] | RowSource


class Whole:
    """A matrix in memory as a `RowSource`."""

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, cols = self._array.shape
        return rows, cols

    def chunks(self, rows: int) -> Iterator[Array]:
        """All rows, as views of it."""
        for start in range(0, len(self._array), rows):
            yield self._array[start : start + rows]

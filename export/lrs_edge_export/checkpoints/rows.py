"""Tables on disk, of which some rows are read at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array, Scoped


class Rows:
    """The first rows of a table on disk: all of them when called, or some, or chunk by chunk.

    Args:
        tensors: Where the table is.
        name: Of the table, [at least count, width].
        count: Rows.
        width: Values in a row.
    """

    def __init__(self, tensors: Scoped, name: str, count: int, width: int) -> None:
        self._tensors = tensors
        self._name = name
        self.shape: tuple[int, int] = (count, width)

    def __call__(self) -> Array:
        """All rows, float32 [count, width]."""
        return self._tensors.rows(self._name, 0, self.shape[0])

    def __getitem__(self, places: Sequence[int]) -> Array:
        """The rows at some places, float32 [len(places), width], each read by itself."""
        found = np.empty((len(places), self.shape[1]), np.float32)
        for row, place in zip(found, places, strict=True):
            if not 0 <= place < self.shape[0]:
                raise IndexError(f"{self._name} has no row {place}, it has {self.shape[0]}")
            row[:] = self._tensors.rows(self._name, place, place + 1)[0]
        return found

    def chunks(self, size: int) -> Iterator[Array]:
        """All rows in their order, float32 [at most size, width] at a time."""
        for start in range(0, self.shape[0], size):
            yield self._tensors.rows(self._name, start, min(start + size, self.shape[0]))


def first_rows(tensors: Scoped, name: str, rows: int, width: int) -> Rows:
    """The first `rows` rows of a table [at least rows, width].

    Raises:
        ExportError: The table is missing, shorter, or of another width.
    """
    if not tensors.has(name):
        tensors.require({name: (rows, width)}, "vocabulary")
    shape = tensors.shape(name)
    if len(shape) != 2 or shape[0] < rows or shape[1] != width:
        raise ExportError(
            f"{tensors.prefix}{name} has shape {list(shape)}, tokenizer and config.json ask for at "
            f"least [{rows}, {width}]; they do not belong to these weights"
        )
    return Rows(tensors, name, rows, width)

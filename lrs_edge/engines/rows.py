"""Embeddings by where they come from, gathered where a graph needs them.

A sequence is built many times over (every level, every question), and its embeddings lie where they
were computed, maybe on a device. So what is built is an index: which tables, which of their rows.
The numbers are put together when a graph runs over them (`Rows.on`), on the device of that graph.

Of each row its source is known: a tile's token by the tile and its place there, text by its token
id. Two rows of one source hold the same numbers, so key/value caches recognise tokens by it
(`lrs_edge.language.kv_cache`) and nobody has to look at the numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, Graph, on_host

#: Where embeddings come from, uint64 [n].
Sources: TypeAlias = NDArray[np.uint64]

#: Source of an embedding that must never be recognised.
UNKNOWN = np.uint64(0)

_TEXT, _NEWLINE = 1 << 63, 1 << 62

#: Rows of one block at most; its number is in the bits above.
_BLOCK_BITS = 24

_blocks = itertools.count(1)


def new_block() -> int:
    """A number that stands for embeddings computed together, such as a tile's; never used twice."""
    return next(_blocks)


def block_sources(block: int, count: int) -> Sources:
    """Sources of the embeddings of a block, uint64 [count]."""
    return np.arange(count, dtype=np.uint64) + np.uint64(block << _BLOCK_BITS)


def text_sources(ids: NDArray[np.int64]) -> Sources:
    """Sources of the embeddings of token ids int64 [n]."""
    return ids.astype(np.uint64) | np.uint64(_TEXT)


def newline_sources() -> Sources:
    """Source of the embedding of an image's newline, uint64 [1]."""
    return np.array([_NEWLINE], np.uint64)


class Table:
    """Embeddings [m, D] that lie together: on the host, on a device, or, once needed, on both.

    Args:
        values: float32 [m, D], of the host or of an engine.
    """

    def __init__(self, values: Feed) -> None:
        self._values: dict[str, Feed] = {}
        self._home = "cpu" if isinstance(values, np.ndarray) else values.device
        self._values[self._home] = values
        self.shape: tuple[int, ...] = tuple(values.shape)

    def numpy(self) -> NDArray[np.float32]:
        """float32 [m, D] on the host; copied there once."""
        if "cpu" not in self._values:
            self._values["cpu"] = on_host(self._values[self._home])
        return on_host(self._values["cpu"])

    def on(self, graph: Graph) -> Feed:
        """float32 [m, D] on a graph's device; copied there once."""
        if graph.device not in self._values:
            self._values[graph.device] = graph.upload(self.numpy())
        return self._values[graph.device]


class Rows:
    """Embeddings [n, D]: rows of tables.

    Args:
        tables: float32 [m, D] each.
        places: int64 [n], rows of all tables laid end to end.
        sources: uint64 [n].
        width: D.
    """

    def __init__(
        self, tables: tuple[Table, ...], places: NDArray[np.int64], sources: Sources, width: int
    ) -> None:
        self._tables = tables
        self._places = places
        self.sources = sources
        self._width = width

    @classmethod
    def of(cls, values: Feed, sources: Sources | None = None) -> Rows:
        """All rows of one table.

        Args:
            values: float32 [m, D], of the host or of an engine.
            sources: uint64 [m]; None where they must not be recognised.
        """
        count, width = values.shape
        known = np.full(count, UNKNOWN, np.uint64) if sources is None else sources
        return cls((Table(values),), np.arange(count, dtype=np.int64), known, width)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows n and their width D."""
        return len(self._places), self._width

    def __getitem__(self, places: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Rows:
        """Some of the rows; nothing is copied."""
        return Rows(self._tables, self._places[places], self.sources[places], self._width)

    def numpy(self) -> NDArray[np.float32]:
        """float32 [n, D] on the host; may be a table itself, so not to be written to."""
        tables, places = self._touched()
        if len(tables) == 1:
            return _taken(tables[0].numpy(), places)
        found = np.empty(self.shape, np.float32)
        starts = _starts(tables)
        owners = np.searchsorted(starts[1:], places, side="right")
        for number, table in enumerate(tables):
            at = np.flatnonzero(owners == number)
            found[at] = _taken(table.numpy(), places[at] - starts[number])
        return found

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        """See `numpy`, for whoever takes arrays."""
        found = self.numpy()
        if dtype is not None and dtype != found.dtype:
            return found.astype(dtype)
        return found.copy() if copy else found

    def on(self, graph: Graph) -> Feed:
        """float32 [1, n, D] on a graph's device, as graphs take embeddings."""
        if graph.device == "cpu":
            return self.numpy()[None]
        tables, places = self._touched()
        return graph.gather_rows([table.on(graph) for table in tables], places)

    def _touched(self) -> tuple[tuple[Table, ...], NDArray[np.int64]]:
        """The tables of which there are rows here, and the places in these."""
        if len(self._tables) < 2:
            return self._tables, self._places
        starts = _starts(self._tables)
        owners = np.searchsorted(starts[1:], self._places, side="right")
        used = np.unique(owners)
        if len(used) == len(self._tables):
            return self._tables, self._places
        tables = tuple(self._tables[number] for number in used)
        moved = np.zeros(len(self._tables), np.int64)
        moved[used] = _starts(tables)[:-1] - starts[used]
        return tables, self._places + moved[owners]


#: Embeddings float32 [n, D], with or without sources.
Embeds: TypeAlias = NDArray[np.float32] | Rows


def joined(parts: Sequence[Embeds]) -> Embeds:
    """Embeddings one after the other: an array where all are arrays, whatever is in them."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    rows = [part if isinstance(part, Rows) else Rows.of(part) for part in parts]
    tables: list[Table] = []
    numbers: dict[int, int] = {}
    starts, end, places = [], 0, []
    for part in rows:
        # Usually the same few tables, over and over.
        moved = []
        for table in part._tables:
            if id(table) not in numbers:
                numbers[id(table)] = len(tables)
                tables.append(table)
                starts.append(end)
                end += table.shape[0]
            moved.append(starts[numbers[id(table)]])
        own = _starts(part._tables)
        owners = np.searchsorted(own[1:], part._places, side="right")
        shift = np.array(moved, np.int64) - own[:-1]
        places.append(part._places + shift[owners] if len(shift) else part._places)
    return Rows(
        tuple(tables),
        np.concatenate(places),
        np.concatenate([part.sources for part in rows]),
        rows[0].shape[1],
    )


def sources_of(embeds: Embeds) -> Sources:
    """Where embeddings come from, uint64 [n]; `UNKNOWN` of an array's."""
    if isinstance(embeds, Rows):
        return embeds.sources
    return np.full(len(embeds), UNKNOWN, np.uint64)


def _starts(tables: Sequence[Table]) -> NDArray[np.int64]:
    """Where each table begins among all, and the end: int64 [tables + 1]."""
    return np.cumsum([0, *(table.shape[0] for table in tables)], dtype=np.int64)


def _taken(values: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows of a table: a view where they follow each other."""
    count = len(places)
    if count and places[-1] - places[0] == count - 1 and np.all(np.diff(places) == 1):
        return values[places[0] : places[0] + count]
    found: NDArray[np.float32] = values[places]
    return found

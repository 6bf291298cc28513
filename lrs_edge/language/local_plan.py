"""Where the local tokens of a level stand, without their embeddings: rows, or marked tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.layout import LocalRows
from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.pyramid.selection import grid_indices, newline_indices

#: Sources of a local token's embedding: a row of the tiles' features (0, 1, ...), the newline, or a
#: mark's text (-2 - number of the token among all marks).
_NEWLINE = -1

#: Places in the sequence of a whole level count so many for each marked tile, more than it has.
_TILE_STRIDE = 1 << 32


@dataclass(frozen=True)
class Plan:
    """Local tokens of a level without their embeddings.

    Attributes:
        tokens: With embeddings [n, 0].
        source: int64 [n], where each embedding comes from.
        marks: int64 [m], token ids of all marks.
    """

    tokens: LocalTokens
    source: NDArray[np.int64]
    marks: NDArray[np.int64]


def block(rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions int64 [3, n] in an image, from its first: time, row and column."""
    return np.stack([np.zeros_like(rows), rows, cols])


def as_image(tokens: LocalTokens, grid: TokenGrid, *, close_gaps: bool) -> LocalTokens:
    """Local tokens in rows at the positions of one image.

    Args:
        tokens: As `plan_rows` places them, without newlines.
        grid: The level's.
        close_gaps: Leave out rows and columns of tiles that are not shown.
    """
    rows, cols = tokens.cells // grid.width, tokens.cells % grid.width
    span = max(grid.rows, grid.cols)
    if close_gaps:
        rows, cols = (
            np.unique(rows, return_inverse=True)[1],
            np.unique(cols, return_inverse=True)[1],
        )
        span = int(max(rows.max(initial=-1), cols.max(initial=-1))) + 1
    return replace(tokens, offsets=block(rows, cols), span=span)


def plan_rows(
    part: LocalRows, grid: TokenGrid, tiles: tuple[TileIndex, ...], level: int, *, close_gaps: bool
) -> Plan:
    """Rows across all tiles of the level."""
    lines = newline_indices(grid) if part.newline else np.zeros(0, np.int64)
    if close_gaps and part.newline:
        tops = sorted({tile.row * grid.per_tile for tile in tiles})
        shown = [row for top in tops for row in range(top, min(top + grid.per_tile, grid.rows))]
        lines = lines[np.array(shown, np.int64)] if shown else lines[:0]
    indices, sources = [lines], [np.full(len(lines), _NEWLINE, np.int64)]
    rows, cols = [np.full(len(lines), -1, np.int64)], [np.full(len(lines), -1, np.int64)]
    for number, tile in enumerate(tiles):
        places, within = grid_indices(grid, tile)
        indices.append(places)
        sources.append(number * grid.per_tile**2 + within)
        rows.append(np.full(len(places), tile.row, np.int64))
        cols.append(np.full(len(places), tile.col, np.int64))
    joined = np.concatenate(indices)
    order = np.argsort(joined)
    joined = joined[order]
    # Without newlines, nothing stands in the column that the grid has for them.
    offsets = joined if part.newline else joined - joined // grid.width
    span = grid.count if part.newline else grid.rows * grid.cols
    tokens = LocalTokens(
        embeds=np.zeros((len(joined), 0), np.float32),
        indices=joined,
        cells=joined,
        offsets=np.arange(len(joined), dtype=np.int64) if close_gaps else offsets,
        span=len(joined) if close_gaps else span,
        tile_rows=np.concatenate(rows)[order],
        tile_cols=np.concatenate(cols)[order],
        hidden=np.zeros(len(joined), bool),
        level=level,
    )
    return Plan(tokens, np.concatenate(sources)[order], np.zeros(0, np.int64))


class TilePieces:
    """Marked tiles, added one after the other in row-major order.

    Args:
        grid: The level's token grid.
        axes: Positions k of a token.
    """

    def __init__(self, grid: TokenGrid, axes: int) -> None:
        self._grid = grid
        self._axes = axes
        empty = np.zeros(0, np.int64)
        self._marks, self._cells, self._sources, self._indices = [empty], [empty], [empty], [empty]
        self._owners = [np.zeros((2, 0), np.int64)]
        shape: tuple[int, ...] = (0,) if axes == 1 else (axes, 0)
        self._offsets = [np.zeros(shape, np.int64)]
        self._taken = self._span = 0

    def add_tile(
        self, tile: TileIndex, place: int, before: NDArray[np.int64], after: NDArray[np.int64]
    ) -> None:
        """Add a tile between two marks.

        Args:
            tile: The tile.
            place: Which of all features are its.
            before: Token ids int64 [b] of the mark before it.
            after: The same after it, int64 [a].
        """
        grid = self._grid
        inside, within = grid_indices(grid, tile)
        first = (tile.row * grid.tile_cols + tile.col) * _TILE_STRIDE
        self._text(before, first, tile.row, tile.col)
        start = first + len(before)
        rows, cols = within // grid.per_tile, within % grid.per_tile
        shown = np.arange(len(inside), dtype=np.int64) if self._axes == 1 else block(rows, cols)
        self._add(start, place * grid.per_tile**2 + within, inside, tile.row, tile.col, shown)
        self._text(after, start + len(inside), tile.row, tile.col)

    def add_row(self, row: int, text: NDArray[np.int64]) -> None:
        """Add the text before a row of tiles, token ids int64 [n]."""
        first = row * self._grid.tile_cols * _TILE_STRIDE
        self._text(text, first - len(text), row, -1)

    def plan(self, level: int) -> Plan:
        """All that was added."""
        joined, (rows, cols) = np.concatenate(self._indices), np.concatenate(self._owners, axis=1)
        tokens = LocalTokens(
            embeds=np.zeros((len(joined), 0), np.float32),
            indices=joined,
            cells=np.concatenate(self._cells),
            offsets=np.concatenate(self._offsets, axis=-1),
            span=self._span,
            tile_rows=rows,
            tile_cols=cols,
            hidden=np.zeros(len(joined), bool),
            level=level,
        )
        return Plan(tokens, np.concatenate(self._sources), np.concatenate(self._marks))

    def _text(self, ids: NDArray[np.int64], first: int, row: int, col: int) -> None:
        places = np.arange(len(ids), dtype=np.int64)
        self._marks.append(ids)
        shown = places if self._axes == 1 else np.tile(places, (self._axes, 1))
        self._add(
            first, -2 - self._taken - places, np.full(len(ids), -1, np.int64), row, col, shown
        )
        self._taken += len(ids)

    def _add(
        self,
        first: int,
        sources: NDArray[np.int64],
        cells: NDArray[np.int64],
        row: int,
        col: int,
        offsets: NDArray[np.int64],
    ) -> None:
        """Tokens at consecutive places from `first`, at positions from the end of the last ones."""
        self._indices.append(first + np.arange(len(sources), dtype=np.int64))
        self._sources.append(sources)
        self._cells.append(cells)
        self._owners.append(np.tile(np.array([[row], [col]], np.int64), len(sources)))
        self._offsets.append(self._span + offsets)
        self._span += int(offsets.max(initial=-1)) + 1


def framed(
    plan: Plan, before: NDArray[np.int64], after: NDArray[np.int64], last: int = 1 << 62
) -> Plan:
    """Local tokens between two texts.

    Args:
        plan: With tokens.
        before: Token ids int64 [b].
        after: Token ids int64 [a].
        last: More than any place in the sequence of the whole level.
    """
    inner, first = plan.tokens, len(before)
    marks = len(plan.marks)

    def around(
        inside: NDArray[np.int64], start: NDArray[np.int64] | int, end: NDArray[np.int64] | int
    ) -> NDArray[np.int64]:
        shape = (*inside.shape[:-1], first), (*inside.shape[:-1], len(after))
        left, right = np.broadcast_to(start, shape[0]), np.broadcast_to(end, shape[1])
        return np.concatenate([left, inside, right], axis=-1)

    heads, tails = np.arange(first), np.arange(len(after))
    tokens = replace(
        inner,
        embeds=np.zeros((first + len(inner) + len(after), 0), np.float32),
        indices=around(first + inner.indices, heads, first + last + tails),
        cells=around(inner.cells, -1, -1),
        offsets=around(first + inner.offsets, heads, first + inner.span + tails),
        span=first + inner.span + len(after),
        tile_rows=around(inner.tile_rows, -1, -1),
        tile_cols=around(inner.tile_cols, -1, -1),
        hidden=around(inner.hidden.astype(np.int64), 0, 0).astype(bool),
    )
    source = around(plan.source, -2 - marks - heads, -2 - marks - first - tails)
    return Plan(tokens, source, np.concatenate([plan.marks, before, after]))

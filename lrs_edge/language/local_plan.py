"""Where the local tokens of a level stand, without their embeddings: rows across all tiles."""

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


def framed(
    plan: Plan, grid: TokenGrid, before: NDArray[np.int64], after: NDArray[np.int64]
) -> Plan:
    """Rows between two texts.

    Args:
        plan: Of `plan_rows`, with tokens.
        grid: The level's.
        before: Token ids int64 [b].
        after: Token ids int64 [a].
    """
    inner, first = plan.tokens, len(before)

    def around(inside: NDArray[np.int64], start: object, end: object) -> NDArray[np.int64]:
        shape = (*inside.shape[:-1], first), (*inside.shape[:-1], len(after))
        left, right = np.broadcast_to(start, shape[0]), np.broadcast_to(end, shape[1])
        return np.concatenate([left, inside, right], axis=-1)

    heads, tails = np.arange(first), np.arange(len(after))
    tokens = replace(
        inner,
        embeds=np.zeros((first + len(inner) + len(after), 0), np.float32),
        indices=around(first + inner.indices, heads, first + grid.count + tails),
        cells=around(inner.cells, -1, -1),
        offsets=around(first + inner.offsets, heads, first + inner.span + tails),
        span=first + inner.span + len(after),
        tile_rows=around(inner.tile_rows, -1, -1),
        tile_cols=around(inner.tile_cols, -1, -1),
        hidden=around(inner.hidden, False, False).astype(bool),
    )
    source = around(plan.source, -2 - heads, -2 - first - tails)
    return Plan(tokens, source, np.concatenate([before, after]))

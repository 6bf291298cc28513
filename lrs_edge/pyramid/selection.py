"""Which tokens are kept and which tiles of the next level are looked at. Pure numpy functions.

Local tokens of a level stand row-major on its unpadded token grid, every row ended by a newline
token; a token's *index* is its place in that sequence, whether or not all of it was computed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid

Indices = NDArray[np.int64]
Scores = NDArray[np.float32]


def grid_indices(grid: TokenGrid, tile: TileIndex) -> tuple[Indices, Indices]:
    """Where the tokens of one tile stand in the level's sequence.

    Returns:
        Indices int64 [m] in the padded sequence, and int64 [m] of the same tokens within the tile
        (row-major on per_tile x per_tile). Tokens that lie in the padding are left out.
    """
    rows = np.arange(grid.per_tile) + tile.row * grid.per_tile
    cols = np.arange(grid.per_tile) + tile.col * grid.per_tile
    inside = (rows[:, None] < grid.rows) & (cols[None, :] < grid.cols)
    sequence = rows[:, None] * grid.width + cols[None, :]
    within = np.arange(grid.per_tile**2).reshape(grid.per_tile, grid.per_tile)
    return sequence[inside].astype(np.int64), within[inside].astype(np.int64)


def newline_indices(grid: TokenGrid) -> Indices:
    """Indices of the newline tokens, int64 [rows]."""
    return np.arange(grid.rows, dtype=np.int64) * grid.width + grid.cols


def top_indices(scores: Scores, count: int) -> Indices:
    """Places of the `count` largest scores, best first; of equal scores the earlier one.

    The reference leaves the order of ties to `torch.topk`, which does not specify it.
    """
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)


def kept_indices(top: Indices, newlines: Indices) -> Indices:
    """Top tokens united with every newline, ascending."""
    return np.union1d(top, newlines)


def reference_tiles(kept: Indices, grid: TokenGrid, finer: Level) -> list[TileIndex]:
    """Tiles of the next level as the authors' code chooses them, row-major.

    Quirk: the newline column counts as image, so newlines choose the right-most tiles, and the
    mapping takes the unpadded token grid for the padded tile grid.
    """
    rows = (kept // grid.width) * finer.tile_rows // grid.rows
    cols = (kept % grid.width) * finer.tile_cols // grid.width
    return [TileIndex(int(r), int(c)) for r, c in sorted(set(zip(rows, cols, strict=True)))]


def tile_scores(
    top: Indices, scores: Scores, grid: TokenGrid, level: Level, finer: Level
) -> NDArray[np.float64]:
    """How much of the top tokens' score lies over each tile of the next level.

    A token's cell is a part of the image; where it straddles tiles its score is shared by area.
    Newline tokens show nothing and choose nothing.

    Args:
        top: Indices int64 [k] of the top tokens in the level's sequence.
        scores: float32 [k], their scores.
        grid: The level's token grid.
        level: The level that was scored.
        finer: The next level.

    Returns:
        float64 [finer.tile_rows, finer.tile_cols].
    """
    cell = level.tile / grid.per_tile

    def over(place: int, axis: int) -> list[tuple[int, float]]:
        """Tile rows or columns over a row or column of tokens, with their shares of it."""
        side = (level.height, level.width)[axis]
        shares = _shares(place * cell / side, (place + 1) * cell / side, finer, axis)
        return [(int(tile), float(shares[tile])) for tile in np.flatnonzero(shares)]

    # Many tokens stand in one row or column. Plain numbers: a token lies under a tile or two.
    places = np.divmod(np.asarray(top, np.int64), grid.width)
    rows, cols = ({at: over(at, axis) for at in set(places[axis].tolist())} for axis in (0, 1))
    total = [[0.0] * finer.tile_cols for _ in range(finer.tile_rows)]
    for row, col, score in zip(*(part.tolist() for part in (*places, scores)), strict=True):
        if col == grid.cols:
            continue
        for tile_row, height in rows[row]:
            for tile_col, width in cols[col]:
                total[tile_row][tile_col] += score * height * width
    return np.array(total, np.float64).reshape(finer.tile_rows, finer.tile_cols)


def _shares(start: float, stop: float, finer: Level, axis: int) -> NDArray[np.float64]:
    """Share of the interval [start, stop) of the image's side under each tile row or column."""
    size, tiles = (finer.height, finer.tile_rows) if axis == 0 else (finer.width, finer.tile_cols)
    edges = np.minimum(np.arange(tiles + 1) * finer.tile, size) / size
    stop = min(stop, 1.0)
    start = min(start, stop)
    overlap = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0.0, None)
    # Rounded level sizes leave slivers of a thousandth of a cell over the neighbouring tile.
    overlap[overlap < 1e-2 * (stop - start)] = 0.0
    length = overlap.sum()
    return np.asarray(overlap / length if length > 0 else overlap, np.float64)


def best_tiles(totals: NDArray[np.float64], count: int) -> list[TileIndex]:
    """The `count` tiles of highest score, those without any score left out, row-major.

    Of equal scores the upper, then the left tile wins.
    """
    flat = totals.ravel()
    order = np.argsort(-flat, kind="stable")[:count]
    chosen = np.sort(order[flat[order] > 0])
    return [TileIndex(int(i) // totals.shape[1], int(i) % totals.shape[1]) for i in chosen]


def trim_to_budget(
    groups: Indices, scores: Scores, is_structure: NDArray[np.bool_], budget: int
) -> NDArray[np.bool_]:
    """Which of the kept tokens stay when only `budget` of them may.

    The best tile tokens stay, each with the structure of its group (a row's newline, a tile's
    marks); that of other groups fills what is left, from the top.

    Args:
        groups: int64 [n], group of each: its token row, or its tile.
        scores: float32 [n].
        is_structure: bool [n].
        budget: Tokens that may stay, 0 or more.

    Returns:
        bool [n].
    """
    if len(groups) <= budget:
        return np.ones(len(groups), bool)
    stays = np.zeros(len(groups), bool)
    structure: dict[int, list[int]] = {}
    for place in np.flatnonzero(is_structure):
        structure.setdefault(int(groups[place]), []).append(int(place))
    tiles = np.flatnonzero(~is_structure)
    left = budget
    for place in tiles[np.argsort(-scores[tiles], kind="stable")]:
        wanted = [int(place)]
        wanted += [
            with_it for with_it in structure.get(int(groups[place]), []) if not stays[with_it]
        ]
        if len(wanted) <= left:
            stays[wanted] = True
            left -= len(wanted)
    spare = [place for places in structure.values() for place in places if not stays[place]]
    stays[sorted(spare)[:left]] = True
    return stays

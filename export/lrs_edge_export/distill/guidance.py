"""Which tiles of a finer level a group looks at: those that inference might look at.

Inference follows the scores. Training follows them too, so that what misleads the model is in
view; it also looks where the evidence is, so that there is something to find, and at a few tiles
at random.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.pyramid.levels import Level, TileIndex
from lrs_edge.pyramid.selection import tile_scores
from lrs_edge_export.distill.evidence import top_quarter
from lrs_edge_export.distill.sequences import GroupInput

#: Shares of the tiles of a group: at most so many for the evidence, at least so many at random.
_EVIDENCE_SHARE = 0.5
_RANDOM_SHARE = 0.125


def next_tile_scores(
    scored: GroupInput, scores: NDArray[np.float32], finer: Level
) -> NDArray[np.float64]:
    """How much the questions of a group want to see each tile of the next level.

    Args:
        scored: The group.
        scores: float32 [Q, n].
        finer: The next level.

    Returns:
        float64 [tile_rows, tile_cols]; every question counts the same.
    """
    total = np.zeros((finer.tile_rows, finer.tile_cols))
    places = np.flatnonzero(scored.shown)
    for row in scores:
        top = places[top_quarter(row[places])]
        found = tile_scores(scored.cells[top], row[top], scored.grid, scored.level, finer)
        total += found / max(float(found.sum()), 1e-12)
    return total


def choose_tiles(
    level: Level,
    evidence: Collection[TileIndex],
    totals: NDArray[np.float64] | None,
    count: int,
    draw: np.random.Generator,
) -> tuple[TileIndex, ...]:
    """Tiles of a level for one group.

    Args:
        level: The level.
        evidence: Tiles that show evidence.
        totals: float64 [tile_rows, tile_cols], scores of tiles; None where there are none.
        count: Most tiles.
        draw: Source of chance.

    Returns:
        Up to `count` tiles, row-major; all of a level that has no more.
    """
    everything = level.tiles()
    if len(everything) <= count:
        return tuple(everything)
    known = sorted(evidence)
    chosen = _some(known, max(int(count * _EVIDENCE_SHARE), 1), draw)
    if totals is not None:
        room = count - len(chosen) - max(int(count * _RANDOM_SHARE), 1)
        order = np.argsort(-totals.ravel(), kind="stable")
        wanted = [
            tile
            for place in order
            if totals.ravel()[place] > 0
            and (tile := TileIndex(*divmod(int(place), level.tile_cols))) not in chosen
        ]
        chosen |= set(wanted[: max(room, 0)])
    rest = [tile for tile in everything if tile not in chosen]
    chosen |= _some(rest, count - len(chosen), draw)
    return tuple(sorted(chosen))


def _some(tiles: Sequence[TileIndex], count: int, draw: np.random.Generator) -> set[TileIndex]:
    """At most `count` of the tiles."""
    places = draw.choice(len(tiles), min(count, len(tiles)), replace=False) if tiles else ()
    return {tiles[int(place)] for place in places}

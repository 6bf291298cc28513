"""Objects of tiles of several levels, each once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.objects.detections import Detections, joined
from lrs_edge.pyramid.levels import Level, TileIndex

#: An object smaller than so many cells is left to a finer level that was looked at there.
SMALL = 2.0

#: One larger than so many cells is left to a coarser one.
LARGE = 10.0

#: Objects of a label that share more than this (intersection over union) are one.
SAME = 0.4

#: Only so many of the best objects are compared.
MOST = 4096


def merge(levels: Sequence[tuple[Level, Mapping[TileIndex, Detections]]]) -> Detections:
    """All objects that the looked-at tiles show, each once, best first.

    An object belongs to a level that shows it well: a small one is dropped where its centre lies
    in a looked-at tile of a finer level, a large one where it lies in one of a coarser level. What
    is left goes through greedy non-maximum suppression, label by label: an object is dropped
    where it shares more than `SAME` with a better one, or where its centre lies in the inner half
    of a better one's box. The order in which tiles are given does not matter.

    Args:
        levels: The looked-at tiles of each level, coarse to fine; the global view, one tile, is
            the first.

    Returns:
        Sorted by score, then label, then the centre's y and x.
    """
    kept = []
    for number, (level, tiles) in enumerate(levels):
        found = joined(list(tiles.values()))
        if not len(found):
            continue
        drop = np.zeros(len(found), bool)
        small, large = found.cells < SMALL, found.cells > LARGE
        for other, (shown, looked_at) in enumerate(levels):
            if other > number and _zooms(level, shown) and small.any():
                drop |= small & _covered(found.centres, shown, looked_at)
            if other < number and _zooms(shown, level) and large.any():
                drop |= large & _covered(found.centres, shown, looked_at)
        kept.append(found.take(~drop))
    found = joined(kept)
    return _suppressed(found.take(_order(found)[:MOST]))


def _zooms(coarse: Level, fine: Level) -> bool:
    """Whether the second level shows things larger than the first."""
    return max(fine.height, fine.width) > max(coarse.height, coarse.width)


def _covered(
    centres: NDArray[np.float32], level: Level, tiles: Iterable[TileIndex]
) -> NDArray[np.bool_]:
    """Which of the points, shares of the image [n, 2], lie in one of the tiles of a level."""
    grid = np.zeros((level.tile_rows, level.tile_cols), bool)
    for tile in tiles:
        grid[tile.row, tile.col] = True
    cols = (centres[:, 0].astype(np.float64) * level.width // level.tile).astype(np.int64)
    rows = (centres[:, 1].astype(np.float64) * level.height // level.tile).astype(np.int64)
    # A centre on the image's far edge belongs to the last tile.
    inside = grid[np.minimum(rows, level.tile_rows - 1), np.minimum(cols, level.tile_cols - 1)]
    return np.asarray(inside, bool)


def _order(found: Detections) -> NDArray[np.int64]:
    """Places from best to worst, int64 [n]; whatever order objects come in, it is the same."""
    x, y = found.centres.T
    x0, y0, _, _ = found.boxes.T
    return np.lexsort((found.cells, x0, y0, x, y, found.labels, -found.scores))


def _suppressed(found: Detections) -> Detections:
    """The objects, sorted from best to worst, without those that a better one stands for."""
    keep = np.zeros(len(found), bool)
    for label in np.unique(found.labels):
        places = np.flatnonzero(found.labels == label)
        boxes = found.boxes[places].astype(np.float64)
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        left = np.arange(len(places))
        while len(left):
            best, rest = left[0], left[1:]
            keep[places[best]] = True
            common = np.minimum(boxes[best, 2:], boxes[rest, 2:])
            common = common - np.maximum(boxes[best, :2], boxes[rest, :2])
            shared = np.maximum(common, 0).prod(axis=1)
            quarter = (boxes[best, 2:] - boxes[best, :2]) / 4
            inner = (np.abs(middles[rest] - middles[best]) <= quarter).all(axis=1)
            same = shared > SAME * (areas[best] + areas[rest] - shared)
            left = rest[~(inner | same)]
    return found.take(keep)

"""From the detector's maps of one tile to objects with a label, a score and a box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.pyramid.levels import Level, TileIndex

#: Bounds of the map's log2 of a box's side in cells: a quarter of a cell to 64 cells.
LEAST_SIZE, MOST_SIZE = -2.0, 6.0

#: Objects of one tile, at most, the best ones: what is remembered of a tile has a bound, whatever
#: the maps hold.
MOST_PER_TILE = 4096


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects found, n of them.

    Attributes:
        labels: int64 [n], places in the spec's labels.
        scores: float32 [n] of 0..1.
        boxes: float32 [n, 4], x0, y0, x1, y1 in shares of the image's width and height, 0..1.
        cells: float32 [n], the root of width times height in cells of the level that showed it,
            also where the image's edge cuts the box.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    cells: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def centres(self) -> NDArray[np.float32]:
        """Middles of the boxes, float32 [n, 2], x and y in shares of the image."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / np.float32(2)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in (self.labels, self.scores, self.boxes, self.cells))

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Detections:
        """Some of the objects: places int64 [m] in the order wanted, or a mask bool [n]."""
        return Detections(
            self.labels[chosen], self.scores[chosen], self.boxes[chosen], self.cells[chosen]
        )


def no_detections() -> Detections:
    """No objects at all."""
    return Detections(
        np.zeros(0, np.int64),
        np.zeros(0, np.float32),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
    )


def joined(parts: Sequence[Detections]) -> Detections:
    """All objects of several, one after the other."""
    parts = (no_detections(), *parts)
    return Detections(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.cells for part in parts]),
    )


def decode(
    maps: NDArray[np.float32], level: Level, tile: TileIndex, spec: ObjectSpec
) -> Detections:
    """Objects of one tile: cells that are a label's local maximum and reach its low threshold.

    A cell wins against its 8 neighbours; of equal ones the first in row-major order does. Cells
    whose centre lies in the padding count for nothing. What is no number is a score of 0, and a
    box of one cell. Only the `MOST_PER_TILE` best objects are given, in the order of the maps.

    Args:
        maps: [C + 2, G, G]: the probability that an object of each label has its centre in the
            cell, then log2 of its box's width and height in cells.
        level: The level that the tile is of.
        tile: The tile.
        spec: Labels C, cells G along a tile's side, thresholds.
    """
    count, side = len(spec.labels), spec.grid
    scores = np.nan_to_num(maps[:count].astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    scores = np.clip(scores, 0, 1)
    cell = level.tile / side
    # Centres of the cells in pixels of the level.
    xs = tile.col * level.tile + (np.arange(side) + 0.5) * cell
    ys = tile.row * level.tile + (np.arange(side) + 0.5) * cell
    shown = (ys < level.height)[:, None] & (xs < level.width)[None, :]
    scores[:, ~shown] = -1
    low = np.array([low for low, _ in spec.thresholds], np.float32)
    found = _is_peak(scores) & (scores >= low[:, None, None]) & shown
    places = np.flatnonzero(found)
    if len(places) > MOST_PER_TILE:
        best = np.argsort(-scores.ravel()[places], kind="stable")[:MOST_PER_TILE]
        places = places[np.sort(best)]
    labels, rows, cols = np.unravel_index(places, found.shape)
    sizes = np.nan_to_num(maps[count:].astype(np.float64), nan=0.0, posinf=MOST_SIZE)
    sides = np.exp2(np.clip(sizes, LEAST_SIZE, MOST_SIZE))[:, rows, cols]
    middles = np.stack([xs[cols], ys[rows]])
    whole = np.array([[level.width], [level.height]], np.float64)
    half = sides * cell / 2
    boxes = np.concatenate([(middles - half) / whole, (middles + half) / whole]).T
    return Detections(
        labels.astype(np.int64),
        scores[labels, rows, cols],
        np.ascontiguousarray(np.clip(boxes, 0, 1), np.float32),
        np.sqrt(sides.prod(axis=0)).astype(np.float32),
    )


def _is_peak(scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a cell beats its neighbours, bool [C, G, G] of [C, G, G]."""
    rows, cols = scores.shape[1:]
    around = np.pad(scores, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    peak = np.ones(scores.shape, bool)
    for down in range(3):
        for right in range(3):
            near = around[:, down : down + rows, right : right + cols]
            if (down, right) < (1, 1):
                peak &= scores > near
            elif (down, right) > (1, 1):
                peak &= scores >= near
    return peak

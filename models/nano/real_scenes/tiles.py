"""Boxes under the tiles of a level: whether a search looked where things are. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lrs_edge.evaluation.results import FinestLevel
from lrs_edge.pyramid.box import Box


@dataclass(frozen=True)
class Found:
    """Boxes whose centres lie under tiles.

    Attributes:
        boxes: How many there are.
        found: Under the tiles that were looked at.
        best: Under as many tiles, had the best ones been chosen.
        expected: Expected under as many tiles chosen at random.
        looked_at: Tiles.
        tiles: Of the level.
    """

    boxes: int
    found: int
    best: int
    expected: float
    looked_at: int
    tiles: int

    def __add__(self, other: Found) -> Found:
        return Found(
            self.boxes + other.boxes,
            self.found + other.found,
            self.best + other.best,
            self.expected + other.expected,
            self.looked_at + other.looked_at,
            self.tiles + other.tiles,
        )


NOTHING = Found(0, 0, 0, 0.0, 0, 0)


def tile_of(
    box: Box, level: FinestLevel, tile: int, image_size: tuple[int, int]
) -> tuple[int, int]:
    """Row and column of the tile that the centre of a box lies in.

    Args:
        box: In pixels of the image.
        level: The level.
        tile: Side of its tiles in its pixels.
        image_size: Width and height of the image.
    """
    col = int((box[0] + box[2]) / 2 * level.width / image_size[0] // tile)
    row = int((box[1] + box[3]) / 2 * level.height / image_size[1] // tile)
    return min(max(row, 0), level.tile_rows - 1), min(max(col, 0), level.tile_cols - 1)


def under_tiles(
    boxes: Sequence[Box], level: FinestLevel, tile: int, image_size: tuple[int, int]
) -> Found:
    """Count the boxes under the tiles of a level that were looked at."""
    places = Counter(tile_of(box, level, tile, image_size) for box in boxes)
    looked_at, tiles = set(level.tiles), level.tile_rows * level.tile_cols
    return Found(
        boxes=len(boxes),
        found=sum(count for place, count in places.items() if place in looked_at),
        best=sum(sorted(places.values(), reverse=True)[: len(looked_at)]),
        expected=len(boxes) * len(looked_at) / tiles,
        looked_at=len(looked_at),
        tiles=tiles,
    )


def total(found: Iterable[Found]) -> Found:
    """Several images together."""
    return sum(found, NOTHING)

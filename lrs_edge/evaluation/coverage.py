"""Whether the search looked at the evidence: boxes of a question against tiles of a level.

Pure geometry. Boxes are x0, y0, x1, y1 in pixels of the image, from the top left; tiles are (row,
column) of a level whose windows are those of `pyramid/levels.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from lrs_edge.pyramid.box import Box
from lrs_edge.pyramid.levels import Level

#: Evidence counts as looked at where this share of its area was.
COVERED_SHARE = 0.5

#: Up to so many tiles under the evidence all choices are counted; above, choices are drawn.
_EXACT_TILES = 12
_DRAWS = 2000
_SEED = 0

#: Sums of areas are exact to rounding; half of a box must count as half.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Coverage:
    """How much of a question's evidence was looked at.

    Attributes:
        share: Share of the evidence's area (boxes united, cut at the image's edge) under the tiles.
        random_share: The same expected of as many tiles of the level, chosen at random.
        random_covered: Probability that those cover `COVERED_SHARE` of it.
    """

    share: float
    random_share: float
    random_covered: float

    @property
    def covered(self) -> bool:
        """Whether the evidence counts as looked at."""
        return is_covered(self.share)


def is_covered(share: float) -> bool:
    """Whether a share of the evidence is enough."""
    return share >= COVERED_SHARE - _TOLERANCE


def coverage(
    boxes: Sequence[Box],
    level: Level,
    image_hw: tuple[int, int],
    tiles: Iterable[tuple[int, int]],
) -> Coverage | None:
    """Compare boxes with the tiles that were looked at.

    Args:
        boxes: The evidence.
        level: The level that the tiles are of.
        image_hw: Height and width of the image in pixels.
        tiles: Row and column of every tile looked at.

    Returns:
        None where no box lies in the image.
    """
    areas = tile_areas(boxes, level, image_hw)
    total = float(areas.sum())
    if total <= 0:
        return None
    looked_at = np.zeros(areas.shape, bool)
    for row, col in tiles:
        looked_at[row, col] = True
    count = int(looked_at.sum())
    shares = areas / total
    return Coverage(
        share=min(float(shares[looked_at].sum()), 1.0),
        random_share=count / level.tile_count,
        random_covered=random_covered(shares[shares > 0].tolist(), level.tile_count, count),
    )


def tile_areas(
    boxes: Sequence[Box], level: Level, image_hw: tuple[int, int]
) -> NDArray[np.float64]:
    """Area of the united boxes under each tile, float64 [tile_rows, tile_cols] in image pixels.

    Windows of tiles cover the image without overlap, so the areas add up to the evidence's.
    """
    height, width = image_hw
    rows = _edges(level.tile_rows, level.tile * height / level.height, height)
    cols = _edges(level.tile_cols, level.tile * width / level.width, width)
    cut = [box for box in (_cut(box, height, width) for box in boxes) if box is not None]
    # Along each axis the edges of boxes and tiles make strips in which nothing changes.
    across = np.unique(np.concatenate([cols, [edge for box in cut for edge in (box[0], box[2])]]))
    down = np.unique(np.concatenate([rows, [edge for box in cut for edge in (box[1], box[3])]]))
    inside = np.zeros((len(down) - 1, len(across) - 1), bool)
    for x0, y0, x1, y1 in cut:
        top, bottom = np.searchsorted(down, [y0, y1])
        left, right = np.searchsorted(across, [x0, x1])
        inside[top:bottom, left:right] = True
    cells = inside * np.diff(down)[:, None] * np.diff(across)
    areas: NDArray[np.float64] = np.zeros((level.tile_rows, level.tile_cols))
    # A tile in the padding alone has no strip; its index comes after the last edge.
    row_of = np.clip(np.searchsorted(rows, down[:-1], side="right") - 1, 0, level.tile_rows - 1)
    col_of = np.clip(np.searchsorted(cols, across[:-1], side="right") - 1, 0, level.tile_cols - 1)
    np.add.at(areas, (row_of[:, None], col_of[None]), cells)
    return areas


def _edges(count: int, step: float, size: int) -> NDArray[np.float64]:
    """Edges of `count` tiles along one side of the image in image pixels, ascending."""
    edges: NDArray[np.float64] = np.minimum(np.arange(count + 1) * step, float(size))
    edges[-1] = size
    return edges


def _cut(box: Box, height: int, width: int) -> Box | None:
    x0, y0 = max(box[0], 0.0), max(box[1], 0.0)
    x1, y1 = min(box[2], float(width)), min(box[3], float(height))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def random_covered(shares: Sequence[float], tiles: int, chosen: int) -> float:
    """Probability that `chosen` of `tiles` tiles, drawn without replacement, cover the evidence.

    Args:
        shares: Share of the evidence under each tile that holds any; together 1.
        tiles: Tiles of the level.
        chosen: How many are drawn.

    Returns:
        Exact for up to 12 tiles with evidence; otherwise the frequency in 2,000 seeded draws.
    """
    held = len(shares)
    if chosen >= tiles:
        return 1.0
    if held > _EXACT_TILES:
        # How many of the tiles with evidence are drawn, then which: large levels cost no more.
        draw, weights = np.random.default_rng(_SEED), np.array(shares)
        counts = draw.hypergeometric(held, tiles - held, chosen, _DRAWS)
        sums = [weights[draw.permutation(held)[:count]].sum() for count in counts]
        return sum(is_covered(float(total)) for total in sums) / _DRAWS
    every = math.comb(tiles, chosen)
    hits = 0
    for size in range(min(held, chosen) + 1):
        rest = tiles - held
        if chosen - size > rest:
            continue
        others = math.comb(rest, chosen - size)
        hits += others * sum(is_covered(sum(part)) for part in combinations(shares, size))
    return hits / every

"""Where the evidence of a question lies on a level, and how well scores find it. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.box import Box
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid

Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]

#: Share of the tokens that the search keeps (paper, section 3.3).
KEEP_RATIO = 0.25

#: A token shows a box if it overlaps this share of the smaller of the two.
_OVERLAP = 0.25


@dataclass(frozen=True)
class Localisation:
    """How well scores find the evidence of one question.

    Attributes:
        share: Evidence tokens among the tiles' tokens: what chance would find.
        mass: Score on evidence tokens, of all on the tiles' tokens.
        recall: Evidence tokens among the top quarter, of all evidence tokens that could be.
        best: Whether the best token is an evidence token.
    """

    share: float
    mass: float
    recall: float
    best: bool


def evidence_tokens(
    local: LocalTokens,
    grid: TokenGrid,
    level: Level,
    image_hw: tuple[int, int],
    boxes: Sequence[Box],
) -> Mask:
    """Which local tokens show a part of the evidence.

    Args:
        local: Tokens of the level.
        grid: Their grid.
        level: The level.
        image_hw: Height and width of the image in pixels.
        boxes: Evidence in pixels of the image.

    Returns:
        bool [n]; never a newline or a mark.
    """
    found = np.zeros(len(local), bool)
    cell = level.tile / grid.per_tile
    rows, cols = np.divmod(local.cells, grid.width)
    high, wide = image_hw[0] / level.height, image_hw[1] / level.width
    tops, lefts = rows * cell * high, cols * cell * wide
    for x0, y0, x1, y1 in boxes:
        down = np.minimum(tops + cell * high, y1) - np.maximum(tops, y0)
        right = np.minimum(lefts + cell * wide, x1) - np.maximum(lefts, x0)
        overlap = np.clip(down, 0, None) * np.clip(right, 0, None)
        found |= overlap >= _OVERLAP * min(cell * high * cell * wide, (x1 - x0) * (y1 - y0))
    return found & ~local.is_structure


def evidence_tiles(
    level: Level, image_hw: tuple[int, int], boxes: Sequence[Box]
) -> list[TileIndex]:
    """Tiles of a level over which a box lies, row-major."""
    found = set()
    for x0, y0, x1, y1 in boxes:
        rows = _span(y0, y1, level.height / image_hw[0], level.tile, level.tile_rows)
        cols = _span(x0, x1, level.width / image_hw[1], level.tile, level.tile_cols)
        found |= {TileIndex(row, col) for row in rows for col in cols}
    return sorted(found)


def _span(first: float, stop: float, scale: float, tile: int, count: int) -> range:
    low, high = int(first * scale // tile), int(-(-stop * scale // tile))
    return range(min(max(low, 0), count - 1), max(min(high, count), 1))


def localisation(scores: Scores, evidence: Mask, shown: Mask) -> Localisation | None:
    """Judge scores by the evidence.

    Args:
        scores: float32 [n].
        evidence: bool [n], tokens that show the evidence.
        shown: bool [n], tokens of tiles (newlines show nothing).

    Returns:
        None where the evidence is not in view, or everything is evidence.
    """
    count, wanted = int(shown.sum()), int(evidence.sum())
    if not 0 < wanted < count:
        return None
    values, inside = scores[shown], evidence[shown]
    top = top_quarter(values)
    return Localisation(
        share=wanted / count,
        mass=float(values[inside].sum() / max(float(values.sum()), 1e-12)),
        recall=float(inside[top].sum() / min(wanted, len(top))),
        best=bool(inside[int(values.argmax())]),
    )


def top_quarter(scores: Scores) -> NDArray[np.int64]:
    """Places of the best quarter of scores [m], at least one, as the search keeps them."""
    count = min(max(int(KEEP_RATIO * len(scores)), 1), len(scores))
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)

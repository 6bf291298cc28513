"""Views: the vision tokens that one training sequence may show, and what is known of each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from common import GRID, KEEP, STRIDE, TILE, TOKENS, pyramid

ShareBox = list[float]
"""x0, y0, x1, y1 in shares of the width and height of a picture."""


@dataclass
class View:
    """Vision features of one picture at one level: the global view, then local tokens.

    Rows and columns of tiles that are not shown are left out of the local grid; where a shown row
    and a shown column cross in a tile that is not shown, the grid holds -1.
    """

    features: np.ndarray
    """uint8 [n, 1280], the first 144 of the global view; see common.compress."""
    centres: np.ndarray
    """float32 [n, 2], (y, x) of each token in shares of the picture, 0..1."""
    local: np.ndarray
    """Rows of the local tokens in `features`, [token rows, token columns]."""
    rows: np.ndarray
    """float64 [token rows, 2], top and bottom of each row in shares of the picture's height."""
    cols: np.ndarray
    """float64 [token columns, 2], left and right, in shares of the width."""
    global_rows: np.ndarray
    global_cols: np.ndarray
    """The same for the global view's grid; its padding lies beyond 1."""
    boxes: list[ShareBox] = field(default_factory=list)
    """Regions (x0, y0, x1, y1) in shares of width and height."""

    @property
    def shown(self) -> np.ndarray:
        """Which places of the local grid hold a token."""
        return self.local >= 0

    def evidence(self, boxes: list[ShareBox]) -> np.ndarray:
        """Which local tokens show one of the boxes."""
        return covered(boxes, self.rows, self.cols) & self.shown

    def global_evidence(self, boxes: list[ShareBox]) -> np.ndarray:
        """Which tokens of the global view show one of the boxes."""
        return covered(boxes, self.global_rows, self.global_cols)

    def coverage(self, box: ShareBox) -> float:
        """Share of a box's area that the shown local tokens cover."""
        height = overlap(self.rows, box[1], box[3]) / max(box[3] - box[1], 1e-9)
        width = overlap(self.cols, box[0], box[2]) / max(box[2] - box[0], 1e-9)
        return float((height[:, None] * width[None, :])[self.shown].sum())


def overlap(spans: np.ndarray, low: float, high: float) -> np.ndarray:
    """Length that each span [n, 2] shares with one interval."""
    return np.clip(np.minimum(spans[:, 1], high) - np.maximum(spans[:, 0], low), 0, None)


def covered(boxes: list[ShareBox], rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The tokens of a grid that show a box: a third of the token, or half of a smaller box."""
    found = np.zeros((len(rows), len(cols)), bool)
    for x0, y0, x1, y1 in boxes:
        hits = []
        for spans, low, high in ((rows, y0, y1), (cols, x0, x1)):
            shared = overlap(spans, low, high)
            hit = shared >= 0.999 * np.minimum(
                (spans[:, 1] - spans[:, 0]) / 3, max(high - low, 1e-9) / 2
            )
            # The edge between two tokens may halve a small box: then both show it.
            hits.append(hit & (shared > 0))
        found |= hits[0][:, None] & hits[1][None, :]
    return found


def spans_of(tiles: list[int], length: int) -> np.ndarray:
    """Spans of all tokens of some tile rows (or columns) of a level `length` pixels long."""
    starts = (np.array(tiles)[:, None] * TILE + np.arange(GRID)[None, :] * STRIDE).ravel()
    return np.stack([starts, starts + STRIDE], 1) / length


def level_view(
    width: int,
    height: int,
    level: tuple[int, int],
    tiles: list[tuple[int, int]],
    features: np.ndarray,
    boxes: list[ShareBox],
) -> View:
    """The view of some tiles of one level.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        level: Height and width of the level in pixels.
        tiles: Row and column of each tile.
        features: [1 + tiles, 144, 1280], the global view first.
        boxes: Regions in shares.
    """
    tile_rows = sorted({r for r, _ in tiles})
    tile_cols = sorted({c for _, c in tiles})
    rows, cols = spans_of(tile_rows, level[0]), spans_of(tile_cols, level[1])
    # As the runtime's unpadded grid: tokens that lie wholly in the padding are not there.
    rows, cols = rows[rows[:, 0] < 1 - 1e-9], cols[cols[:, 0] < 1 - 1e-9]
    local = np.full((len(tile_rows) * GRID, len(tile_cols) * GRID), -1)
    for number, (row, col) in enumerate(tiles, 1):
        top, left = tile_rows.index(row) * GRID, tile_cols.index(col) * GRID
        tokens = number * TOKENS + np.arange(TOKENS).reshape(GRID, GRID)
        local[top : top + GRID, left : left + GRID] = tokens
    local = local[: len(rows), : len(cols)]
    view = pyramid(width, height).global_view
    global_rows = spans_of([0], view.height)
    global_cols = spans_of([0], view.width)
    centres = np.zeros((len(features) * TOKENS, 2), np.float32)
    centres[:TOKENS] = _centres(global_rows, global_cols)
    r, c = np.nonzero(local >= 0)
    middle = np.stack([rows[r].mean(1), cols[c].mean(1)], 1)
    centres[local[r, c]] = np.clip(middle, 0, 1)
    flat = features.reshape(-1, features.shape[-1])
    return View(flat, centres, local, rows, cols, global_rows, global_cols, boxes)


def _centres(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    y, x = np.meshgrid(rows.mean(1), cols.mean(1), indexing="ij")
    return np.clip(np.stack([y.ravel(), x.ravel()], 1), 0, 1)


def single_tile(features: np.ndarray, side: int = 150) -> View:
    """The view of a square image no larger than a tile: the local level shows the same tile."""
    both = np.stack([features, features])
    return level_view(side, side, (TILE, TILE), [(0, 0)], both, [])


def smooth_field(shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """A random field with patches of a few tokens."""
    rows, columns = shape
    step = int(draw.integers(2, 7))
    coarse = draw.normal(size=(-(-rows // step), -(-columns // step)))
    return np.repeat(np.repeat(coarse, step, 0), step, 1)[:rows, :columns]


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """A mask of the best so many tokens; those of score minus infinity never."""
    mask = np.zeros(scores.size, bool)
    if count > 0:
        mask[np.argpartition(-scores.ravel(), count - 1)[:count]] = True
    return mask.reshape(scores.shape) & np.isfinite(scores)


def choose_kept(view: View, evidence: list[np.ndarray], draw: random.Random) -> np.ndarray:
    """Local tokens that one training sequence keeps, mostly near some evidence."""
    shape = view.local.shape
    noise = np.random.default_rng(draw.getrandbits(32))
    scores = noise.normal(size=shape)
    if draw.random() < 0.75:
        scores = smooth_field(shape, noise) + 0.5 * scores
    for mask in evidence:
        scores = scores + 3.0 * mask
    scores[~view.shown] = -np.inf
    share = KEEP if draw.random() < 0.8 else draw.uniform(0.1, 0.4)
    return top(scores, max(int(share * view.shown.sum()), 1))

"""Where in the image a vision token lies, as an embedding added to it.

After pruning, a token's place in the sequence no longer tells where in the image it was: tokens
are kept from anywhere, and positions close up. A model may therefore be trained with a learned
table of rows and one of columns over the whole image, whatever the level. Only bundles whose
manifest says so have them (`VisionSpec.positions`); the authors' checkpoints have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrs_edge.pyramid.levels import Level, TileIndex


@dataclass(frozen=True)
class ImagePositions:
    """Learned embeddings of image rows and columns.

    Attributes:
        rows: float32 [G, D], from the image's top edge to its bottom edge.
        cols: float32 [G, D], from its left edge to its right edge.
    """

    rows: NDArray[np.float32]
    cols: NDArray[np.float32]

    def of_tile(self, level: Level, tile: TileIndex, side: int) -> NDArray[np.float32]:
        """Embeddings of one tile's tokens.

        Args:
            level: The tile's level; its padding beyond the image counts as the image's edge.
            tile: The tile.
            side: Tokens along the tile's side.

        Returns:
            float32 [side * side, D], row-major.
        """
        rows, cols = self.mixed(level, tile, side)
        both: NDArray[np.float32] = rows.of(self.rows)[:, None, :] + cols.of(self.cols)[None, :, :]
        return both.reshape(side * side, -1)

    def mixed(self, level: Level, tile: TileIndex, side: int) -> tuple[Mixed, Mixed]:
        """What the embeddings of one tile's token rows and columns are made of; see `of_tile`."""
        centres = (np.arange(side, dtype=np.float64) + 0.5) * level.tile / side
        return (
            _mixed(len(self.rows), (tile.row * level.tile + centres) / level.height),
            _mixed(len(self.cols), (tile.col * level.tile + centres) / level.width),
        )


class Mixed(NamedTuple):
    """Numbers between two neighbours of a table: places int64 [n], shares of `above` [n, 1]."""

    below: NDArray[np.int64]
    above: NDArray[np.int64]
    share: NDArray[np.float32]

    def of(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of a table float32 [G, D], float32 [n, D]."""
        mixed: NDArray[np.float32] = (
            table[self.below] * (1 - self.share) + table[self.above] * self.share
        )
        return mixed


def _mixed(count: int, shares: NDArray[np.float64]) -> Mixed:
    """At shares [n] of the length of a table of `count` entries, linear between them."""
    last = count - 1
    places = np.clip(shares, 0.0, 1.0) * last
    below = np.minimum(places.astype(np.int64), max(last - 1, 0))
    above = np.minimum(below + 1, last)
    return Mixed(below, above, (places - below).astype(np.float32)[:, None])

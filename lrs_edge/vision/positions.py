"""Where in the image a vision token lies, as an embedding added to it.

After pruning, a token's place in the sequence no longer tells where in the image it was: tokens
are kept from anywhere, and positions close up. A model may therefore be trained with a learned
table of rows and one of columns over the whole image, whatever the level. Only bundles whose
manifest says so have them (`VisionSpec.positions`); the authors' checkpoints have none.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        centres = (np.arange(side, dtype=np.float64) + 0.5) * level.tile / side
        down = _interpolated(self.rows, (tile.row * level.tile + centres) / level.height)
        right = _interpolated(self.cols, (tile.col * level.tile + centres) / level.width)
        both: NDArray[np.float32] = down[:, None, :] + right[None, :, :]
        return both.reshape(side * side, -1)


def _interpolated(table: NDArray[np.float32], shares: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of a table [G, D] at shares [n] of its length, linear between entries."""
    last = len(table) - 1
    places = np.clip(shares, 0.0, 1.0) * last
    below = np.minimum(places.astype(np.int64), max(last - 1, 0))
    above = np.minimum(below + 1, last)
    weight = (places - below).astype(np.float32)[:, None]
    mixed: NDArray[np.float32] = table[below] * (1 - weight) + table[above] * weight
    return mixed

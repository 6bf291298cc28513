"""The image pyramid, as pure functions that know no pixels.

`levels.py` lays out levels, tile grids and token grids; `selection.py` says which tokens are kept
and which tiles they choose on the next level; `box.py` is the one form of a rectangle.
"""

from lrs_edge.pyramid.levels import (
    MIN_ZOOM,
    Level,
    LevelWindow,
    Pyramid,
    TileIndex,
    TokenGrid,
    build_pyramid,
    reference_fails,
    token_grid,
)

__all__ = [
    "MIN_ZOOM",
    "Level",
    "LevelWindow",
    "Pyramid",
    "TileIndex",
    "TokenGrid",
    "build_pyramid",
    "reference_fails",
    "token_grid",
]

"""The image pyramid: levels, tile grids, token grids, selection. Pure functions, no pixels."""

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

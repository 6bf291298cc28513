"""Geometry of the Dynamic Image Pyramid: level sizes, tile grids, token grids and windows.

Pure functions over integers; nothing here reads a pixel. Coordinates are rows and columns counted
from the top left. A *level* is the image resized to `height` x `width` pixels and padded at the
bottom and right to a whole number of square tiles. Levels run from coarse to fine; the global view
is one tile that shows the whole image.

Reference: paper section 3.2; `pyramid_crop` of the authors' code as described in docs/algorithm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrs_edge.errors import ImageError

#: `full` drops a level that does not zoom at least this much over the next coarser one.
MIN_ZOOM = 1.5


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        height: Rows of the resized image in pixels, without padding.
        width: Columns of the resized image in pixels, without padding.
        tile_rows: Tiles from top to bottom, the last one padded.
        tile_cols: Tiles from left to right, the last one padded.
        tile: Side of a square tile in pixels.
    """

    height: int
    width: int
    tile_rows: int
    tile_cols: int
    tile: int

    @property
    def padded_height(self) -> int:
        """Rows in pixels including the padding at the bottom."""
        return self.tile_rows * self.tile

    @property
    def padded_width(self) -> int:
        """Columns in pixels including the padding at the right."""
        return self.tile_cols * self.tile

    @property
    def tile_count(self) -> int:
        """Number of tiles of the level."""
        return self.tile_rows * self.tile_cols

    def tiles(self) -> list[TileIndex]:
        """All tiles of the level, row-major."""
        return [TileIndex(r, c) for r in range(self.tile_rows) for c in range(self.tile_cols)]

    def tile_window(self, index: TileIndex) -> LevelWindow:
        """The part of the resized image under one tile.

        Returns:
            A window in level pixels, cut at the image's edge; its size is zero where a tile lies
            wholly in the padding.

        Raises:
            ImageError: The level has no such tile.
        """
        if not (0 <= index.row < self.tile_rows and 0 <= index.col < self.tile_cols):
            raise ImageError(
                f"tile {index.row},{index.col} is outside the {self.tile_rows}x{self.tile_cols} "
                "tiles of its level; ask for a tile that the pyramid lists"
            )
        row0 = min(index.row * self.tile, self.height)
        col0 = min(index.col * self.tile, self.width)
        return LevelWindow(
            row0=row0,
            col0=col0,
            rows=min(row0 + self.tile, self.height) - row0,
            cols=min(col0 + self.tile, self.width) - col0,
        )


@dataclass(frozen=True, order=True)
class TileIndex:
    """Place of a tile in its level: row from the top, column from the left, both from 0."""

    row: int
    col: int


@dataclass(frozen=True)
class LevelWindow:
    """A rectangle in the pixels of one resized level (not of the source image)."""

    row0: int
    col0: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Pyramid:
    """The levels of one image.

    Attributes:
        image_height: Rows of the source image in pixels.
        image_width: Columns of the source image in pixels.
        global_view: The whole image in one tile.
        levels: Search levels from coarse to fine; at least one.
        all_levels: Every level the reference builds, the unused ones included (for traces).
    """

    image_height: int
    image_width: int
    global_view: Level
    levels: tuple[Level, ...]
    all_levels: tuple[Level, ...]


def build_pyramid(
    image_height: int,
    image_width: int,
    *,
    tile: int,
    base_side: int,
    policy: str = "full",
    stretched: bool = False,
) -> Pyramid:
    """Levels of an image, as the authors' `pyramid_crop` lays them out.

    Args:
        image_height: Rows of the image in pixels, at least 1.
        image_width: Columns of the image in pixels, at least 1.
        tile: Tile side in pixels (`slice_block_size`, 336 in the released models).
        base_side: Long side of the base level in pixels (1008 in the released models).
        policy: `reference` searches the base and one finer level, even where that does not zoom.
            `full` searches to the original resolution and skips levels that zoom less than
            `MIN_ZOOM`.
        stretched: The global view fills its tile, whatever shape the image has.

    Returns:
        The pyramid. Where the authors' code has no level left beside the global view (long side
        equal to the tile), the global view serves as the base level too.

    Raises:
        ImageError: A side is below one pixel.
    """
    if image_height < 1 or image_width < 1:
        raise ImageError(f"an image of {image_width}x{image_height} pixels has nothing to look at")
    ratios = _ratios(image_height, image_width, tile, base_side)
    built = [_level(image_height, image_width, ratio, tile) for ratio in ratios]
    global_view, finer = built[0], tuple(built[1:]) or (built[0],)
    levels = finer[:2] if policy == "reference" else _zooming(finer)
    if stretched:
        global_view = Level(tile, tile, 1, 1, tile)
    return Pyramid(image_height, image_width, global_view, levels, finer)


def reference_fails(pyramid: Pyramid, per_tile: int) -> bool:
    """True for images on which the authors' code crashes (docs/algorithm.md lists them).

    Those are images whose levels all coincide with the global view, and strips so flat that no
    token row is left once the padding is cut off.
    """
    base, finer = pyramid.levels[0], pyramid.levels[-1]
    if base is pyramid.global_view:
        return True
    sizes = (
        (base, (pyramid.image_height, pyramid.image_width)),
        (finer, (finer.height, finer.width)),
    )
    return any(_no_row_left(level, per_tile, size) for level, size in sizes)


def _no_row_left(level: Level, per_tile: int, size_hw: tuple[int, int]) -> bool:
    height, width = size_hw
    cols, rows = level.tile_cols * per_tile, level.tile_rows * per_tile
    return width / height > cols / rows and int(height * (cols / width)) < 1


def _ratios(image_height: int, image_width: int, tile: int, base_side: int) -> list[float]:
    """Scale factors from coarse to fine; the first is the global view's."""
    smallest = min(base_side / max(image_height, image_width), 1.0)
    ratios, ratio = set(), 1.0
    while ratio >= smallest:
        ratios.add(ratio)
        ratio /= 2
    ratios.add(smallest)
    ratios.add(min(tile / image_height, tile / image_width))
    return sorted(ratios)


def _level(image_height: int, image_width: int, ratio: float, tile: int) -> Level:
    """One level, enlarged until its long side in tiles is full (half-to-even rounding)."""
    height, width = max(round(image_height * ratio), 1), max(round(image_width * ratio), 1)
    rows, cols = math.ceil(height / tile), math.ceil(width / tile)
    scale = min(tile * rows / height, tile * cols / width)
    height, width = max(round(height * scale), 1), max(round(width * scale), 1)
    return Level(height, width, math.ceil(height / tile), math.ceil(width / tile), tile)


def _zooming(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The base and every finer level that zooms by `MIN_ZOOM` over the last one kept."""
    kept = [levels[0]]
    for level in levels[1:]:
        last = kept[-1]
        if max(level.height, level.width) >= MIN_ZOOM * max(last.height, last.width):
            kept.append(level)
    return tuple(kept)


@dataclass(frozen=True)
class TokenGrid:
    """Vision tokens of one level after the padding is cut off.

    Attributes:
        rows: Token rows that show image (a partly padded row counts).
        cols: Token columns that show image.
        per_tile: Tokens along one side of a tile.
        tile_rows: Tiles from top to bottom.
        tile_cols: Tiles from left to right.
    """

    rows: int
    cols: int
    per_tile: int
    tile_rows: int
    tile_cols: int

    @property
    def width(self) -> int:
        """Tokens in one row of the sequence: the columns and one newline."""
        return self.cols + 1

    @property
    def count(self) -> int:
        """Tokens of the whole level, newlines included."""
        return self.rows * self.width


def token_grid(
    level: Level, per_tile: int, size_hw: tuple[int, int], *, min_cols: int = 1
) -> TokenGrid:
    """Token grid of a level without its padding (LLaVA's `unpad`, integer for integer).

    Args:
        level: The level.
        per_tile: Local tokens along a tile's side, after pooling (12 in the released models).
        size_hw: Height and width whose aspect ratio is used. The reference takes the original
            image's at the base level and the level's own resized size at the next.
        min_cols: Columns that are kept at least; the reference keeps none on very thin upright
            strips and goes on with newline tokens only.

    Returns:
        The grid. One row is kept where the reference's arithmetic leaves none and crashes.
    """
    grid_rows, grid_cols = level.tile_rows * per_tile, level.tile_cols * per_tile
    height, width = size_hw
    rows, cols = grid_rows, grid_cols
    if width / height > grid_cols / grid_rows:
        rows = max(min(int(height * (grid_cols / width)), grid_rows), 1)
    else:
        cols = max(min(int(width * (grid_rows / height)), grid_cols), min_cols)
    return TokenGrid(rows, cols, per_tile, level.tile_rows, level.tile_cols)

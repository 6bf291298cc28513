"""Pixels of tiles: decoded with limits, turned, and kept while there is room."""

from __future__ import annotations

import math
import struct
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lrs_edge.errors import ImageError
from lrs_edge_export.scenes.library import MAX_SIDE, LabelledTile

#: Formats that a tile may have, by Pillow's names.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
#: Decoded tiles are reduced to about this side in pixels; no place is drawn much larger.
_KEPT_SIDE = 1024
#: Aspect ratios beyond this are cut to the middle of the tile.
_MAX_ASPECT = 1.25

#: What Pillow raises for damaged files and for files that claim gigapixels.
_UNREADABLE = (
    *(UnidentifiedImageError, Image.DecompressionBombError),
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, struct.error),
)

_QUARTERS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)


#: Pixels repeated around a decoded tile, so that a window may begin a little outside of it.
MARGIN = 2


@dataclass(frozen=True)
class TurnedTile:
    """A decoded tile as it lies in a scene.

    Attributes:
        pixels: [rows, columns, 3] uint8.
        padded: The same as an image, with its edges repeated `MARGIN` pixels outwards.
    """

    pixels: NDArray[np.uint8]
    padded: Image.Image

    @property
    def bytes(self) -> int:
        """Memory taken, roughly."""
        return 2 * self.pixels.nbytes


class TileCache:
    """Decoded tiles, the least recently used forgotten first.

    Args:
        max_bytes: Memory for decoded pixels.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[LabelledTile, int], TurnedTile] = OrderedDict()
        self._bytes = 0

    def get(self, tile: LabelledTile, turn: int) -> TurnedTile:
        """A tile's pixels, turned.

        Args:
            tile: Which one.
            turn: 0..7 as in `Placement.turn`.

        Raises:
            ImageError: The file cannot be decoded, or is not of the size that was listed.
        """
        key = tile, turn
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        pixels = np.asarray(turned(decode(tile), turn))
        around = np.pad(pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
        held = TurnedTile(pixels, Image.fromarray(around))
        self._held[key] = held
        self._bytes += held.bytes
        while self._bytes > self._max_bytes and len(self._held) > 1:
            _, old = self._held.popitem(last=False)
            self._bytes -= old.bytes
        return held


def decode(tile: LabelledTile) -> Image.Image:
    """The tile's pixels as RGB, cut to a shape near a square, at most about 1024 pixels a side.

    Raises:
        ImageError: The file cannot be decoded, or is not of the size that was listed.
    """
    try:
        with warnings.catch_warnings():
            # Damaged metadata is not a reason to refuse or to talk; pixels are what counts.
            warnings.simplefilter("ignore")
            with Image.open(tile.path, formats=FORMATS) as opened:
                if max(opened.size) > MAX_SIDE or opened.size != (tile.width, tile.height):
                    raise ImageError(
                        f"{tile.path} has {opened.width} x {opened.height} pixels, not "
                        f"{tile.width} x {tile.height}; correct labels.jsonl"
                    )
                # Pillow would cut such values at 255: a white tile.
                if opened.mode.startswith(("I", "F")):
                    raise ImageError(
                        f"{tile.path} has more than 8 bits per value; convert it to 8 bits"
                    )
                image = opened.convert("RGB")
    except _UNREADABLE as error:
        raise ImageError(
            f"{tile.path} cannot be decoded ({error}); replace it or take it out of labels.jsonl"
        ) from error
    width = min(image.width, round(image.height * _MAX_ASPECT))
    height = min(image.height, round(image.width * _MAX_ASPECT))
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    factor = max(image.size) // _KEPT_SIDE
    return image.reduce(factor) if factor > 1 else image


def turned(image: Image.Image, turn: int) -> Image.Image:
    """One of the eight ways to lay a picture: mirrored for 4 and up, then quarter turns."""
    if turn >= 4:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    quarter = _QUARTERS[turn % 4]
    return image if quarter is None else image.transpose(quarter)


def area_weights(source: int, start: float, step: float, count: int) -> NDArray[np.float32]:
    """Weights that average a row of pixels, interpolated linearly, over intervals of equal length.

    Args:
        source: Pixels in the row; pixel j covers j..j+1. Beyond its ends the end pixel goes on.
        start: Where the first interval begins, in pixels of the row.
        step: Length of one interval.
        count: How many intervals.

    Returns:
        [count, source] float32; every row sums to 1.
    """
    edges = start + step * np.arange(count + 1)
    # The end pixels go on as far as the intervals reach; then all of that is counted as theirs.
    before = max(0, math.ceil(-edges[0])) + 1
    after = max(0, math.ceil(edges[-1] - source)) + 1
    middles = np.arange(-before, source + after) + 0.5
    # Integral of each pixel's hat function up to each edge: 0 left of the hat, 1 right of it.
    distance = np.clip(edges[:, None] - middles, -1.0, 1.0)
    until = np.where(distance < 0, 0.5 * (distance + 1) ** 2, 1 - 0.5 * (1 - distance) ** 2)
    weights = np.diff(until, axis=0) / step
    inner: NDArray[np.float32] = weights[:, before : before + source].astype(np.float32)
    inner[:, 0] += weights[:, :before].sum(axis=1)
    inner[:, -1] += weights[:, before + source :].sum(axis=1)
    return inner

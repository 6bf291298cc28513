"""The texture under the places: a few tiles laid again and again with irregular, soft seams.

The texture is made once per scene, at the tiles' own resolution, and enlarged when it is read: a
scene of 16,000 pixels has a texture of at most 3,200 (about 40 MB with its smaller copies).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lrs_edge_export.scenes.plan import Background
from lrs_edge_export.scenes.tiles import decode, turned

#: Largest side of one cell's picture in texture pixels.
_CELL = 192
#: Part of a cell that lies over its left and upper neighbours, and the softness of the seam.
_OVERLAP = 0.34
_SOFTNESS = 0.1
_SEAMS = 6
#: Brightness of cells, from the darkest patch to the brightest.
_SHADES = (0.91, 0.955, 1.0, 1.045, 1.09)
#: How far a tile's mean colour is moved to the mean of its label.
_MATCHED = 0.6
#: Up to this many texture pixels per output pixel, plain interpolation is what averages give.
_ENLARGES = 0.7
#: From this ratio on the softness of interpolation no longer shows in averages.
_SHARP = 1.8
#: A level of the texture serves from this ratio to twice this ratio; nearer to 1, averages of
#: averages would be sharper or softer by chance.
_REDUCED = 1.4


class BackgroundTexture:
    """The background of one scene.

    Args:
        background: Which tiles, and how they are laid.
        width: Columns of the scene in pixels.
        height: Rows of the scene in pixels.

    Raises:
        ImageError: A tile cannot be decoded.
    """

    def __init__(self, background: Background, width: int, height: int) -> None:
        self._enlarged = background.enlarged
        rng = np.random.default_rng(background.seed)
        cells = _Cells(background, rng)
        # The first row and column of cells has nothing to be blended with: it stays outside.
        self._left = self._top = cells.side
        columns = math.ceil((width / self._enlarged + cells.side) / cells.step) + 1
        rows = math.ceil((height / self._enlarged + cells.side) / cells.step) + 1
        self._levels = [cells.lay(rows, columns)]
        while min(self._levels[-1].size) > 64:
            self._levels.append(self._levels[-1].reduce(2))

    def read(
        self, x0: float, y0: float, x1: float, y1: float, size: tuple[int, int]
    ) -> Image.Image:
        """A window of the background.

        Args:
            x0: Left edge in scene pixels.
            y0: Upper edge.
            x1: Right edge.
            y1: Lower edge.
            size: (columns, rows) of the result.

        Returns:
            RGB image.
        """
        ratio = max((x1 - x0) / size[0], (y1 - y0) / size[1]) / self._enlarged
        level = min(max(0, math.floor(math.log2(ratio / _REDUCED))), len(self._levels) - 1)
        texture = self._levels[level]
        scale = 1 / (self._enlarged * 2**level)
        left, top = self._left / 2**level, self._top / 2**level
        box = (left + x0 * scale, top + y0 * scale, left + x1 * scale, top + y1 * scale)
        if ratio <= _ENLARGES:
            return texture.resize(size, Image.Resampling.BILINEAR, box)
        if ratio < _SHARP:
            texture, box = _interpolated(texture, box)
        return texture.resize(size, Image.Resampling.HAMMING, box)


def _interpolated(
    texture: Image.Image, box: tuple[float, float, float, float]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The part of the texture around a box, as soft as it is after linear enlargement.

    Linear interpolation is a triangle of variance 1/6 pixel; averages of the enlarged scene have
    it too, so the texture gets it before it is averaged. `BoxBlur(0.1)` has the same variance.
    """
    left, top = max(0, math.floor(box[0]) - 4), max(0, math.floor(box[1]) - 4)
    right = min(texture.width, math.ceil(box[2]) + 4)
    bottom = min(texture.height, math.ceil(box[3]) + 4)
    part = texture.crop((left, top, right, bottom)).filter(ImageFilter.BoxBlur(0.1))
    return part, (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


class _Cells:
    """Pictures of cells, and where they go."""

    def __init__(self, background: Background, rng: np.random.Generator) -> None:
        self._rng = rng
        tiles = background.tiles
        self.side = min(_CELL, *(min(tile.width, tile.height) for tile in tiles))
        self.step = self.side - round(_OVERLAP * self.side)
        self._seams = [self._seam() for _ in range(_SEAMS)]
        size = (self.side, self.side)
        how = Image.Resampling.HAMMING
        pictures = [np.asarray(decode(tile).resize(size, how), np.float32) for tile in tiles]
        self._by_label: list[list[NDArray[np.float32]]] = []
        for label in background.labels:
            held = [
                picture
                for tile, picture in zip(tiles, pictures, strict=True)
                if tile.label == label
            ]
            mean = np.mean([picture.mean(axis=(0, 1)) for picture in held], axis=0)
            self._by_label.append(
                [picture + _MATCHED * (mean - picture.mean(axis=(0, 1))) for picture in held]
            )
        self._drawn: dict[tuple[int, int, int, int], Image.Image] = {}

    def lay(self, rows: int, columns: int) -> Image.Image:
        """All cells, each over its left and upper neighbours."""
        first = self._by_label[0][0].mean(axis=(0, 1))
        red, green, blue = (round(float(value)) for value in first)
        size = (columns * self.step + self.side, rows * self.step + self.side)
        texture = Image.new("RGB", size, (red, green, blue))
        regions, shades = self._field(rows, columns), self._field(rows, columns)
        for row in range(rows):
            for column in range(columns):
                label = int(regions[row, column] * len(self._by_label))
                shade = int(shades[row, column] * len(_SHADES))
                which = int(self._rng.integers(len(self._by_label[label])))
                turn = int(self._rng.integers(8))
                seam = self._seams[int(self._rng.integers(_SEAMS))]
                at = (column * self.step, row * self.step)
                texture.paste(self._picture(label, which, turn, shade), at, seam)
        return texture

    def _picture(self, label: int, which: int, turn: int, shade: int) -> Image.Image:
        key = label, which, turn, shade
        if key not in self._drawn:
            shaded = np.clip(self._by_label[label][which] * _SHADES[shade], 0, 255)
            self._drawn[key] = turned(Image.fromarray(shaded.astype(np.uint8)), turn)
        return self._drawn[key]

    def _field(self, rows: int, columns: int) -> NDArray[np.float64]:
        """[rows, columns] in 0 to just below 1, changing slowly over some cells."""
        y, x = np.mgrid[0:rows, 0:columns]
        total = np.zeros((rows, columns))
        for _ in range(4):
            angle, phase = self._rng.uniform(0, 2 * math.pi, 2)
            along = x * math.cos(angle) + y * math.sin(angle)
            total += np.cos(2 * math.pi * along / self._rng.uniform(5, 14) + phase)
        field: NDArray[np.float64] = np.clip(0.5 + total / 5, 0, 1 - 1e-9)
        return field

    def _seam(self) -> Image.Image:
        """Opacity of a cell: soft and irregular at the left and upper edge, full elsewhere."""
        along = np.arange(self.side)
        softness = max(2.0, _SOFTNESS * self.side)
        room = self.side - self.step - softness
        left, top = (
            np.clip((along[None, :] - room * self._wave()[:, None]) / softness, 0, 1)
            for _ in range(2)
        )
        return Image.fromarray(np.round(255 * left * top.T).astype(np.uint8))

    def _wave(self) -> NDArray[np.float64]:
        """[side] in 0..1, a smooth line."""
        along = np.arange(self.side) / self.side
        total = np.zeros(self.side)
        for periods in (1, 2, 3, 5):
            strength, phase = self._rng.uniform(0.3, 1), self._rng.uniform(0, 2 * math.pi)
            total += strength / periods * np.cos(2 * math.pi * periods * along + phase)
        span = total.max() - total.min()
        wave: NDArray[np.float64] = (total - total.min()) / max(span, 1e-9)
        return wave

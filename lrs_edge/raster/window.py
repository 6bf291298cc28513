"""Reads one window of one level, strip by strip, from a source of native pixels.

Working memory does not depend on the image: a strip holds at most `STRIP_VALUES` values, and is
narrow enough that GDAL's block cache keeps the row of blocks that it lies in until the next strip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from lrs_edge.pyramid.box import PixelBox
from lrs_edge.raster.processor import (
    FILTERS,
    HALF,
    Filter,
    add_rows,
    filter_taps,
    resized_axis,
    rounded,
)
from lrs_edge.raster.resample import Taps, area_taps, combine, reference_taps
from lrs_edge.raster.source import Pixels, Source
from lrs_edge.raster.stretch import Tone

if TYPE_CHECKING:
    from lrs_edge.pyramid.levels import LevelWindow

Resampling = Literal["area", "reference"] | Filter

#: Values (pixels times planes) that a strip holds at once: 2 MiB as float32. Longer strips are no
#: faster, since these stay in the processor's cache.
STRIP_VALUES = 512 << 10
#: A row of blocks under one strip stays below this, so that GDAL's cache (16 MiB) keeps it. No
#: slower than 24 MiB in a cache of 64.
BLOCK_ROW_BYTES = 8 << 20
#: An overview may fall this much short of a level's resolution: levels are rounded up to tiles.
OVERVIEW_SLACK = 1.05
#: Long side in pixels of the sample that a stretch is taken from.
SAMPLE_SIDE = 1024
#: An image without overviews and with more pixels than this is sampled in patches.
_PATCHED_PIXELS = 50_000_000
_PATCHES, _PATCH_SIDE = 16, 64


class WindowReader:
    """Windows of one source through some of its bands.

    Attributes:
        bands: Bands read, 1-based, each once.
        alpha: Band that hides pixels, or None; not one of `bands`.
        masked: Whether the file's masks hide pixels; False looks past them.
    """

    def __init__(
        self, source: Source, bands: Sequence[int], alpha: int | None, *, masked: bool = True
    ) -> None:
        self._source = source
        self.bands = tuple(bands)
        self.alpha = alpha
        self.masked = masked

    @property
    def read_bands(self) -> tuple[int, ...]:
        """The bands and, after them, the alpha band."""
        return self.bands if self.alpha is None else (*self.bands, self.alpha)

    def pixels(
        self, box: PixelBox, overview: int | None = None, shape: tuple[int, int] | None = None
    ) -> Pixels:
        """Raw pixels of the bands and their visibility, alpha included. See `Source.read`."""
        raw, visible = self._source.read(self.read_bands, box, overview=overview, shape=shape)
        return self.split(raw, visible if self.masked else None)

    def split(self, raw: NDArray[Any], visible: NDArray[np.bool_] | None) -> Pixels:
        """Takes the alpha band, which is the last if there is one, into the visibility."""
        if self.alpha is None:
            return raw[: len(self.bands)], visible
        # Deeper alphas are not scaled alike by all writers (255 or 65535): any opacity counts.
        eight_bit = self._source.header.dtypes[self.alpha - 1] == "uint8"
        opaque = raw[-1] >= 128 if eight_bit else raw[-1] > 0
        return raw[: len(self.bands)], opaque if visible is None else visible & opaque

    def sample(self, patched_above: int | None = None) -> Pixels:
        """Pixels from all over the image, about `SAMPLE_SIDE` along its long side.

        Args:
            patched_above: Pixels from which on an image without overviews is sampled in patches,
                tiled or not; None for those that are tiled, from 50 million.
        """
        header = self._source.header
        overview, (height, width) = None, (header.height, header.width)
        for index in range(len(header.overviews)):
            size = self._source.size(index)
            if size is not None and max(height, width) > 2 * SAMPLE_SIDE:
                overview, (height, width) = index, size
        limit = patched_above if patched_above else _PATCHED_PIXELS if header.tiled else None
        if overview is None and limit is not None and height * width > limit:
            return self._patches(height, width)
        scale = max(height, width) / SAMPLE_SIDE
        shape = (max(round(height / scale), 1), max(round(width / scale), 1))
        return self.pixels((0, 0, width, height), overview, shape if scale > 1 else None)

    def _patches(self, height: int, width: int) -> Pixels:
        """A grid of small windows side by side: decodes a bounded number of blocks."""
        side_y, side_x = min(_PATCH_SIDE, height), min(_PATCH_SIDE, width)
        found = []
        for y in np.linspace(0, height - side_y, _PATCHES).astype(int).tolist():
            for x in np.linspace(0, width - side_x, _PATCHES).astype(int).tolist():
                found.append(self.pixels((x, y, x + side_x, y + side_y)))
        visible = [mask for _, mask in found if mask is not None]
        return (
            np.concatenate([raw for raw, _ in found], axis=2),
            np.concatenate(visible, axis=1) if visible else None,
        )

    def resample(
        self,
        tone: Tone,
        level_hw: tuple[int, int],
        window: LevelWindow,
        resampling: Resampling,
    ) -> NDArray[np.float32]:
        """Intensities of a window of the image resized to `level_hw`.

        Returns:
            float32 [planes, rows, cols] in 0..1. With `area`, pixels that do not count are left
            out of the mean; otherwise they are black pixels like any other.
        """
        overview, (height, width) = None, (self._source.header.height, self._source.header.width)
        if resampling in FILTERS:
            return self._filtered(tone, level_hw, window, cast(Filter, resampling))
        if resampling == "area":
            overview, (height, width) = self._overview_for(level_hw)
        make = area_taps if resampling == "area" else reference_taps
        out = np.zeros((tone.planes + 1, window.rows, window.cols), dtype=np.float32)
        wide = max(int(self._chunk_width() * level_hw[1] / width), 1)
        back_rows, back_cols = self._source.header.backwards
        for col in _steps(window.cols, wide, back_cols):
            cols = make(width, level_hw[1], window.col0 + col, min(wide, window.cols - col))
            # Rows are summed first, for as many outputs as fit: columns are then summed once.
            high = max(STRIP_VALUES // (2 * len(out) * len(cols.positions)), 1)
            for row in _steps(window.rows, high, back_rows):
                rows = make(height, level_hw[0], window.row0 + row, min(high, window.rows - row))
                summed = self._sum_rows(tone, rows, cols, overview)
                for plane, values in enumerate(summed):
                    done = combine(np.ascontiguousarray(values.T), cols)[1].T
                    out[plane, row : row + len(done), col : col + done.shape[1]] = done
        values, weight = out[:-1], out[-1]
        if resampling == "area":
            # The weight is 1 where nothing is hidden, up to rounding.
            seen = weight > 1e-6
            np.divide(values, weight, out=values, where=seen)
            values[:, ~seen] = 0
        return np.clip(values, 0, 1, out=values)

    def _filtered(
        self, tone: Tone, level_hw: tuple[int, int], window: LevelWindow, kind: Filter
    ) -> NDArray[np.float32]:
        """As `resample`, by a filter of Pillow on the full-resolution pixels as 8-bit values."""
        height, width = self._source.header.height, self._source.header.width
        cols = filter_taps(kind, width, level_hw[1], window.col0, window.cols)
        rows = filter_taps(kind, height, level_hw[0], window.row0, window.rows)
        needed = np.arange(cols.first, cols.last, dtype=np.int64)
        sums = np.full((window.rows, window.cols, tone.planes), HALF, np.int64)
        step = max(STRIP_VALUES // (len(needed) * tone.planes), 1)
        for begin in range(rows.first, rows.last, step):
            strip = np.arange(begin, min(begin + step, rows.last), dtype=np.int64)
            values, _ = tone.apply(*self._gather(strip, needed, None))
            pixels = np.rint(values * 255.0).astype(np.uint8).transpose(2, 1, 0)
            narrow = resized_axis(np.ascontiguousarray(pixels), cols)
            add_rows(sums, narrow.transpose(1, 0, 2), begin - rows.first, rows)
        return np.moveaxis(rounded(sums), -1, 0).astype(np.float32) / np.float32(255)

    def _sum_rows(
        self, tone: Tone, rows: Taps, cols: Taps, overview: int | None
    ) -> NDArray[np.float32]:
        """Needed columns summed into output rows: [planes and weight, rows, needed cols]."""
        width = len(cols.positions)
        out = np.zeros((tone.planes + 1, len(rows.starts), width), dtype=np.float32)
        costs = tone.planes * (4 if tone.palette is not None else 1)
        values = max(STRIP_VALUES // (width * costs), 1)
        for begin in _steps(len(rows.positions), values, self._source.header.backwards[0]):
            needed = rows.positions[begin : begin + values]
            strip, counts = tone.apply(*self._gather(needed, cols.positions, overview))
            for plane, data in enumerate(strip):
                first, share = combine(data, rows, begin)
                out[plane, first : first + len(share)] += share
            if counts is not None:
                first, share = combine(counts.astype(np.float32), rows, begin)
                out[-1, first : first + len(share)] += share
        if counts is None:
            out[-1] = 1
        return out

    def _overview_for(self, level_hw: tuple[int, int]) -> tuple[int | None, tuple[int, int]]:
        """The coarsest overview that is fine enough for a level, and its size."""
        header = self._source.header
        best: tuple[int | None, tuple[int, int]] = (None, (header.height, header.width))
        for index in range(len(header.overviews)):
            size = self._source.size(index)
            if (
                size is not None
                and size[0] * OVERVIEW_SLACK >= level_hw[0]
                and size[1] * OVERVIEW_SLACK >= level_hw[1]
                and size[0] <= best[1][0]
            ):
                best = index, size
        return best

    def _chunk_width(self) -> int:
        """Source columns that are read side by side."""
        header = self._source.header
        values = STRIP_VALUES // len(self.bands)
        if not header.tiled:
            # Narrower windows of a striped file decode the same strips again.
            return max(values, header.width)
        deep = header.block_shape[0] * header.dtype(self.read_bands).itemsize
        return min(values, max(BLOCK_ROW_BYTES // (deep * len(self.read_bands)), 256))

    def _gather(
        self, rows: NDArray[np.int64], cols: NDArray[np.int64], overview: int | None
    ) -> Pixels:
        """Raw pixels at ascending rows and columns, read in runs that skip what no block holds."""
        left, right = int(cols[0]), int(cols[-1]) + 1
        limit = max(STRIP_VALUES // ((right - left) * len(self.bands)), 1)
        parts, masks = [], []
        runs = list(_runs(rows, limit, max(self._source.header.block_shape[0], 1)))
        backwards = self._source.header.backwards[0]
        for run in reversed(runs) if backwards else runs:
            top, bottom = int(run[0]), int(run[-1]) + 1
            raw, visible = self.pixels((left, top, right, bottom), overview)
            if bottom - top != len(run) or right - left != len(cols):
                pick = np.ix_(run - top, cols - left)
                raw = raw[:, pick[0], pick[1]]
                visible = None if visible is None else visible[pick]
            parts.append(raw)
            if visible is not None:
                masks.append(visible)
        if len(parts) == 1:
            return parts[0], masks[0] if masks else None
        if backwards:
            parts.reverse()
            masks.reverse()
        return np.concatenate(parts, axis=1), np.concatenate(masks) if masks else None


def _steps(stop: int, step: int, backwards: bool) -> Sequence[int]:
    """0, step, ... below `stop`; the last first where the file is stored the other way round."""
    steps = range(0, stop, step)
    return steps[::-1] if backwards else steps


def _runs(positions: NDArray[np.int64], limit: int, gap: int) -> Iterator[NDArray[np.int64]]:
    """Cuts ascending positions into runs that span at most `limit` and have no gap over `gap`."""
    begin = 0
    while begin < len(positions):
        end = int(np.searchsorted(positions, positions[begin] + limit, side="left"))
        breaks = np.flatnonzero(np.diff(positions[begin:end]) > gap)
        if breaks.size:
            end = begin + int(breaks[0]) + 1
        yield positions[begin:end]
        begin = end

"""From the numbers in a file to intensities between 0 and 1, the same way for the whole image.

8-bit bands are divided by their largest value. Anything else is stretched linearly between two
values per band, which are found once per image so that all tiles agree. What cannot be seen
(nodata, transparent, not a number) is black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import ImageError

#: Percentiles of the valid pixels that become black and white.
PERCENTILES = (2.0, 98.0)
#: A pixel is seen where its alpha is at least this share of full opacity.
OPAQUE = 0.5


@dataclass(frozen=True)
class Tone:
    """How raw pixels of one image become intensities and which of them count.

    Attributes:
        ranges: Black and white of each band read, in the file's units; black is the larger where
            the file counts down from white.
        nodata: Nodata value of each band read, or None.
        palette: float32 [entries, 4] red, green, blue, alpha in 0..1 of an image with a colour
            table, or None.
    """

    ranges: tuple[tuple[float, float], ...]
    nodata: tuple[float | None, ...]
    palette: NDArray[np.float32] | None = None

    @property
    def planes(self) -> int:
        """Planes that `apply` returns: one per band, or three from a palette."""
        return len(self.ranges) if self.palette is None else 3

    def apply(
        self, raw: NDArray[np.generic], visible: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Intensities of raw pixels, and which pixels count.

        Args:
            raw: [bands, rows, cols] in the file's data type.
            visible: [rows, cols], False where the file's mask or alpha hides the pixel; None when
                it has neither.

        Returns:
            float32 [planes, rows, cols] in 0..1 with what cannot be seen at 0; and bool
            [rows, cols] of the pixels that count, or None when all do. A pixel counts unless it
            is hidden or every band of it is nodata or not finite; a single such band is black.
        """
        if self.palette is not None:
            with np.errstate(invalid="ignore"):
                index = raw[0].astype(np.int64)
            colours = self.palette[np.clip(index, 0, len(self.palette) - 1)]
            # Damaged files have values below the table, or none at all.
            opaque = (colours[..., 3] >= OPAQUE) & (index >= 0)
            if self.nodata[0] is not None and math.isfinite(self.nodata[0]):
                opaque &= ~is_nodata(raw[0], self.nodata[0])
            counts = opaque if visible is None else opaque & visible
            return np.moveaxis(colours[..., :3] * counts[..., None], -1, 0), counts
        present = valid_values(raw, self.nodata)
        counts = visible
        if present is not None:
            some = present.any(axis=0)
            counts = some if visible is None else some & visible
        planes = np.empty(raw.shape, dtype=np.float32)
        for band, (low, high) in enumerate(self.ranges):
            self._scale(raw[band], low, high, planes[band])
        if present is not None:
            planes[~present] = 0
        if counts is not None:
            planes *= counts
        return planes, counts

    @staticmethod
    def _scale(
        band: NDArray[np.generic], low: float, high: float, out: NDArray[np.float32]
    ) -> None:
        """Writes (band - low) / (high - low), cut to 0..1."""
        if band.dtype == np.uint8 and low == 0:
            np.divide(band, np.float32(high), out=out)
            if high < 255:
                np.minimum(out, 1, out=out)
        else:
            # Wide types keep float64 until the offset is gone: 1e9 + 1 is not a float32.
            narrow = band.dtype.itemsize <= 2 or band.dtype == np.float32
            values: NDArray[Any] = band.astype(np.float32 if narrow else np.float64)
            with np.errstate(all="ignore"):
                values -= low
                values /= high - low
            out[...] = np.clip(values, 0, 1)


def valid_values(
    raw: NDArray[np.generic], nodata: tuple[float | None, ...]
) -> NDArray[np.bool_] | None:
    """Values that are finite and not nodata: bool like `raw`, or None when all must be."""
    floating = np.issubdtype(raw.dtype, np.floating)
    if not floating and all(value is None for value in nodata):
        return None
    valid = np.isfinite(raw) if floating else np.ones(raw.shape, dtype=bool)
    for band, value in enumerate(nodata):
        if value is not None and math.isfinite(value):
            valid[band] &= ~is_nodata(raw[band], value)
    return valid


def is_nodata(values: NDArray[Any], nodata: float) -> NDArray[np.bool_]:
    """Which values GDAL takes for nodata: bool like `values`.

    Floating point numbers need only be close (`ARE_REAL_EQUAL` in GDAL's gdal_priv.h), because
    writers round nodata: -3.402823e38 in the header hides -3.4028235e38 in the pixels. The sum of
    two such numbers overflows, and the test then holds for whatever is near the smallest float.

    Args:
        values: Of one band.
        nodata: Its nodata value, finite.
    """
    if np.issubdtype(values.dtype, np.floating):
        real: Any = values.dtype.type
        limit = real(2 * np.finfo(values.dtype).eps)
        with np.errstate(all="ignore"):
            wanted = real(nodata)
            equal = np.abs(values - wanted) < limit * np.abs(values + wanted)
        return np.asarray(equal | (values == wanted))
    if values.dtype.kind not in "iu":
        return np.asarray(values == nodata)
    # Integers are compared with the nodata value cut to their type, unless it is out of range.
    info = np.iinfo(values.dtype)
    if not info.min <= nodata <= info.max:
        return np.zeros(values.shape, dtype=bool)
    return np.asarray(values == int(nodata))


def percentile_ranges(
    raw: NDArray[np.generic],
    visible: NDArray[np.bool_] | None,
    nodata: tuple[float | None, ...],
) -> tuple[tuple[tuple[float, float], ...], bool]:
    """Black and white of each band from a sample of the image.

    Args:
        raw: [bands, rows, cols] sample in the file's data type.
        visible: [rows, cols] as in `Tone.apply`.
        nodata: Nodata value per band, or None.

    Returns:
        Low and high per band, low < high always: the `PERCENTILES` of the valid values; their
        extremes where the percentiles coincide; a range with the value in its middle where the
        band is constant; (0, 1) where nothing is valid. And whether some band has nothing valid.
    """
    present = valid_values(raw, nodata)
    ranges, empty = [], False
    for band, values in enumerate(raw):
        keep = np.ones(values.shape, dtype=bool) if present is None else present[band]
        kept = values[keep if visible is None else keep & visible].astype(np.float64)
        ranges.append(_range(kept))
        empty |= kept.size == 0
    return tuple(ranges), empty


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    if low >= high:
        low, high = float(values.min()), float(values.max())
    if low >= high:
        half = max(1.0, abs(low) * 1e-3)
        low, high = low - half, high + half
    return low, high


def check_range(value_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats.

    Raises:
        ImageError: Not two finite numbers, the first below the second.
    """
    try:
        low, high = (float(value) for value in value_range)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ImageError(
            f"value range {value_range!r} is not two finite numbers with low < high; "
            "give for example 0,3000"
        )
    return low, high

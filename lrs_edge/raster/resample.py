"""Resampling one axis at a time: which source pixels make an output pixel, and how much of each.

Pure numpy; nothing here opens a file. An image is resized to a level by one `Taps` for its rows
and one for its columns. Taps address only the outputs of the window that is wanted, so a window
computed alone equals the same window cut from the whole level. Partial sums over strips of the
source add up to the full sum, which is what lets `raster.py` read strip by strip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Up to so many taps, outputs are summed all at once tap by tap; with more, one by one.
_FEW_TAPS = 4


@dataclass(frozen=True)
class Taps:
    """Weights of source pixels for consecutive outputs along one axis.

    Attributes:
        positions: Source pixels that are needed at all, ascending, int64 [needed].
        starts: For each output the place in `positions` of its first source pixel, ascending,
            int64 [outputs].
        counts: For each output how many places of `positions` from there on it takes, int64
            [outputs].
        weights: Their weights, float32 [outputs, most taps]; each row sums to 1 and is zero
            after its count.
    """

    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.float32]


def area_taps(source: int, target: int, first: int, count: int) -> Taps:
    """Box averaging from `source` to `target` pixels, or bilinear where that enlarges.

    Args:
        source: Pixels of the whole axis in the source.
        target: Pixels of the whole axis in the level.
        first: First output wanted.
        count: Outputs wanted, at least 1.

    Returns:
        Taps in which output i covers the source interval [i, i + 1) * source / target exactly,
        pixels cut by its ends counting in part.
    """
    if target > source:
        place = np.clip((np.arange(first, first + count) + 0.5) * (source / target) - 0.5, 0, None)
        low = np.minimum(place.astype(np.int64), source - 1)
        return _linear(low, (place - low).astype(np.float32), source)
    # Integer arithmetic: neighbouring outputs must agree on the pixel that they share.
    outputs = np.arange(first, first + count, dtype=np.int64)
    low, high = outputs * source // target, -(-(outputs + 1) * source // target)
    pixels = low[:, None] + np.arange(int((high - low).max()))
    begin, end = (outputs * source)[:, None], ((outputs + 1) * source)[:, None]
    covered = np.minimum((pixels + 1) * target, end) - np.maximum(pixels * target, begin)
    weights = (np.maximum(covered, 0) / source).astype(np.float32)
    return Taps(np.arange(low[0], high[-1], dtype=np.int64), low - low[0], high - low, weights)


def reference_taps(source: int, target: int, first: int, count: int) -> Taps:
    """Bilinear without antialiasing, as torch computes it for float32 images.

    Equals `F.interpolate(mode="bilinear", align_corners=False, antialias=False)` on a CPU with
    fused multiply-add: scale, source coordinate and weights are float32, because at 27,328 pixels
    float64 would differ by 1e-3, and the coordinate is rounded once.

    Args:
        source: Pixels of the whole axis in the source.
        target: Pixels of the whole axis in the level.
        first: First output wanted.
        count: Outputs wanted, at least 1.
    """
    scale = np.float32(source) / np.float32(target)
    outputs = np.arange(first, first + count).astype(np.float32) + np.float32(0.5)
    # The product of two float32 is exact in float64: this is float32 fma(scale, output, -0.5).
    place = (np.float64(scale) * outputs.astype(np.float64) - 0.5).astype(np.float32)
    place = np.maximum(place, np.float32(0))
    low = np.minimum(place.astype(np.int64), source - 1)
    fraction = np.clip(place - low.astype(np.float32), np.float32(0), np.float32(1))
    return _linear(low, fraction, source)


def _linear(low: NDArray[np.int64], fraction: NDArray[np.float32], source: int) -> Taps:
    """Taps of two neighbours; at the far edge both are the last pixel."""
    high = np.minimum(low + 1, source - 1)
    positions = np.unique(np.concatenate([low, high]))
    second = np.where(high > low, fraction, np.float32(0))
    weights = np.stack([np.float32(1) - second, second], axis=1)
    return Taps(positions, np.searchsorted(positions, low), 1 + high - low, weights)


def combine(
    data: NDArray[np.float32], taps: Taps, offset: int = 0
) -> tuple[int, NDArray[np.float32]]:
    """Sums a strip of an axis into the outputs that it touches.

    Args:
        data: float32 [strip, rest]: the source pixels `taps.positions[offset:offset + strip]`.
        taps: The axis.
        offset: Place of the strip's first pixel in `taps.positions`.

    Returns:
        The first output touched, and float32 [touched, rest]: this strip's share of the outputs
        from there on. The shares of all strips sum to the resampled axis.
    """
    strip = len(data)
    first = int(np.searchsorted(taps.starts + taps.counts, offset, side="right"))
    last = int(np.searchsorted(taps.starts, offset + strip, side="left"))
    starts, weights = taps.starts[first:last] - offset, taps.weights[first:last]
    result = np.zeros((max(last - first, 0), data.shape[1]), dtype=np.float32)
    if weights.shape[1] <= _FEW_TAPS:
        for tap in range(weights.shape[1]):
            places = starts + tap
            inside = (places >= 0) & (places < strip)
            share = np.where(inside, weights[:, tap], np.float32(0))
            result += share[:, None] * data[np.clip(places, 0, strip - 1)]
        return first, result
    ends = starts + taps.counts[first:last]
    for row, (start, low, high) in enumerate(
        zip(starts.tolist(), np.maximum(starts, 0), np.minimum(ends, strip), strict=True)
    ):
        # Not np.dot: BLAS would start threads for each of these short sums.
        part = weights[row, low - start : high - start]
        np.einsum("i,ij->j", part, data[low:high], out=result[row])
    return first, result

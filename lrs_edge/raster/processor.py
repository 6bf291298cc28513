"""Resizing as image processors do it: Pillow's filters on 8-bit values, window by window.

Pillow resizes along rows first and along columns then, each with weights of 22 bits, and rounds to
8 bits after both. A window computed here equals the same window cut from the whole image that
Pillow resized, to the last bit, without the whole image in memory. (Pillow 13 goes the other way
round where an image loses more than twice as many rows as columns; values there differ by a few
units in the last of 8 bits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

#: Filters by the names that Pillow has for them.
Filter = Literal["bilinear", "bicubic", "lanczos"]
FILTERS: tuple[str, ...] = get_args(Filter)

_BITS = 22

#: What sums begin with, so that cutting bits off rounds.
HALF = 1 << (_BITS - 1)


@dataclass(frozen=True)
class FilterTaps:
    """Weights of source pixels for consecutive outputs along one axis.

    Attributes:
        first: First source pixel that is needed.
        last: Source pixel after the last.
        starts: First source pixel of each output, counted from `first`, int64 [outputs].
        weights: In 2 ** -22, int64 [outputs, most taps], zero where an output has fewer.
    """

    first: int
    last: int
    starts: NDArray[np.int64]
    weights: NDArray[np.int64]


def filter_taps(kind: Filter, source: int, target: int, first: int, count: int) -> FilterTaps:
    """Pillow's `precompute_coeffs` for some outputs of an axis.

    Args:
        kind: Of the filter.
        source: Pixels of the whole axis in the source.
        target: Pixels of the whole axis in the level.
        first: First output wanted.
        count: Outputs wanted, at least 1.
    """
    function, radius = _FUNCTIONS[kind]
    scale = source / target
    spread = max(scale, 1.0)
    support = radius * spread
    centres = (np.arange(first, first + count) + 0.5) * scale
    # The values are positive, or cut at zero: truncation is what C does.
    low = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centres + support + 0.5).astype(np.int64), source)
    taps = np.arange(int((high - low).max()))
    inside = taps < (high - low)[:, None]
    places = (taps + low[:, None] - centres[:, None] + 0.5) * (1.0 / spread)
    weights = np.where(inside, function(places), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    scaled = weights * (1 << _BITS)
    whole = np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5)).astype(np.int64)
    return FilterTaps(int(low[0]), int(high[-1]), low - low[0], np.where(inside, whole, 0))


def resized_axis(values: NDArray[np.uint8], taps: FilterTaps) -> NDArray[np.uint8]:
    """Resize along the first axis: uint8 [last - first, ...] to uint8 [outputs, ...]."""
    sums = np.full((len(taps.starts), *values.shape[1:]), HALF, np.int64)
    for tap in range(taps.weights.shape[1]):
        share = taps.weights[:, tap].reshape(-1, *[1] * (values.ndim - 1))
        # Beyond an output's last pixel weights are zero.
        sums += share * values[np.minimum(taps.starts + tap, len(values) - 1)]
    return rounded(sums)


def add_rows(
    sums: NDArray[np.int64], values: NDArray[np.uint8], offset: int, taps: FilterTaps
) -> None:
    """Add a strip's share to the outputs that it touches, in place.

    Args:
        sums: int64 [outputs, ...], which begin as `HALF`.
        values: uint8 [strip, ...], the pixels from `offset` on.
        offset: Place of the strip's first pixel, counted from `taps.first`.
        taps: The axis.
    """
    most = taps.weights.shape[1]
    for place in range(len(values)):
        pixel = offset + place
        # Starts ascend: the outputs that a pixel touches lie side by side.
        begin = int(np.searchsorted(taps.starts, pixel - most + 1, side="left"))
        end = int(np.searchsorted(taps.starts, pixel, side="right"))
        if begin == end:
            continue
        share = taps.weights[np.arange(begin, end), pixel - taps.starts[begin:end]]
        sums[begin:end] += share.reshape(-1, *[1] * (values.ndim - 1)) * values[place]


def rounded(sums: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Sums as 8-bit values."""
    values: NDArray[np.uint8] = np.clip(sums >> _BITS, 0, 255).astype(np.uint8)
    return values


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3.0), 0.0)


def _sinc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = np.where(x == 0.0, 1.0, x) * math.pi
    return np.where(x == 0.0, 1.0, np.sin(angle) / angle)


_Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]

#: The function of each filter and its radius.
_FUNCTIONS: dict[str, tuple[_Function, float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}

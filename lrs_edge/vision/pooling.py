"""Local tokens of a tile out of all of its tokens; `on_device.py` does the same on a device."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def pooled(
    tokens: NDArray[np.float32], pool: int, pooling: Literal["mean", "bilinear"] = "mean"
) -> NDArray[np.float32]:
    """Local tokens of one tile, row-major.

    Args:
        tokens: float32 [G * G, D].
        pool: By which the side G is divided, rounded up.
        pooling: `mean` of pool x pool neighbours, where pool divides G, or `bilinear`. By 2 of an
            even side, both are the same, and the reference's halving of its 24 x 24 tokens.

    Returns:
        float32 [P * P, D], P = ceil(G / pool).
    """
    side, width = math.isqrt(len(tokens)), tokens.shape[1]
    short = -(-side // pool)
    if pooling == "bilinear" and side % pool:
        weights = _bilinear(side, short)
        down = (weights @ tokens.reshape(side, side * width)).reshape(short, side, width)
        return np.ascontiguousarray((weights @ down).reshape(short * short, width))
    blocks = tokens.reshape(short, pool, short, pool, -1)
    return np.ascontiguousarray(blocks.mean((1, 3), dtype=np.float32).reshape(short * short, -1))


@cache
def _bilinear(size: int, wanted: int) -> NDArray[np.float32]:
    """Weights float32 [wanted, size] of linear interpolation between centres, edges repeated."""
    below, above, share = between(size, wanted)
    rows = np.arange(wanted)
    weights = np.zeros((wanted, size))
    np.add.at(weights, (rows, below), 1 - share)
    np.add.at(weights, (rows, above), share)
    return weights.astype(np.float32)


def between(
    size: int, wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Places below and above [wanted] on a side of `size`, and the share of the latter.

    For linear interpolation between centres, edges repeated.
    """
    places = np.maximum((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0.0)
    below = places.astype(np.int64)
    return below, np.minimum(below + 1, size - 1), places - below

"""What x86 processors without VNNI make of uint8 times int8: PMADDUBSW, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def saturating_product(
    x: NDArray[np.uint8], weight: NDArray[np.int8], zero: int
) -> NDArray[np.int32]:
    """(x - zero) @ weight as onnxruntime's AVX2 kernel computes it.

    Two neighbouring products are added in 16 bits and cut off there; the sums are added in 32 bits,
    and the zero point's share, known exactly, is taken away in the end.

    Args:
        x: uint8 [M, K].
        weight: int8 [K, N].
        zero: Zero point of x.
    """
    if len(weight) % 2:
        x, weight = np.pad(x, ((0, 0), (0, 1))), np.pad(weight, ((0, 1), (0, 0)))
    products = x.astype(np.int32)[:, :, None] * weight.astype(np.int32)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    sums = np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=1, dtype=np.int64)
    exact: NDArray[np.int32] = (sums - zero * weight.sum(axis=0, dtype=np.int64)).astype(np.int32)
    return exact

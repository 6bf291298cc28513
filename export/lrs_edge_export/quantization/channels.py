"""Weights as int8 with one scale per output channel, for products that are computed in integers.

x86 processors with AVX2 and without VNNI multiply uint8 inputs by int8 weights with PMADDUBSW: two
neighbouring products are added in 16 bits, and a sum beyond 32,767 is cut off without a word. So
two neighbouring weights of one output must not reach further than that together: 255 times their
sum of either sign stays within 16 bits where it is at most 128. A channel's scale is made large
enough for that, which costs less than a bit: two large weights of one sign seldom are neighbours.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW; the layout of
onnxruntime's packed weights (four inputs of one output side by side, so pairs are the inputs 2i and
2i + 1) is in its `mlas/lib/qgemm_kernel_avx2.cpp`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrs_edge_export.checkpoints.tensors import Array

#: Largest weight, as for other int8 weights: -128 has no counterpart.
MOST = 127

#: Largest sum of two neighbouring weights of one sign: 255 * 128 is the last multiple in 16 bits.
MOST_PAIR = 128


def quantize_channels(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Symmetric int8 whose products with uint8 inputs are exact on every processor.

    Args:
        weight: float32 [N, K], one row per output.

    Returns:
        int8 [N, K], and float32 scales [N]: weight = int8 * scale, about.
    """
    reach = np.abs(weight).max(axis=1)
    for part in (np.maximum(weight, 0), np.maximum(-weight, 0)):
        reach = np.maximum(reach, pair_sums(part).max(axis=1))
    # Rounding adds at most a half to each of two weights: 127 becomes 128.
    scale = reach.astype(np.float32) / np.float32(MOST)
    scale[scale == 0] = 1.0
    rounded = np.rint(weight / scale[:, None])
    return np.clip(rounded, -MOST, MOST).astype(np.int8), scale


def pair_sums(rows: Array) -> Array:
    """Sums of the columns 2i and 2i + 1 of [N, K], [N, ceil(K / 2)]; a last one alone is itself."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    sums: Array = rows[:, 0::2] + rows[:, 1::2]
    return sums


def saturates(weight: NDArray[np.integer]) -> bool:
    """Whether uint8 inputs exist with which a 16-bit sum of two products of int8 [N, K] is cut off.

    The layout in graphs is [K, N]: give the transpose.
    """
    wide = weight.astype(np.int32)
    return any(
        bool((pair_sums(part) > MOST_PAIR).any())
        for part in (np.maximum(wide, 0), np.maximum(-wide, 0))
    )

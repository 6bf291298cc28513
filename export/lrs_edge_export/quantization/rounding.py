"""Weights as integers with a scale per block of inputs, each rounded on its own.

A block is `block` consecutive inputs of one output; the last may be shorter. A weight is its
integer times its block's scale. For few bits a scale may be negative, as in ggml's Q4_0: so the
block's largest weight is on the side of -8, whatever its own sign. (TensorRT takes positive scales
only; for it a block has to be negated together with its scale, and -8 clipped to -7.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.tensors import Array

#: Weights worked on at a time, so that a large matrix takes little memory beside itself.
CHUNK = 1 << 24

#: Sizes of the scale that are tried for few bits: largest weight over largest integer, times these.
SHRINK = tuple(1.04 - 0.02 * step for step in range(24))

#: Up to this many bits a scale is searched; beyond, the largest weight is worth its step.
_SEARCHED_BITS = 4


class Quantized(NamedTuple):
    """A weight as integers.

    Attributes:
        integers: int8 [N, K].
        scales: float32 [N, ceil(K / block)], never 0; all positive for more than 4 bits.
    """

    integers: NDArray[np.int8]
    scales: Array


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer: symmetric for 8 bits, all 16 values for 4 bits.

    Raises:
        ValueError: Not 2 to 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"weights have 2 to 8 bits here, not {bits}")
    most = (1 << (bits - 1)) - 1
    return (-most - 1 if bits <= _SEARCHED_BITS else -most), most


def round_to_nearest(weight: Array, bits: int, block: int) -> Quantized:
    """Round every weight to the nearest integer of its block's scale.

    Args:
        weight: float32 [N, K].
        bits: 2 to 8. Up to 4, each scale is the one of a grid with the smallest squared error.
        block: Inputs that share a scale; K or more for one scale per output.
    """
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty((len(weight), -(-weight.shape[1] // block)), np.float32)
    for rows in row_chunks(weight.shape):
        part = torch.from_numpy(weight[rows])
        scale = block_scales(part, bits, block)
        wide = scale.repeat_interleave(block, 1)[:, : weight.shape[1]]
        integers[rows] = (part / wide).round_().clamp_(*limits(bits)).to(torch.int8).numpy()
        scales[rows] = scale.numpy()
    return Quantized(integers, scales)


def dequantize(quantized: Quantized, block: int) -> Array:
    """The weight float32 [N, K] that integers and scales stand for."""
    integers, scales = quantized
    wide = np.repeat(scales, block, axis=1)[:, : integers.shape[1]]
    weight: Array = integers * wide
    return weight


def row_chunks(shape: tuple[int, ...]) -> list[slice]:
    """Rows of a matrix [N, K] in pieces of at most CHUNK elements, one row at least."""
    step = max(CHUNK // max(shape[1], 1), 1)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def block_scales(weight: Tensor, bits: int, block: int, importance: Tensor | None = None) -> Tensor:
    """Scale of every block, [N, ceil(K / block)], never 0; all positive for more than 4 bits.

    Args:
        weight: float32 [N, K].
        bits: 2 to 8.
        block: Inputs that share a scale.
        importance: [K], what the squared error of each input counts; None for 1. Used where scales
            are searched.
    """
    rows, columns = weight.shape
    block = min(block, columns)
    count = -(-columns // block)
    blocks = F.pad(weight, (0, count * block - columns)).view(rows, count, block)
    low, high = limits(bits)
    sign = torch.ones(rows, count)
    if bits <= _SEARCHED_BITS:
        # There is one more integer below 0: the larger end goes there.
        sign[blocks.amax(2) > -blocks.amin(2)] = -1.0
        blocks = blocks * sign[:, :, None]
    # The scale that just reaches the largest value on either side.
    whole = torch.maximum(blocks.amax(2) / high, blocks.amin(2) / low)
    whole = torch.where(whole > 0, whole, torch.ones(()))
    if bits > _SEARCHED_BITS:
        return whole
    counts = torch.ones(()) if importance is None else _padded(importance, count, block)
    best = torch.full((rows, count), torch.inf)
    chosen = whole
    for factor in SHRINK:
        scale = whole * factor
        error = (blocks / scale[:, :, None]).round_().clamp_(low, high).mul_(scale[:, :, None])
        loss = error.sub_(blocks).square_().mul_(counts).sum(2)
        better = loss < best
        best, chosen = torch.where(better, loss, best), torch.where(better, scale, chosen)
    return chosen * sign


def _padded(importance: Tensor, count: int, block: int) -> Tensor:
    """Importance [count, block], scaled so that sums of squares neither overflow nor vanish."""
    mean = importance.mean()
    even = importance / mean if mean > 0 else torch.ones_like(importance)
    # Inputs that were never seen count a little, so that their weights stay what they are.
    return F.pad(even.clamp(min=1e-4), (0, count * block - len(importance))).view(count, block)

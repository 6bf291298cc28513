"""Weights as integers with a scale per block of inputs, each rounded on its own.

A block is `block` consecutive inputs of one output; the last may be shorter. A weight is its
integer times its block's scale. For few bits a scale may be negative, as in ggml's Q4_0: so the
block's largest weight is on the side of -8, whatever its own sign. (TensorRT takes positive scales
only; for it a block has to be negated together with its scale, and -8 clipped to -7.)

With zero points a weight is its integer less the block's zero point, times the scale: the grid
reaches as far above zero as the block's weights do, and as far below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        zeros: int8 [N, ceil(K / block)], in the integers' range; None where all are 0.
    """

    integers: NDArray[np.int8]
    scales: Array
    zeros: NDArray[np.int8] | None = None


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer: symmetric for 8 bits, all 16 values for 4 bits.

    Raises:
        ValueError: Not 2 to 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"weights have 2 to 8 bits here, not {bits}")
    most = (1 << (bits - 1)) - 1
    return (-most - 1 if bits <= _SEARCHED_BITS else -most), most


def round_to_nearest(
    weight: Array, bits: int, block: int, *, zero_points: bool = False
) -> Quantized:
    """Round every weight to the nearest integer of its block's scale.

    Args:
        weight: float32 [N, K].
        bits: 2 to 8. Up to 4, each scale is the one of a grid with the smallest squared error.
        block: Inputs that share a scale; K or more for one scale per output.
        zero_points: Whether blocks have zero points, too.
    """
    integers = np.empty(weight.shape, np.int8)
    grids = find_grids(weight, bits, block, zero_points=zero_points)
    for rows in row_chunks(weight.shape):
        steps = torch.from_numpy(weight[rows] / _wide(grids.scales[rows], block, weight.shape[1]))
        if grids.zeros is not None:
            steps += torch.from_numpy(_wide(grids.zeros[rows], block, weight.shape[1]))
        integers[rows] = steps.round_().clamp_(*limits(bits)).to(torch.int8).numpy()
    return Quantized(integers, *grids)


class Grids(NamedTuple):
    """Scales float32, and zero points int8 if any, of all blocks, [N, ceil(K / block)] each."""

    scales: Array
    zeros: NDArray[np.int8] | None


def find_grids(
    weight: Array,
    bits: int,
    block: int,
    importance: Tensor | None = None,
    *,
    zero_points: bool,
) -> Grids:
    """Grids of a whole matrix [N, K]; see `block_scales` and `block_grids`."""
    shape = len(weight), -(-weight.shape[1] // block)
    scales, zeros = np.empty(shape, np.float32), np.zeros(shape, np.int8)
    for rows in row_chunks(weight.shape):
        part = torch.from_numpy(weight[rows])
        if zero_points:
            scale, zero = block_grids(part, bits, block, importance)
            zeros[rows] = zero.to(torch.int8).numpy()
        else:
            scale = block_scales(part, bits, block, importance)
        scales[rows] = scale.numpy()
    return Grids(scales, zeros if zero_points else None)


def _wide(values: NDArray[Any], block: int, columns: int) -> NDArray[Any]:
    """Values of blocks for each input, [n, K]."""
    return np.repeat(values, block, axis=1)[:, :columns]


def dequantize(quantized: Quantized, block: int) -> Array:
    """The weight float32 [N, K] that integers and scales stand for."""
    integers, scales, zeros = quantized
    count = integers.shape[1]
    steps = integers.astype(np.float32)
    if zeros is not None:
        steps -= np.repeat(zeros, block, axis=1)[:, :count]
    weight: Array = steps * np.repeat(scales, block, axis=1)[:, :count]
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


def block_grids(
    weight: Tensor, bits: int, block: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale, always positive, and zero point of every block, [N, ceil(K / block)] each.

    Of grids that reach from the block's smallest weight to its largest, or less far, that with the
    smallest squared error.

    Args:
        weight: float32 [N, K].
        bits: 2 to 8.
        block: Inputs that share a grid.
        importance: As for `block_scales`.
    """
    rows, columns = weight.shape
    block = min(block, columns)
    count = -(-columns // block)
    blocks = F.pad(weight, (0, count * block - columns)).view(rows, count, block)
    low, high = limits(bits)
    counts = torch.ones(()) if importance is None else _padded(importance, count, block)
    # Zero is on every grid: inputs that are padded, and weights that are 0, stay what they are.
    least, most = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    whole = (most - least) / (high - low)
    whole = torch.where(whole > 0, whole, torch.ones(()))
    best = torch.full((rows, count), torch.inf)
    chosen, zeros = whole, torch.zeros(rows, count)
    for factor in SHRINK:
        scale = whole * factor
        # What is cut off is cut off at both ends alike. More freedom than that serves the inputs
        # that count most, and what GPTQ feeds back to the others then lies beyond their grids.
        zero = ((low + high - (least + most) / scale) / 2).round().clamp(low, high)
        steps = (blocks / scale[:, :, None] + zero[:, :, None]).round_().clamp_(low, high)
        error = steps.sub_(zero[:, :, None]).mul_(scale[:, :, None]).sub_(blocks)
        loss = error.square_().mul_(counts).sum(2)
        better = loss < best
        best, chosen = torch.where(better, loss, best), torch.where(better, scale, chosen)
        zeros = torch.where(better, zero, zeros)
    return chosen, zeros


def _padded(importance: Tensor, count: int, block: int) -> Tensor:
    """Importance [count, block], scaled so that sums of squares neither overflow nor vanish."""
    mean = importance.mean()
    even = importance / mean if mean > 0 else torch.ones_like(importance)
    # Inputs that were never seen count a little, so that their weights stay what they are.
    return F.pad(even.clamp(min=1e-4), (0, count * block - len(importance))).view(count, block)

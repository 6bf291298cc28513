"""Weights as ONNX Runtime's MatMulNBits takes them: for each output its blocks, bit by bit.

The operator has the weight as the engine's kernels read it, but for an order of their own. Of
DequantizeLinear and MatMul the engine makes the same operator when it loads a graph, with the same
numbers, and holds the weights once more for that (`docs/quantization.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge_export.quantization import Quantized

#: Inputs in int8 inside the product, a scale per block, where the processor has a kernel for it:
#: what onnxruntime sets itself when it makes the operator of DequantizeLinear and MatMul.
ACCURACY_LEVEL = 4


def attributes(shape: tuple[int, int], bits: int, block: int) -> Mapping[str, Any]:
    """The operator's attributes.

    Args:
        shape: Outputs N and inputs K of the weight.
        bits: 4 or 8.
        block: Inputs that share a scale: a power of two, at least 16.
    """
    outputs, inputs = shape
    return {
        "N": outputs,
        "K": inputs,
        "bits": bits,
        "block_size": block,
        "accuracy_level": ACCURACY_LEVEL,
    }


def layout(
    shape: tuple[int, int], bits: int, block: int, floats: type[np.floating], *, zero_points: bool
) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """What follows the weight's name, type and shape of each tensor, in the operator's order.

    Args:
        shape: See `attributes`.
        bits: 4 or 8.
        block: Inputs that share a scale.
        floats: Type of the scales, and of what is multiplied.
        zero_points: Whether blocks have zero points.
    """
    outputs, inputs = shape
    blocks, byte = -(-inputs // block), np.dtype(np.uint8)
    tensors = [
        (f"blocks{bits}", byte, (outputs, blocks, block * bits // 8)),
        (f"scale{bits}", np.dtype(floats), (outputs * blocks,)),
    ]
    if zero_points:
        tensors.append((f"zero{bits}", byte, (outputs * -(-blocks * bits // 8),)))
    return tensors


def packed(quantized: Quantized, bits: int, block: int) -> tuple[NDArray[Any], ...]:
    """Some outputs of a weight, in the operator's layout: one array for each tensor of `layout`.

    Integers are unsigned, and what was 0 is half of their range: the operator's own zero point,
    where none is given. The last block is filled up with it.

    Args:
        quantized: Integers [n, K], their scales and zero points.
        bits: 4 or 8.
        block: Inputs that share a scale.
    """
    integers, scales, zeros = quantized
    count, inputs = integers.shape
    blocks = -(-inputs // block)
    whole = np.zeros((count, blocks * block), np.int8)
    whole[:, :inputs] = integers
    parts: list[NDArray[Any]] = [_bits(whole, bits).reshape(count, blocks, -1), scales]
    if zeros is not None:
        parts.append(_bits(zeros, bits))
    return tuple(parts)


def _bits(integers: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Rows of signed integers as unsigned ones, the first of two 4-bit ones in the low half."""
    shifted = (integers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        return shifted
    if shifted.shape[1] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 1)))
    joined: NDArray[np.uint8] = (shifted[:, 0::2] | shifted[:, 1::2] << 4).astype(np.uint8)
    return joined

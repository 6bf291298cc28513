"""GPTQ: a weight's rounding errors are made up for by the weights that are not rounded yet.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, https://arxiv.org/abs/2210.17323. Inputs are rounded in the order of their second moments
(the authors' `act_order`), with every block's scale fixed before (`static_groups`), so that the
layout is that of plain rounding. Errors are fed back inside each diagonal block of the Hessian,
which bounds memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.quantization.rounding import CHUNK, Quantized, find_grids, limits

#: Inputs whose errors are gathered before the rest of the block is corrected at once.
_BATCH = 128

#: Damping is raised tenfold this often before a matrix counts as hopeless.
_ATTEMPTS = 6


def gptq(
    weight: Array,
    bits: int,
    block: int,
    second_moments: Sequence[Array],
    damping: float = 0.01,
    *,
    zero_points: bool = False,
) -> Quantized:
    """Quantize a weight so that its output on known inputs changes little.

    Takes, beside the result, about four matrices of the largest diagonal block and a few times
    CHUNK floats: some 0.7 GB for blocks of 4096, by counting, not measured.

    Args:
        weight: float32 [N, K].
        bits: 2 to 8.
        block: Inputs that share a scale.
        second_moments: Diagonal blocks of X^T X / n for inputs X [n, K], float32, together K.
        damping: Share of the mean second moment that is added to each.
        zero_points: Whether blocks have zero points, too.

    Raises:
        ValueError: The moments do not fit the weight, or are not finite.
    """
    rows, columns = weight.shape
    if sum(len(moments) for moments in second_moments) != columns:
        raise ValueError(
            f"second moments of {sum(map(len, second_moments))} inputs do not fit a weight of "
            f"{columns}"
        )
    diagonal = torch.from_numpy(np.concatenate([moments.diagonal() for moments in second_moments]))
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("second moments are not finite; look for inputs that are not")
    grids = find_grids(weight, bits, block, diagonal, zero_points=zero_points)
    scales, zeros = grids
    integers = np.empty(weight.shape, np.int8)
    start = 0
    for moments in second_moments:
        place = slice(start, start + len(moments))
        order = torch.argsort(diagonal[place], descending=True, stable=True)
        factor = _inverse_factor(torch.from_numpy(moments), order, damping)
        groups = ((order + start) // block).numpy()
        # A pass over all inputs costs the same for few outputs as for many: large chunks.
        step = max(CHUNK // len(moments), 1)
        for first in range(0, rows, step):
            some = slice(first, first + step)
            wide = torch.from_numpy(np.ascontiguousarray(weight[some, place].T))[order]
            scale = torch.from_numpy(np.ascontiguousarray(scales[some].T[groups]))
            zero = None
            if zeros is not None:
                zero = torch.from_numpy(zeros[some].T[groups].astype(np.float32))
            found = torch.empty(wide.shape, dtype=torch.int8)
            found[order] = _round_in_order(wide, scale, zero, factor, limits(bits))
            integers[some, place] = found.T.numpy()
        start += len(moments)
    return Quantized(integers, *grids)


def _inverse_factor(moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor [B, B] of the inverse of the damped moments, in the given order."""
    hessian = moments[order][:, order].clone()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        # No input was ever other than zero: nothing to feed back.
        return torch.eye(len(hessian))
    for attempt in range(_ATTEMPTS):
        diagonal += damping * mean * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper: Tensor = torch.linalg.cholesky_ex(inverse, upper=True).L
        if bool(torch.isfinite(upper).all()) and bool((upper.diagonal() > 0).all()):
            return upper
    raise ValueError("second moments are not a covariance; look for inputs that are not finite")


def _round_in_order(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor,
    bounds: tuple[int, int],
) -> Tensor:
    """Integers [B, n] of weights [B, n], input by input; overwrites the weights.

    Args:
        weight: Inputs first, in the order of rounding.
        scale: [B, n].
        zero: Zero points [B, n], floats; None for 0.
        factor: [B, B], upper.
        bounds: Smallest and largest integer.
    """
    count = len(weight)
    found = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, count, _BATCH):
        end = min(start + _BATCH, count)
        errors = torch.empty(end - start, weight.shape[1])
        for i in range(start, end):
            steps = weight[i] / scale[i]
            if zero is not None:
                steps += zero[i]
            rounded = steps.round_().clamp_(*bounds)
            found[i] = rounded.to(torch.int8)
            if zero is not None:
                rounded -= zero[i]
            error = (weight[i] - rounded * scale[i]) / factor[i, i]
            errors[i - start] = error
            weight[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        weight[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return found

"""What is remembered of the inputs of a linear: the range worth having, and second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array

#: Columns of a diagonal block of second moments. A multiple of every quantization block in use.
MAX_BLOCK = 4096

#: Shares of the whole range that are tried at both ends.
_SHARES = np.linspace(1.0, 0.02, 50)


@dataclass(frozen=True)
class InputStatistics:
    """Inputs [.., K] of one linear over the calibration data.

    Attributes:
        low: Lower end of the range for uint8, at most 0.
        high: Upper end, at least 0. Between them the mean squared error of uint8 is smallest.
        second_moments: Diagonal blocks of X^T X / n, float32, of at most MAX_BLOCK columns,
            together K; empty where they were not asked for.
        peaks: Largest magnitude of each channel, float32 [K].
    """

    low: float
    high: float
    second_moments: list[Array]
    peaks: Array


class Calibrator(Protocol):
    """Knows the inputs of the linears of a stage."""

    def inputs(self, name: str) -> InputStatistics:
        """Statistics of one linear's inputs.

        Args:
            name: Of the layer, without `.weight`, such as `layers.0.mlp.down_proj`.

        Raises:
            KeyError: The stage has no such linear, or it was not observed.
        """
        ...


class InputObserver:
    """Gathers statistics from batches of inputs; keeps none of them.

    Args:
        second_moments: Whether second moments are wanted.
    """

    def __init__(self, *, second_moments: bool) -> None:
        self._wanted = second_moments
        self._counts = np.zeros(1 << 16, np.int64)
        self._moments: list[Tensor] = []
        self._rows = 0
        self._peaks: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add inputs [.., K].

        Raises:
            ExportError: Some are not finite.
        """
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self._counts += _histogram(flat)
        self._rows += len(flat)
        peaks = flat.abs().amax(dim=0)
        self._peaks = peaks if self._peaks is None else torch.maximum(self._peaks, peaks)
        if not self._wanted:
            return
        parts = torch.split(flat, MAX_BLOCK, dim=1)
        if not self._moments:
            self._moments = [torch.zeros(part.shape[1], part.shape[1]) for part in parts]
        for total, part in zip(self._moments, parts, strict=True):
            total.addmm_(part.T, part)

    def result(self) -> InputStatistics:
        """Statistics of everything added. The observer is of no use afterwards."""
        low, high = best_range(self._counts)
        moments = [total.div_(max(self._rows, 1)).numpy() for total in self._moments]
        self._moments = []
        peaks = torch.zeros(0) if self._peaks is None else self._peaks
        return InputStatistics(low, high, moments, peaks.numpy())


def _histogram(values: Tensor) -> NDArray[np.int64]:
    """How many values have each upper half of a float32: sign, exponent, 7 bits of the fraction.

    Bins this fine keep 1/128 of a value's size, need no range beforehand, and can be added up.
    """
    if not bool(torch.isfinite(values).all()):
        raise ExportError(
            "activations on the calibration data are not finite; the checkpoint is damaged, or the "
            "calibration images are unusual: try others"
        )
    bits = values.contiguous().numpy().view(np.uint32).ravel()
    return np.bincount(bits >> np.uint32(16), minlength=1 << 16)


def _values() -> NDArray[np.float64]:
    """The middle of each of `_histogram`'s bins; bins that are not finite give 0."""
    bits = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(1 << 15)
    bits[(bits >> np.uint32(23)) & np.uint32(0xFF) == 0xFF] = 0
    return bits.view(np.float32).astype(np.float64)


def best_range(counts: NDArray[np.int64]) -> tuple[float, float]:
    """Range for uint8 with a zero point whose mean squared error is smallest.

    Args:
        counts: Of `_histogram`.

    Returns:
        Low at most 0 and high at least 0, as shares of the whole range.
    """
    seen = np.flatnonzero(counts)
    values, weights = _values()[seen], counts[seen].astype(np.float64)
    if not len(seen):
        return 0.0, 0.0
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    # One end at a time, twice around: the two ends share little but the step.
    for _ in range(2):
        low = min((low * share for share in _SHARES), key=lambda a: _loss(values, weights, a, high))
        high = min(
            (high * share for share in _SHARES), key=lambda b: _loss(values, weights, low, b)
        )
    return float(low), float(high)


def _loss(
    values: NDArray[np.float64], weights: NDArray[np.float64], low: float, high: float
) -> float:
    """Squared error of clipping, and of steps inside the range (their width squared over 12)."""
    step = (high - low) / 255
    beyond = values - np.clip(values, low, high)
    inside = np.where(beyond == 0, step * step / 12, 0.0)
    # A value smaller than half a step becomes zero, which costs no more than itself.
    small = np.minimum(inside, values * values)
    return float((weights * (beyond * beyond + small)).sum())

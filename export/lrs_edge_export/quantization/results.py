"""Rounded matrices of a stage: computed once, kept for the next export if this one is killed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.devices import StageName
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.quantization.effort import Effort
from lrs_edge_export.quantization.rounding import Quantized
from lrs_edge_export.quantization.work_folder import WorkFolder


class Rounded(Protocol):
    """Gives a matrix, or a part of its rows, rounded."""

    def __call__(
        self, name: str, part: int, shape: tuple[int, int], compute: Callable[[], Quantized]
    ) -> Quantized:
        """See `Results.rounded`."""
        ...


class Results:
    """Results of one stage.

    Args:
        stage: Which.
        folder: Where they are kept; None keeps nothing.
        effort: Told about every one of them.
    """

    def __init__(self, stage: StageName, folder: WorkFolder | None, effort: Effort) -> None:
        self._stage = stage
        self._folder = folder
        self._effort = effort

    def rounded(
        self, name: str, part: int, shape: tuple[int, int], compute: Callable[[], Quantized]
    ) -> Quantized:
        """A matrix, or a part of its rows.

        Args:
            name: Of the layer.
            part: Number of the part.
            shape: Of the part, [n, K].
            compute: Rounds it to 4 bits; called where it was not kept.
        """
        self._effort.begin()
        key = self._stage, name, str(part)
        kept = None if self._folder is None else self._folder.get(*key)
        found = None if kept is None else _read(kept, shape)
        made = compute() if found is None else found
        if self._folder is not None and found is None:
            self._folder.put(_written(made), *key)
        self._effort.did(self._stage, shape, computed=found is None)
        return made


class KeptStates:
    """Hidden states of the calibration data before one layer of a stage.

    Args:
        stage: Which.
        folder: Where they are kept.
    """

    def __init__(self, stage: StageName, folder: WorkFolder) -> None:
        self._name = stage, "states"
        self._folder = folder

    def load(self) -> tuple[int, list[Array]] | None:
        """The layer that comes next, and what it is given: float32 [T, D] each; None for none."""
        found = self._folder.get(*self._name)
        if found is None or "layer" not in found:
            return None
        states = [found[f"x{number}"] for number in range(len(found) - 1)]
        return int(found["layer"]), states

    def save(self, layer: int, states: list[Array]) -> None:
        """Keep what a layer is given, in place of what the one before was."""
        arrays = {f"x{number}": x for number, x in enumerate(states)}
        self._folder.put({"layer": np.array(layer), **arrays}, *self._name)


def _written(made: Quantized) -> dict[str, NDArray[Any]]:
    """Integers two to a byte, scales, and zero points if there are any."""
    flat = made.integers.view(np.uint8).ravel() & 15
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    halves = flat[0::2] | flat[1::2] << 4
    kept: dict[str, NDArray[Any]] = {"integers": halves, "scales": made.scales}
    return kept if made.zeros is None else kept | {"zeros": made.zeros}


def _read(kept: dict[str, NDArray[Any]], shape: tuple[int, int]) -> Quantized | None:
    """What `_written` was given; None where it is of another shape."""
    count = shape[0] * shape[1]
    if not {"integers", "scales"} <= kept.keys() or len(kept["integers"]) != -(-count // 2):
        return None
    halves = np.stack([kept["integers"] & 15, kept["integers"] >> 4], axis=1).ravel()[:count]
    signed = (halves.astype(np.int8) ^ 8) - 8
    zeros = kept["zeros"].astype(np.int8) if "zeros" in kept else None
    scales = kept["scales"].astype(np.float32)
    return Quantized(signed.astype(np.int8).reshape(shape), scales, zeros)

"""Gathering embeddings in onnxruntime's memory, without a copy on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.one_node_model import one_node_model
from lrs_edge.engines.runtime import ort

_FLOAT32 = 4


class RowGatherer:
    """Puts rows of several tables of one device together there.

    Tables are first laid end to end: their number varies from sequence to sequence, and a graph's
    number of inputs does not.

    Args:
        open_session: Loads a serialized model on the device.
        device: As onnxruntime names it.
    """

    def __init__(self, open_session: Callable[[bytes], ort.InferenceSession], device: str) -> None:
        self._open = open_session
        self._device = device
        self._copy: ort.InferenceSession | None = None
        self._gather: ort.InferenceSession | None = None

    def gather(self, tables: Sequence[ort.OrtValue], places: NDArray[np.int64]) -> ort.OrtValue:
        """Rows of tables laid end to end.

        Args:
            tables: float32 [m, D] each, on the device.
            places: int64 [n].

        Returns:
            float32 [1, n, D] on the device.
        """
        if self._gather is None:
            self._gather = self._open(_gather_model())
        table = tables[0] if len(tables) == 1 else self._laid_out(tables)
        binding = self._gather.io_binding()
        binding.bind_ortvalue_input("x", table)
        binding.bind_cpu_input("indices", np.ascontiguousarray(places)[None])
        binding.bind_output("y", self._device)
        self._gather.run_with_iobinding(binding)
        (found,) = binding.get_outputs()
        return found

    def _laid_out(self, tables: Sequence[ort.OrtValue]) -> ort.OrtValue:
        """All tables in one, float32 [sum of m, D]."""
        if self._copy is None:
            self._copy = self._open(one_node_model("Identity", ["x"], _TYPES))
        shapes = [value.shape() for value in tables]
        width = shapes[0][1]
        whole = ort.OrtValue.ortvalue_from_shape_and_type(
            [sum(shape[0] for shape in shapes), width], np.float32, self._device, 0
        )
        start = whole.data_ptr()
        for value, shape in zip(tables, shapes, strict=True):
            binding = self._copy.io_binding()
            binding.bind_ortvalue_input("x", value)
            binding.bind_output("y", self._device, 0, np.float32, shape, start)
            self._copy.run_with_iobinding(binding)
            start += shape[0] * width * _FLOAT32
        return whole


_TYPES = {"x": "float32", "y": "float32"}


def _gather_model() -> bytes:
    """`y = Gather(x, indices)`: x float32 [m, D], indices int64 [1, n], y [1, n, D]."""
    return one_node_model(
        "Gather",
        ["x", "indices"],
        {**_TYPES, "indices": "int64"},
        attributes={"axis": 0},
        axes={"indices": ("one", "n"), "y": ("one", "n", "width")},
    )

"""Running exported graphs in ONNX Runtime on the CPU, for checks only: no part of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.cores import thread_count
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array


def open_session(path: Path, *, lean: bool = False) -> Any:
    """A session under the engine's default optimisation.

    Args:
        path: The graph file.
        lean: Keep float weights as they are in the file, mapped, instead of a second copy in
            memory in the order that the engine's products want; slower.

    Raises:
        ExportError: The engine does not take the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Freed memory goes back at once: sessions of many layers follow each other.
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = thread_count(None) or 0
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions share no base class below Exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"onnxruntime cannot load {path.name} ({reason})") from error


#: Types of key and value buffers.
_BUFFER_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


class DecoderSession:
    """A decoder graph, or one of some of its layers, over buffers of its own.

    Buffers have the type and shape that the graph says, and are bound as past and present at once.

    Args:
        path: The graph file.
        capacity: Places S of the buffers.
        lean: See `open_session`.
        total: What a graph with total_length is told in every run; 0 for the filled places.
    """

    def __init__(self, path: Path, *, capacity: int, lean: bool = False, total: int = 0) -> None:
        self._total = total
        self._session = open_session(path, lean=lean)
        self._buffers = {}
        self._axes = 1
        for value in self._session.get_inputs():
            if value.name.startswith("past_") and value.name != "past_length":
                shape = [capacity if isinstance(size, str) else size for size in value.shape]
                empty = np.zeros(shape, _BUFFER_TYPES[value.type])
                buffer = ort.OrtValue.ortvalue_from_numpy(empty)
                self._buffers[value.name.removeprefix("past_")] = buffer
            elif value.name == "position_ids":
                self._axes = int(value.shape[0])
        self._told_total = "total_length" in {value.name for value in self._session.get_inputs()}
        names = [value.name for value in self._session.get_outputs()]
        self._outputs = [name for name in names if not name.startswith("present_")]
        self.length = 0

    def run(
        self,
        embeds: Array,
        positions: NDArray[np.int64] | None = None,
        bias: Array | None = None,
    ) -> Array:
        """Append tokens.

        Args:
            embeds: float32 [L, D].
            positions: int64 [L] or [k, L]; None counts on from the tokens there are, as of text.
            bias: float32 [L, length + L] for the masked flavour.

        Returns:
            The graph's first output, float32: `logits`, or `hidden_states` of single layers.
        """
        if positions is None:
            positions = np.arange(self.length, self.length + len(embeds), dtype=np.int64)
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[None],
            "position_ids": np.broadcast_to(np.atleast_2d(positions), (self._axes, len(embeds))),
            "past_length": np.array([self.length], np.int64),
        }
        if self._told_total:
            feeds["total_length"] = np.array([self._total or self.length + len(embeds)], np.int32)
        if bias is not None:
            feeds["attention_bias"] = bias[None, None]
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        for name, value in self._buffers.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self._session.run_with_iobinding(binding)
        self.length += len(embeds)
        found: Array = binding.get_outputs()[0].numpy()
        return found

    def keep(self, places: NDArray[np.int64]) -> None:
        """Compact the buffers to some of their filled places; what comes after them becomes NaN."""
        for value in self._buffers.values():
            compacted = value.numpy().copy()
            compacted[:, :, : len(places)] = compacted[:, :, places]
            if np.issubdtype(compacted.dtype, np.floating):
                compacted[:, :, len(places) :] = np.nan
            value.update_inplace(compacted)
        self.length = len(places)

"""Running exported graphs in ONNX Runtime on the CPU, for checks only: no part of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lrs_edge.errors import ExportError
from lrs_edge.export.stages import DecoderConfig
from lrs_edge.export.tensors import Array


def open_session(path: Path) -> Any:
    """A session under the engine's default optimisation.

    Raises:
        ExportError: The engine does not take the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions share no base class below Exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"onnxruntime cannot load {path.name} ({reason})") from error


class DecoderSession:
    """A decoder graph over buffers of its own, bound as past and present at once.

    Args:
        path: The graph file.
        config: Sizes of the stack.
        scoring: True for the RFM, whose last layer has keys only.
        capacity: Places S of the buffers.
    """

    def __init__(self, path: Path, config: DecoderConfig, *, scoring: bool, capacity: int) -> None:
        self._session = open_session(path)
        names = [f"{part}_{i}" for i in range(config.layers) for part in ("key", "value")]
        if scoring:
            names.append(f"key_{config.layers}")
        shape = (1, config.kv_heads, capacity, config.head_dim)
        self._buffers = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in names
        }
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
            positions: int64 [L]; None counts on from the tokens there are.
            bias: float32 [L, length + L] for the masked flavour.

        Returns:
            `logits`, float32.
        """
        if positions is None:
            positions = np.arange(self.length, self.length + len(embeds), dtype=np.int64)
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[None],
            "position_ids": positions[None],
            "past_length": np.array([self.length], np.int64),
        }
        if bias is not None:
            feeds["attention_bias"] = bias[None, None]
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        for name, value in self._buffers.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self._session.run_with_iobinding(binding)
        self.length += len(embeds)
        logits: Array = binding.get_outputs()[0].numpy()
        return logits

    def keep(self, places: NDArray[np.int64]) -> None:
        """Compact the buffers to some of their filled places."""
        for value in self._buffers.values():
            compacted = value.numpy().copy()
            compacted[:, :, : len(places)] = compacted[:, :, places]
            compacted[:, :, len(places) :] = np.nan
            value.update_inplace(compacted)
        self.length = len(places)

"""Scales of int8 key/value buffers: what keys (after RoPE) and values reach on calibration data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrs_edge.engines.runtime import ort
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.layer_graphs import write_layer
from lrs_edge_export.graphs.sessions import open_session
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.torch_model import stages

#: Room above what calibration data reach; what lies beyond is clipped.
_MARGIN = 1.1


def kv_scales(
    stage: DecoderStage, weights: WeightFile, sequences: Sequence[TokenSequence]
) -> dict[str, Array]:
    """Run the language model layer by layer and look into its key/value buffers.

    Args:
        stage: The language model.
        weights: Its open weight file, in which all layers are.
        sequences: Calibration prompts.

    Returns:
        Scales float32 [kv_heads * buffer_dim] by buffer, `key_0`, `value_0`, ...
    """
    embeds = [torch.from_numpy(sequence.values) for sequence in sequences]
    states = [stages.first_states(stage, x).numpy() for x in embeds]
    scales: dict[str, Array] = {}
    for layer in range(stage.config.layers):
        # In the weights' own folder: an engine takes external data from nowhere else.
        with tempfile.NamedTemporaryFile(dir=weights.path.parent, suffix=".onnx") as file:
            path = Path(file.name)
            write_layer(stage, layer, path, weights)
            session = open_session(path)
        names = f"key_{layer}", f"value_{layer}"
        peaks = [np.zeros((stage.config.kv_heads, stage.config.buffer_dim), np.float32)] * 2
        for number, x in enumerate(states):
            positions = sequences[number].positions
            out, found = _run(session, stage, names, x, positions)
            added = stages.add_later(stage, layer, torch.from_numpy(out), embeds[number])
            states[number] = added.numpy()
            peaks = [np.maximum(peak, new) for peak, new in zip(peaks, found, strict=True)]
        for name, peak in zip(names, peaks, strict=True):
            scale = peak.ravel() * np.float32(_MARGIN / 127)
            scales[name] = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return scales


def _run(
    session: ort.InferenceSession,
    stage: DecoderStage,
    names: tuple[str, str],
    x: Array,
    positions: NDArray[np.int64],
) -> tuple[Array, list[Array]]:
    """States after the layer [T, D], and the largest magnitudes [kv_heads, d] of its buffers."""
    config, length = stage.config, len(x)
    kind = np.float16 if "16" in session.get_inputs()[-1].type else np.float32
    empty = np.zeros((1, config.kv_heads, length, config.buffer_dim), kind)
    states, keys, values = session.run(
        ["hidden_states", *(f"present_{name}" for name in names)],
        {
            "inputs_embeds": x[None],
            "position_ids": positions,
            "past_length": np.zeros(1, np.int64),
            **{f"past_{name}": empty for name in names},
        },
    )
    return states[0], [np.abs(array[0].astype(np.float32)).max(axis=1) for array in (keys, values)]

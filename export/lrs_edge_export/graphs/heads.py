"""What a decoder's graphs do with single heads: how far they turn, and how they lie in buffers."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from lrs_edge_export.checkpoints.model import DecoderConfig
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.onnx_writer import GraphWriter


def inverse_frequencies(config: DecoderConfig) -> Array:
    """RoPE's inverse frequencies, float32 [head_dim / 2], by torch as in transformers."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.scaling is not None:
        frequencies = config.scaling.applied(frequencies, config.theta)
    found: Array = frequencies.numpy()
    return found


def rotations(graph: GraphWriter, config: DecoderConfig, positions: str) -> tuple[str, str]:
    """Cosine and sine [1, L, head_dim / 2] of the angles of positions [k, L]."""
    if config.rope_axes:
        # [k, L] becomes [1, L, head_dim / 2]: of every frequency the position of its axis.
        chosen = graph.node("Gather", positions, graph.constant(config.rope_axes), axis=0)
        rows = graph.node("Transpose", chosen, perm=[1, 0])
        column = graph.node("Unsqueeze", rows, graph.constant([0]))
    else:
        column = graph.node("Unsqueeze", positions, graph.constant([2]))
    frequencies = graph.weight(
        "inverse_frequencies", lambda: inverse_frequencies(config), np.float32
    )
    angles = graph.node("Mul", graph.node("Cast", column, to=TensorProto.FLOAT), frequencies)
    cosine, sine = (graph.node(function, angles) for function in ("Cos", "Sin"))
    if config.scaling is not None and config.scaling.gain != 1.0:
        gain = graph.constant(config.scaling.gain, np.float32)
        cosine, sine = (graph.node("Mul", table, gain) for table in (cosine, sine))
    return graph.from_float32(cosine), graph.from_float32(sine)


def filled(graph: GraphWriter, config: DecoderConfig, x: str) -> str:
    """Heads [1, L, n * head_dim] as they lie in buffers: zeros behind each, where it has any."""
    more = config.buffer_dim - config.head_dim
    if not more:
        return x
    heads = graph.node("Reshape", x, graph.constant([0, 0, -1, config.head_dim]))
    wide = graph.node("Pad", heads, graph.constant([0] * 7 + [more]))
    return graph.node("Reshape", wide, graph.constant([0, 0, -1]))


def cut(graph: GraphWriter, config: DecoderConfig, x: str) -> str:
    """What `filled` put behind each head, taken away again."""
    if config.buffer_dim == config.head_dim:
        return x
    heads = graph.node("Reshape", x, graph.constant([0, 0, -1, config.buffer_dim]))
    bounds = ([0], [config.head_dim], [-1])
    narrow = graph.node("Slice", heads, *map(graph.constant, bounds))
    return graph.node("Reshape", narrow, graph.constant([0, 0, -1]))

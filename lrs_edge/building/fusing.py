"""Weights in the form that TensorRT multiplies by as they are, without unpacking them first.

What the builder fuses with a product it says of each engine layer by layer (TensorRT-RTX 1.7.1, for
sm86 and sm89; no card has run it): int8 with one scale per output channel, and 4 bits in blocks.
Of int8 in blocks it makes another layer that writes the weight as float16 into memory, in every
run. So those are rounded once more, to one scale per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lrs_edge.building.editable import FLOAT, EditableGraph, attribute


def with_channels(graph: EditableGraph) -> None:
    """Give weights [K, N] of int8 in blocks of K one scale per channel of N."""
    graph.rewrite(partial(_rewritten, graph))
    graph.prune()


def _rewritten(graph: EditableGraph, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    block = attribute(node, "block_size", 0)
    weight = node.input[0]
    if node.op_type != "DequantizeLinear" or not block or not graph.is_constant(weight):
        yield node
        return
    if graph.element(weight) != TensorProto.INT8 or len(node.input) > 2:
        yield node
        return
    shape, scales = graph.shape(weight), node.input[1]
    integers = partial(_rounded, graph, weight, scales, block)
    steps = partial(_steps, graph, weight, scales, block)
    yield graph.node(
        "DequantizeLinear",
        [
            graph.define(f"{weight}.channels", TensorProto.INT8, shape, integers),
            graph.define(f"{scales}.channels", FLOAT, shape[1:], steps),
        ],
        out=node.output[0],
        axis=1,
    )


def _blocks(integers: NDArray[Any], block: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(integers), block):
        yield integers[start : start + block]


def _steps(graph: EditableGraph, weight: str, scales: str, block: int) -> NDArray[np.float32]:
    """Scales float32 [N], by which the largest of each channel becomes 127."""
    rows = graph.array(scales).astype(np.float32)
    largest = [
        np.abs(part.astype(np.int16)).max(axis=0) * row
        for part, row in zip(_blocks(graph.array(weight), block), rows, strict=True)
    ]
    steps: NDArray[np.float32] = (np.max(largest, axis=0) / 127).astype(np.float32)
    return np.where(steps > 0, steps, np.float32(1))


def _rounded(graph: EditableGraph, weight: str, scales: str, block: int) -> NDArray[np.int8]:
    integers, steps = graph.array(weight), _steps(graph, weight, scales, block)
    rows = graph.array(scales).astype(np.float32)
    made = np.empty(integers.shape, np.int8)
    parts = zip(_blocks(integers, block), _blocks(made, block), rows, strict=True)
    for part, target, row in parts:
        np.clip(np.rint(part * (row / steps)), -127, 127, out=target, casting="unsafe")
    return made

"""Weights in the form that TensorRT multiplies by as they are, without unpacking them first.

What the builder fuses with a product it says of each engine layer by layer (TensorRT-RTX 1.7.1, for
sm86 and sm89; no card has run it): int8 with one scale per output channel, and 4 bits in blocks.
Of int8 in blocks it makes another layer that writes the weight as float16 into memory, in every
run, and so it does of int8 that one token alone is multiplied by: the head, which is the largest
matrix of a small model. So blocks are rounded once more, to one scale per channel, and what one
token is multiplied by is cut in two halves of 4 bits, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lrs_edge.building.editable import FLOAT, EditableGraph, attribute, packed

#: Inputs of a block that shares a scale, the fewest scales first.
_BLOCKS = (128, 64, 32)


def with_channels(graph: EditableGraph) -> None:
    """Give weights [K, N] of int8 in blocks of K one scale per channel of N."""
    graph.rewrite(partial(_rewritten, graph))
    graph.prune()


def with_halved_bytes(graph: EditableGraph) -> None:
    """Cut weights [K, N] of int8 with one scale per channel in two, where x is one token.

    An integer q is 16 h + l + 8, with h and l of 4 bits: x W = x (h 16 s) + x (l s) + sum(x) 8 s.
    """
    producers = graph.producers()

    def rewritten(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        weight = producers.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or not _is_one_token(graph, producers, node.input[0]):
            yield node
        elif block := _block_of_bytes(graph, weight):
            yield from _in_two(graph, node, weight, block)
        else:
            yield node

    graph.rewrite(rewritten)
    graph.prune()


def _is_one_token(graph: EditableGraph, producers: dict[str, onnx.NodeProto], name: str) -> bool:
    """Whether a value comes of one row that was taken out of all, by what changes no sizes."""
    node = producers.get(name)
    while node is not None and node.op_type in ("RMSNormalization", "Squeeze", "Cast"):
        node = producers.get(node.input[0])
    if node is None or node.op_type != "Gather" or not graph.is_constant(node.input[1]):
        return False
    return prod(graph.shape(node.input[1])) == 1


def _block_of_bytes(graph: EditableGraph, weight: onnx.NodeProto) -> int:
    """Size of the blocks that a weight is cut into; 0 for one that is not cut."""
    if weight.op_type != "DequantizeLinear" or len(weight.input) > 2:
        return 0
    integers, scales = weight.input
    if not graph.is_constant(integers) or graph.element(integers) != TensorProto.INT8:
        return 0
    if attribute(weight, "block_size", 0) or len(graph.shape(scales)) != 1:
        return 0
    inputs, outputs = graph.shape(integers)
    # Of an odd number of outputs nothing is fused, however it is written.
    if outputs % 2:
        return 0
    return next((block for block in _BLOCKS if inputs % block == 0), 0)


def _in_two(
    graph: EditableGraph, node: onnx.NodeProto, weight: onnx.NodeProto, block: int
) -> Iterator[onnx.NodeProto]:
    x, (integers, scales) = node.input[0], weight.input
    inputs, outputs = graph.shape(integers)
    parts = []
    for name, taken, factor in (("high", _high, 16), ("low", _low, 1)):
        made = [
            graph.define(
                f"{integers}.{name}",
                TensorProto.INT4,
                (inputs, outputs),
                partial(_nibbles, graph, integers, taken),
            ),
            graph.define(
                f"{scales}.{name}",
                FLOAT,
                (inputs // block, outputs),
                partial(_spread, graph, scales, factor, inputs // block),
            ),
        ]
        floats = graph.node("DequantizeLinear", made, axis=0, block_size=block)
        product = graph.node("MatMul", [x, floats.output[0]], label=f"{node.name}.{name}")
        yield from (floats, product)
        parts.append(product.output[0])
    total = graph.node("ReduceSum", [x, graph.constant([-1])], keepdims=1)
    eights = graph.define(
        f"{scales}.eights", FLOAT, (outputs,), lambda: graph.array(scales).astype(np.float32) * 8
    )
    more = graph.node("Mul", [total.output[0], eights])
    both = graph.node("Add", parts)
    yield from (total, more, both)
    yield graph.node("Add", [both.output[0], more.output[0]], out=node.output[0], label=node.name)


def _high(integers: NDArray[np.int8]) -> NDArray[np.int8]:
    return integers >> 4


def _low(integers: NDArray[np.int8]) -> NDArray[np.int8]:
    return (integers & 15) - np.int8(8)


def _nibbles(
    graph: EditableGraph, name: str, taken: Callable[[NDArray[np.int8]], NDArray[np.int8]]
) -> NDArray[np.uint8]:
    return packed(taken(np.asarray(graph.array(name))))


def _spread(graph: EditableGraph, scales: str, factor: int, rows: int) -> NDArray[np.float32]:
    return np.tile(graph.array(scales).astype(np.float32) * factor, (rows, 1))


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
    # Asked for by what rounds, by other rewrites and when the graph is saved.
    steps = cache(partial(_steps, graph, weight, scales, block))
    integers = partial(_rounded, graph, weight, scales, block, steps)
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


def _rounded(
    graph: EditableGraph,
    weight: str,
    scales: str,
    block: int,
    steps: Callable[[], NDArray[np.float32]],
) -> NDArray[np.int8]:
    integers = graph.array(weight)
    rows = graph.array(scales).astype(np.float32)
    made = np.empty(integers.shape, np.int8)
    parts = zip(_blocks(integers, block), _blocks(made, block), rows, strict=True)
    for part, target, row in parts:
        np.clip(np.rint(part * (row / steps())), -127, 127, out=target, casting="unsafe")
    return made

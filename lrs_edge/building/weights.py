"""Weights as TensorRT takes them: integers with scales in front of a product of floats.

Its parser has neither MatMulInteger nor DynamicQuantizeLinear, takes integers without a sign for
nothing, and 4-bit blocks without zero points only. So

- `int8-dynamic`: the int8 of each output channel becomes a DequantizeLinear's, uint8 less 128;
- `int8-static` with uint8 activations: these stay floats; with symmetric ones all stays as it is,
  but for constants of less than two dimensions, which keep the builder from building;
- blocks that the inputs do not fill are cut into smaller ones that they do;
- 4-bit blocks with zero points: x W = x (q s) - sum of x over each block * (z s).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lrs_edge.building.blocks import with_separate_products
from lrs_edge.building.editable import EditableGraph, attribute, spread
from lrs_edge.errors import BundleError

#: Inputs that share a scale, at least: of smaller blocks the scales would be too many.
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class _Product:
    """A product of integers: what it is computed of, and its name."""

    x: str
    integers: str
    scales: str
    label: str


def with_explicit_weights(graph: EditableGraph) -> None:
    """Rewrite every product of integers as one of floats with a dequantized weight.

    Raises:
        BundleError: A product is written in a way that this does not know.
    """
    with_separate_products(graph)
    products = dict(_integer_products(graph))

    def rewritten(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        found = products.get(node.output[0])
        if found is None:
            yield node
            return
        weight = graph.node("DequantizeLinear", [_signed(graph, found), found.scales], axis=1)
        yield weight
        inputs = [found.x, weight.output[0]]
        yield graph.node("MatMul", inputs, out=node.output[0], label=found.label)

    graph.rewrite(rewritten)
    _Signed(graph).rewrite()
    graph.rewrite(partial(_in_blocks, graph))
    graph.prune()


class _Signed:
    """Quantization without integers that have no sign, and without zero points."""

    def __init__(self, graph: EditableGraph) -> None:
        self._graph = graph
        self._same: dict[str, str] = {}
        #: Zero points times scales [blocks, N] of weights whose products lack them.
        self._offsets: dict[str, tuple[str, tuple[int, int]]] = {}

    def rewrite(self) -> None:
        self._graph.rewrite(self._rewritten)

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        graph = self._graph
        for place, name in enumerate(node.input):
            node.input[place] = self._same.get(name, name)
        if node.op_type == "QuantizeLinear" and self._unsigned(node):
            self._same[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear":
            if graph.is_constant(node.input[0]):
                yield from self._weight(node)
            elif self._unsigned(node):
                self._same[node.output[0]] = node.input[0]
            else:
                yield node
        elif node.op_type == "MatMul" and node.input[1] in self._offsets:
            yield from self._less_offsets(node)
        else:
            yield node

    def _unsigned(self, node: onnx.NodeProto) -> bool:
        if len(node.input) < 3:
            return node.op_type == "QuantizeLinear"
        return self._graph.element(node.input[2]) == TensorProto.UINT8

    def _weight(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        graph, out = self._graph, node.output[0]
        weight, scales = node.input[:2]
        shape, element = graph.shape(weight), graph.element(weight)
        zeros = graph.array(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        block = attribute(node, "block_size", 0)
        if len(shape) < 2 or (not block and zeros.any()):
            made = partial(_dequantized, graph, node)
            floats = graph.define(f"{weight}.floats", graph.element(scales), shape, made)
            yield graph.node("Identity", [floats], out=out)
            return
        if zeros.any() and shape[0] % block:
            # Not in 4 bits, then: -15 to 15.
            made = partial(_centred, graph, weight, node.input[2], block)
            node.input[0] = graph.define(f"{weight}.centred", TensorProto.INT8, shape, made)
        elif zeros.any() and element in (TensorProto.INT4, TensorProto.INT8):
            made = partial(_offset, graph, node.input[2], scales)
            blocks = shape[0] // block, block
            kind, offsets = graph.element(scales), (blocks[0], shape[1])
            self._offsets[out] = graph.define(f"{weight}.offset", kind, offsets, made), blocks
        elif zeros.any():
            raise BundleError(f"{weight} has zero points that TensorRT has no operator for")
        del node.input[2:]
        yield node

    def _less_offsets(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A product, less what the zero points of its weight's blocks add."""
        graph, x = self._graph, node.input[0]
        offsets, blocks = self._offsets[node.input[1]]
        leading = graph.node("Shape", [x], start=0, end=-1)
        shape = graph.node("Concat", [leading.output[0], graph.constant(blocks)], axis=0)
        parts = graph.node("Reshape", [x, shape.output[0]])
        sums = graph.node("ReduceSum", [parts.output[0], graph.constant([-1])], keepdims=0)
        added = graph.node("MatMul", [sums.output[0], offsets])
        product = graph.node("MatMul", list(node.input), label=node.name)
        yield from (leading, shape, parts, sums, added, product)
        yield graph.node("Sub", [product.output[0], added.output[0]], out=node.output[0])


def _dequantized(graph: EditableGraph, node: onnx.NodeProto) -> NDArray[Any]:
    integers, scales = (graph.array(name) for name in node.input[:2])
    zeros = graph.array(node.input[2]) if len(node.input) > 2 else np.zeros(1)
    rows = [-1 if i == attribute(node, "axis", 1) else 1 for i in range(integers.ndim)]
    if scales.size == 1:
        rows = [1] * integers.ndim
    centred = integers.astype(np.float32) - zeros.astype(np.float32).reshape(
        rows if zeros.size > 1 else [1] * integers.ndim
    )
    made: NDArray[Any] = (centred * scales.astype(np.float32).reshape(rows)).astype(scales.dtype)
    return made


def _centred(graph: EditableGraph, weight: str, zeros: str, block: int) -> NDArray[np.int8]:
    integers = graph.array(weight)
    made: NDArray[np.int8] = integers - spread(graph.array(zeros), block, integers.shape)
    return made


def _offset(graph: EditableGraph, zeros: str, scales: str) -> NDArray[Any]:
    found = graph.array(scales)
    made: NDArray[Any] = graph.array(zeros).astype(found.dtype) * found
    return made


def _in_blocks(graph: EditableGraph, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """A weight [K, N] with scales of blocks: whole blocks only."""
    block = attribute(node, "block_size", 0)
    if node.op_type != "DequantizeLinear" or not block or len(node.input) > 2:
        yield node
        return
    weight, name = node.input
    inputs, outputs = graph.shape(weight)
    smaller = gcd(inputs, block)
    if smaller == block:
        yield node
    elif smaller >= _SMALLEST_BLOCK:
        shape = inputs // smaller, outputs
        made = partial(_repeated, graph, name, block // smaller, shape[0])
        scales = graph.define(f"{name}.of{smaller}", graph.element(name), shape, made)
        yield graph.node(
            "DequantizeLinear",
            [weight, scales],
            out=node.output[0],
            axis=0,
            block_size=smaller,
        )
    else:
        made = partial(_floats, graph, weight, name, block)
        floats = graph.define(f"{weight}.floats", graph.element(name), (inputs, outputs), made)
        yield graph.node("Identity", [floats], out=node.output[0])


def _repeated(graph: EditableGraph, name: str, times: int, rows: int) -> NDArray[Any]:
    return np.repeat(graph.array(name), times, axis=0)[:rows]


def _floats(graph: EditableGraph, weight: str, name: str, block: int) -> NDArray[Any]:
    integers, scales = graph.array(weight), graph.array(name)
    made: NDArray[Any] = integers * spread(scales, block, integers.shape)
    return made


def _signed(graph: EditableGraph, product: _Product) -> str:
    """The integers as int8, whose zero is 0."""
    name = product.integers
    if graph.element(name) == TensorProto.INT8:
        return name
    # Weights of uint8 have the zero point 128 (`exact_integers` of bundles).
    made = partial(_shifted, graph, name)
    return graph.define(f"{name}.signed", TensorProto.INT8, graph.shape(name), made)


def _shifted(graph: EditableGraph, name: str) -> NDArray[np.int8]:
    # Adding 128 modulo 256 is taking it away.
    moved: NDArray[np.int8] = (graph.array(name) ^ np.uint8(0x80)).view(np.int8)
    return moved


def _integer_products(graph: EditableGraph) -> Iterator[tuple[str, _Product]]:
    """Name of the value that is the product, scaled, and what it is of."""
    producers, consumers = graph.producers(), graph.consumers()

    def only(value: str, op: str) -> onnx.NodeProto:
        taken = consumers.get(value, [])
        if len(taken) != 1 or taken[0].op_type != op:
            raise BundleError(f"{value} of the graph is not used as lrs-edge export writes it")
        return taken[0]

    for node in graph.nodes:
        if node.op_type == "MatMulInteger":
            source = producers[node.input[0]]
            _zero_is(graph, node, 3)
            scaled = only(only(node.output[0], "Cast").output[0], "Mul")
            both = producers[next(n for n in scaled.input if producers[n].op_type == "Mul")]
            scales = next(name for name in both.input if graph.is_constant(name))
            product = _Product(source.input[0], node.input[1], scales, node.name)
            yield scaled.output[0], product
        elif node.op_type == "MatMulIntegerToFloat":
            _zero_is(graph, node, 5)
            quantized = producers[node.input[0]]
            for op in ("Cast", "Add", "Round", "Div"):
                if quantized.op_type != op:
                    raise BundleError(f"{node.name} of the graph has inputs of an unknown kind")
                quantized = producers[quantized.input[0]]
            product = _Product(quantized.input[0], node.input[1], node.input[3], node.name)
            yield only(node.output[0], "Mul").output[0], product


def _zero_is(graph: EditableGraph, node: onnx.NodeProto, place: int) -> None:
    """Check that a weight's zero point is the one that its type has in bundles."""
    unsigned = graph.element(node.input[1]) == TensorProto.UINT8
    given = node.input[place] if len(node.input) > place else ""
    zeros = graph.array(given) if given else np.zeros(1)
    if (zeros != (128 if unsigned else 0)).any():
        raise BundleError(f"{node.name} of the graph has a zero point that is not known")

"""Weights as TensorRT takes them: integers with scales in front of a product of floats.

Its parser has neither MatMulInteger nor DynamicQuantizeLinear, takes integers without a sign for
nothing, and 4-bit blocks without zero points only. So

- `int8-dynamic`: the int8 of each output channel becomes a DequantizeLinear's, uint8 less 128;
- `int8-static` with uint8 activations: they stay floats;
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

from lrs_edge.building.editable import EditableGraph, attribute
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
    graph.rewrite(partial(_in_blocks, graph))
    graph.prune()


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
    made: NDArray[Any] = integers * np.repeat(scales, block, axis=0)[: len(integers)]
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

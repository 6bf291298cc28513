"""MatMulNBits of bundles for CPUs as DequantizeLinear and MatMul, which TensorRT's parser knows.

The operator has, for each output, the integers of its blocks without a sign; DequantizeLinear
takes them with a sign, inputs by outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lrs_edge.building.editable import EditableGraph, attribute, packed, unpacked
from lrs_edge.errors import BundleError

_ELEMENTS = {4: TensorProto.INT4, 8: TensorProto.INT8}


def with_separate_products(graph: EditableGraph) -> None:
    """Write every MatMulNBits as a weight that is dequantized, and a product.

    Raises:
        BundleError: One has a bias, an order of its inputs, or other numbers of bits.
    """
    graph.rewrite(partial(_rewritten, graph))


def _rewritten(graph: EditableGraph, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    if node.op_type != "MatMulNBits":
        yield node
        return
    inner, outputs, bits, block = (attribute(node, n) for n in ("K", "N", "bits", "block_size"))
    if bits not in _ELEMENTS or not 3 <= len(node.input) <= 4:
        raise BundleError(f"{node.name} of the graph multiplies in a way that is not known")
    x, integers, scales = node.input[:3]
    blocks = -(-inner // block)
    shape, element = (inner, outputs), _ELEMENTS[bits]
    weight = graph.define(
        f"{integers}.signed",
        element,
        shape,
        lambda: _as_stored(_unpacked(graph.array(integers), outputs, bits)[:, :inner], bits),
    )
    columns = graph.define(
        f"{scales}.columns",
        graph.element(scales),
        (blocks, outputs),
        lambda: graph.array(scales).reshape(outputs, blocks).T,
    )
    inputs = [weight, columns]
    if len(node.input) > 3:
        zeros = node.input[3]
        inputs.append(
            graph.define(
                f"{zeros}.signed",
                element,
                (blocks, outputs),
                lambda: _as_stored(_unpacked(graph.array(zeros), outputs, bits)[:, :blocks], bits),
            )
        )
    floats = graph.node("DequantizeLinear", inputs, axis=0, block_size=block)
    yield floats
    yield graph.node("MatMul", [x, floats.output[0]], out=node.output[0], label=node.name)


def _unpacked(data: NDArray[np.uint8], rows: int, bits: int) -> NDArray[np.int8]:
    """Signed integers [rows, n] of bytes, of two each where they have 4 bits."""
    flat = data.reshape(rows, -1)
    # Turning the highest bit is taking half of the range away.
    if bits == 4:
        return unpacked(flat ^ np.uint8(0x88), (rows, 2 * flat.shape[1]))
    return (flat ^ np.uint8(0x80)).view(np.int8)


def _as_stored(integers: NDArray[np.int8], bits: int) -> NDArray[Any]:
    """Columns for rows, and two integers in a byte where they have 4 bits."""
    turned = np.ascontiguousarray(integers.T)
    return packed(turned) if bits == 4 else turned

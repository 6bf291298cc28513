"""Counting the floating-point operations of a written graph, for the bundle's manifest."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import shape_inference

from lrs_edge.errors import ExportError


def graph_flops(path: Path) -> int:
    """Operations of one run of a graph, all open dimensions being 1: for one tile, or one token.

    Counted are convolutions and matrix products, two operations per multiplication and addition;
    what is done per element (activations, norms, softmax) is left out, as is usual.

    Args:
        path: An ONNX file.

    Raises:
        ExportError: The shapes of a product cannot be inferred.
    """
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = dim.dim_value or 1
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return sum(_node_flops(path, node, shapes) for node in graph.node)


def _node_flops(path: Path, node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "MatMul"):
        return 0
    made, first, second = (shapes.get(name, ()) for name in (node.output[0], *node.input[:2]))
    # Each element of the result is a sum over one kernel, or over one row.
    terms = second[1:] if node.op_type == "Conv" else first[-1:]
    # An unknown dimension is a zero.
    count = 2 * math.prod(made) * math.prod(terms)
    if not (made and terms and count):
        raise ExportError(
            f"{path.name}: the shapes of {node.op_type} {node.name} cannot be inferred; its "
            "operations cannot be counted"
        )
    return count

"""Graphs of operators that TensorRT 10.3 has, for JetPack 6.

TensorRT takes RMSNormalization, RotaryEmbedding and TensorScatter from 10.15 on, Attention from
10.14. Here each is written out. Buffers are static as before, but are not updated in place: what
gives `present_*` copies what `past_*` holds, so an engine needs both. Weights of 8 bits with a
scale for each block become floats at float32; at float16 they have one for each channel already
(`fusing.py`), which stays, as those of 4 bits do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lrs_edge.building.attention import new_places
from lrs_edge.building.editable import FLOAT, HALF, EditableGraph, attribute, declared, spread
from lrs_edge.errors import BundleError

#: Far below any score, and float16 holds it.
_HIDDEN = -3e4

#: Operators that TensorRT 10.0 takes and graphs of bundles may hold, by `docs/operators.md` of
#: onnx-tensorrt's branch 10.1-GA (10.3 has no branch there; later versions only add to it).
_OPERATORS = (
    "Add AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos "
    "CumSum DepthToSpace DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather "
    "GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual HardSigmoid "
    "HardSwish Identity LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max MaxPool Min "
    "Mul Neg Not Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum "
    "Relu Reshape Resize ScatterElements ScatterND Shape Sigmoid Sin Slice Softmax SpaceToDepth "
    "Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where"
)
OPERATORS = frozenset(_OPERATORS.split())


def with_older_operators(graph: EditableGraph) -> int:
    """Write out what TensorRT 10.3 has no operator for.

    Args:
        graph: As the other rewrites leave it: the last of them.

    Returns:
        The set of operators to declare: 20, which is the newest that TensorRT 10.3 knows in full,
        or 21 where weights of 4 bits have a scale for each block, which it takes too.

    Raises:
        BundleError: The graph holds an operator that there is nothing for.
    """
    _Older(graph).rewrite()
    graph.prune()
    unknown = sorted({node.op_type for node in graph.nodes if node.domain} | _names(graph))
    if unknown:
        raise BundleError(
            f"TensorRT 10.3 has no operator for {', '.join(unknown)} of this bundle; run the stage "
            "on the CPU, or use TensorRT 10.15 or later"
        )
    blocks = any(attribute(node, "block_size", 0) for node in graph.nodes)
    return 21 if blocks else 20


def _names(graph: EditableGraph) -> set[str]:
    return {node.op_type for node in graph.nodes} - OPERATORS


class _Older:
    def __init__(self, graph: EditableGraph) -> None:
        self._graph = graph
        #: Where new rows go, for each number of heads.
        self._rows: dict[int, str] = {}
        self._producers = graph.producers()
        self._halves = any(
            declared(value)[0] == HALF
            for value in (*graph.inputs.values(), *graph.outputs.values())
        ) or any(node.op_type == "Cast" and attribute(node, "to") == HALF for node in graph.nodes)

    def rewrite(self) -> None:
        self._graph.rewrite(self._rewritten)

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        written_out = {
            "RMSNormalization": self._norm,
            "RotaryEmbedding": self._turned,
            "TensorScatter": self._scattered,
            "Attention": self._attended,
            "DequantizeLinear": self._dequantized,
        }.get(node.op_type if not node.domain else "")
        if written_out is None:
            yield node
        else:
            yield from written_out(node)

    def _dequantized(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Integers of 8 bits with a scale for each block, which 10.3 has for 4 bits alone."""
        graph = self._graph
        weight, scales = node.input[:2]
        block, axis = attribute(node, "block_size", 0), attribute(node, "axis", 1)
        if not block or graph.element(weight) == TensorProto.INT4:
            yield node
            return
        shape = graph.shape(weight)
        kind, element = (np.float16, HALF) if self._halves else (np.float32, FLOAT)

        def floats() -> NDArray[Any]:
            whole = spread(graph.array(scales).astype(np.float32), block, shape, axis)
            values: NDArray[Any] = (graph.array(weight) * whole).astype(kind)
            return values

        made = graph.define(f"{weight}.floats", element, shape, floats)
        yield graph.node("Identity", [made], out=node.output[0])

    def _norm(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Give x / sqrt(mean(x²) + epsilon) in float32, since float16 does not hold the squares."""
        graph = self._graph
        x, scale = node.input
        if attribute(node, "axis", -1) != -1:
            raise BundleError(f"{node.name} of the graph norms over several axes")
        if self._halves:
            single = graph.node("Cast", [x], to=FLOAT)
            yield single
            x = single.output[0]
        square = graph.node("Mul", [x, x])
        mean = graph.node("ReduceMean", [square.output[0], graph.constant([-1])], keepdims=1)
        epsilon = graph.constant([attribute(node, "epsilon", 1e-5)], np.float32)
        more = graph.node("Add", [mean.output[0], epsilon])
        root = graph.node("Sqrt", [more.output[0]])
        normed = graph.node("Div", [x, root.output[0]])
        yield from (square, mean, more, root, normed)
        value = normed.output[0]
        if self._halves:
            half = graph.node("Cast", [value], to=HALF)
            yield half
            value = half.output[0]
        yield graph.node("Mul", [value, scale], out=node.output[0])

    def _turned(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Halves (a, b) of each head [1, L, H * d] become (a cos - b sin, b cos + a sin)."""
        graph = self._graph
        heads = attribute(node, "num_heads", 0)
        kinds = ("interleaved", "rotary_embedding_dim")
        if not heads or len(node.input) != 3 or any(attribute(node, kind, 0) for kind in kinds):
            raise BundleError(
                f"{node.name} of the graph turns its input in a way that is not known"
            )
        x, cosine, sine = node.input
        split = graph.node("Reshape", [x, graph.constant([0, 0, heads, -1])])
        halves = graph.node("Split", [split.output[0]], axis=-1, num_outputs=2)
        halves.output.append(graph.fresh("Split"))
        yield from (split, halves)
        columns = []
        for table in (cosine, sine):
            column = graph.node("Unsqueeze", [table, graph.constant([2])])
            yield column
            columns.append(column.output[0])
        first, second = halves.output
        turned = []
        for ours, other, op in ((first, second, "Sub"), (second, first, "Add")):
            kept = graph.node("Mul", [ours, columns[0]])
            moved = graph.node("Mul", [other, columns[1]])
            both = graph.node(op, [kept.output[0], moved.output[0]])
            yield from (kept, moved, both)
            turned.append(both.output[0])
        whole = graph.node("Concat", turned, axis=-1)
        yield whole
        flat = graph.constant([0, 0, -1])
        yield graph.node("Reshape", [whole.output[0], flat], out=node.output[0])

    def _scattered(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """New rows [1, H, L, d] of a buffer [1, H, S, d], which is copied."""
        graph = self._graph
        past, new = node.input[:2]
        shape = declared(graph.inputs[past])[1]
        heads = shape[1]
        if attribute(node, "axis", -2) not in (2, -2) or not isinstance(heads, int):
            raise BundleError(f"{node.name} of the graph writes in a way that is not known")
        if heads not in self._rows:
            yield from self._places(heads)
        yield graph.node("ScatterND", [past, self._rows[heads], new], out=node.output[0])

    def _places(self, heads: int) -> Iterator[onnx.NodeProto]:
        """int64 [1, H, L, 3]: batch, head and place of each new row."""
        graph = self._graph
        count, *_, own = made = new_places(graph)
        column = graph.node("Unsqueeze", [own.output[0], graph.constant([0, 1, 3])])
        sizes = [graph.constant([1, heads]), count.output[0], graph.constant([1])]
        wanted = graph.node("Concat", sizes, axis=0)
        yield from (*made, column, wanted)
        numbers = np.arange(heads).reshape(1, -1, 1, 1)
        parts = []
        for values in (graph.constant(numbers * 0), graph.constant(numbers), column.output[0]):
            place = graph.node("Expand", [values, wanted.output[0]])
            yield place
            parts.append(place.output[0])
        rows = graph.node("Concat", parts, axis=-1)
        yield rows
        self._rows[heads] = rows.output[0]

    def _attended(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Queries [1, H, L, d] over buffers [1, kv, S, d]: those of one head's keys as its rows."""
        graph = self._graph
        if len(node.input) != 4 or not (scale := attribute(node, "scale", 0.0)):
            raise BundleError(f"{node.name} of the graph attends in a way that is not known")
        query, key, value, mask = node.input
        _, kv_heads, places, width = declared(graph.outputs[key])[1]
        kind = np.float16 if self._halves else np.float32
        # Scaled before the product, which float16 may not hold.
        small = graph.node("Mul", [query, graph.constant(scale, kind)])
        rows = graph.node("Reshape", [small.output[0], graph.constant([1, kv_heads, -1, width])])
        turned = graph.node("Transpose", [key], perm=[0, 1, 3, 2])
        product = graph.node("MatMul", [rows.output[0], turned.output[0]])
        count = graph.node("Shape", [query])
        heads = graph.node("Slice", [count.output[0], *map(graph.constant, ([1], [2]))])
        shape = [graph.constant([1]), heads.output[0], graph.constant([-1, places])]
        apart = graph.node("Concat", shape, axis=0)
        scores = graph.node("Reshape", [product.output[0], apart.output[0]])
        yield from (small, rows, turned, product, count, heads, apart, scores)
        hidden = self._hidden(mask, scores.output[0], kind)
        weights = graph.node("Softmax", [hidden.output[0]], axis=-1)
        together = graph.constant([1, kv_heads, -1, places])
        folded = graph.node("Reshape", [weights.output[0], together])
        sums = graph.node("MatMul", [folded.output[0], value])
        yield from (hidden, weights, folded, sums)
        yield graph.node("Reshape", [sums.output[0], count.output[0]], out=node.output[0])

    def _hidden(self, mask: str, scores: str, kind: type[np.floating]) -> onnx.NodeProto:
        graph = self._graph
        made = self._producers.get(mask)
        if made is not None and made.op_type == "LessOrEqual":
            return graph.node("Where", [mask, scores, graph.constant(_HIDDEN, kind)])
        return graph.node("Add", [scores, mask])

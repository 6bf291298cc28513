"""Attention over static buffers as the standard's operators: TensorScatter and Attention.

In place of GroupQueryAttention, and of the slices around a buffer that the `masked` flavour and the
scoring layer have. Every buffer is as long as the file says and is attended to as a whole: what is
not filled is masked, so that its length is static and TensorRT updates it in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from lrs_edge.building.editable import EditableGraph, attribute, declared, value_info
from lrs_edge.errors import BundleError

_PAST, _PRESENT = "past_", "present_"
_WRITE, _POSITIONS, _BIAS = "past_length", "position_ids", "attention_bias"


def with_static_buffers(graph: EditableGraph, capacity: int) -> None:
    """Rewrite a decoder's attention, its buffers and what is as long as them.

    Args:
        graph: A decoder stage of flavour `gqa`, `gqa-rest` or `masked`.
        capacity: Places S of each buffer.

    Raises:
        BundleError: The attention is not written as `lrs-edge export` does.
    """
    _Static(graph, capacity).rewrite()


def new_places(graph: EditableGraph) -> tuple[onnx.NodeProto, ...]:
    """Nodes whose last gives the places of the new tokens in a buffer, and the first their number.

    Places are int64 [L], from `past_length` on, the number is int64 [1].
    """
    count = graph.node("Shape", [_POSITIONS], start=1, end=2)
    length = graph.node("Squeeze", [count.output[0], graph.constant([0])])
    new = graph.node("Range", [graph.constant(0), length.output[0], graph.constant(1)])
    own = graph.node("Add", [_WRITE, new.output[0]])
    return count, length, new, own


class _Static:
    def __init__(self, graph: EditableGraph, capacity: int) -> None:
        self._graph = graph
        self._capacity = capacity
        self._producers = graph.producers()
        self._mask = ""
        #: Values that were the filled part of a buffer, and the whole buffer that they are now.
        self._whole: dict[str, str] = {}

    def rewrite(self) -> None:
        graph = self._graph
        graph.rewrite(self._rewritten)
        for values in (graph.inputs, graph.outputs):
            for name, value in list(values.items()):
                element, shape = declared(value)
                # S of a buffer, T = past + new of a bias or of scores.
                sizes = [self._capacity if size in ("S", "T") else size for size in shape]
                values[name] = value_info(name, element, sizes)
        graph.prune()

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        for place, name in enumerate(node.input):
            node.input[place] = self._whole.get(name, name)
        out = node.output[0]
        if node.op_type == "GroupQueryAttention":
            yield from self._attention(node)
        elif node.op_type == "Slice" and node.input[0].startswith(_PRESENT):
            self._whole[out] = node.input[0]
        elif node.op_type == "Concat" and self._cut_from_buffer(node.input[0]):
            # The places before the new ones, and those.
            name = self._producers[node.input[0]].input[0].removeprefix(_PAST)
            self._whole[out] = _PRESENT + name
            yield self._scattered(name, node.input[1])
        elif node.op_type == "Concat" and out.startswith(_PRESENT):
            # Both are in the buffer already.
            if out not in node.input:
                raise BundleError(f"{out} of the graph is made in a way that is not known")
        else:
            yield node

    def _cut_from_buffer(self, name: str) -> bool:
        made = self._producers.get(name)
        return made is not None and made.op_type == "Slice" and made.input[0].startswith(_PAST)

    def _scattered(self, name: str, new: str) -> onnx.NodeProto:
        """New keys or values [1, kv, L, d] written into a buffer."""
        inputs = [_PAST + name, new, _WRITE]
        return self._graph.node("TensorScatter", inputs, out=_PRESENT + name, axis=2, mode="linear")

    def _attention(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """One GroupQueryAttention: turned, written into the buffers, attended."""
        graph = self._graph
        heads, kv_heads = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
        past_key, past_value = node.input[3:5]
        _, _, size, head_dim = declared(graph.inputs[past_key])[1]
        if not isinstance(head_dim, int) or size == 0 or len(node.input) > 10:
            raise BundleError(
                f"{node.name} of the graph attends in a way that TensorRT has no operator for"
            )
        query, key, value = node.input[:3]
        if not key:
            sizes = [count * head_dim for count in (heads, kv_heads, kv_heads)]
            split = graph.node("Split", [query, graph.constant(sizes)], axis=-1)
            more = [graph.fresh("Split") for _ in sizes[1:]]
            split.output.extend(more)
            yield split
            query, key, value = split.output
        if attribute(node, "do_rotary", 0):
            cosine, sine = (self._angles(name) for name in node.input[7:9])
            turned = []
            for x, count in ((query, heads), (key, kv_heads)):
                turn = graph.node("RotaryEmbedding", [x, cosine, sine], num_heads=count)
                yield turn
                turned.append(turn.output[0])
            query, key = turned
        parts = []
        for x, count in ((query, heads), (key, kv_heads), (value, kv_heads)):
            shape = graph.constant([1, -1, count, head_dim])
            split = graph.node("Reshape", [x, shape])
            rows = graph.node("Transpose", [split.output[0]], perm=[0, 2, 1, 3])
            yield from (split, rows)
            parts.append(rows.output[0])
        # Heads that share keys become rows of one head: TensorRT would copy the whole buffers for
        # each of them (seen in what the builder says of its engine, TensorRT-RTX 1.7).
        shape = graph.constant([1, kv_heads, -1, head_dim])
        joined = graph.node("Reshape", [parts[0], shape])
        yield joined
        names = [name.removeprefix(_PAST) for name in (past_key, past_value)]
        for name, new in zip(names, parts[1:], strict=True):
            yield self._scattered(name, new)
        if not self._mask:
            yield from self._causal(heads // kv_heads)
        inputs = [joined.output[0], *(_PRESENT + name for name in names), self._mask]
        # Heads that zeros fill up in the buffers say by what they are scaled.
        scale = attribute(node, "scale", 0.0) or head_dim**-0.5
        attended = graph.node("Attention", inputs, label=node.name, scale=scale)
        apart = graph.constant([1, heads, -1, head_dim])
        split = graph.node("Reshape", [attended.output[0], apart])
        rows = graph.node("Transpose", [split.output[0]], perm=[0, 2, 1, 3])
        flat = graph.constant([1, -1, heads * head_dim])
        yield from (attended, split, rows)
        yield graph.node("Reshape", [rows.output[0], flat], out=node.output[0])

    def _angles(self, table: str) -> str:
        """Cosine or sine [1, L, d / 2] of the new tokens, of the table that has them as rows."""
        spread = self._producers[table]
        squeeze = self._producers[spread.input[0]]
        if spread.op_type not in ("Pad", "Gather") or squeeze.op_type != "Squeeze":
            raise BundleError(f"{table} of the graph is made in a way that is not known")
        return str(squeeze.input[0])

    def _causal(self, group: int) -> Iterator[onnx.NodeProto]:
        """Bool [1, 1, group * L, S]: new token i may look at the places up to past_length + i."""
        graph = self._graph
        made = new_places(graph)
        each = graph.node("Tile", [made[-1].output[0], graph.constant([group])])
        column = graph.node("Unsqueeze", [each.output[0], graph.constant([0, 1, 3])])
        places = graph.constant(np.arange(self._capacity).reshape(1, 1, 1, -1))
        mask = graph.node("LessOrEqual", [places, column.output[0]])
        self._mask = mask.output[0]
        yield from (*made, each, column, mask)

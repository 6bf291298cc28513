"""A graph of float32 as one of float16, but for what float16 cannot hold.

TensorRT's builder refuses float32 in front of its attention. Inputs and outputs keep the types that
the manifest states, key and value buffers apart: those become float16. What stays float32 is what
the exporter keeps at fp16, too: the angles of RoPE up to their cosine and sine, and the products of
one query with all keys that tokens are scored by.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lrs_edge.building.editable import (
    FLOAT,
    HALF,
    EditableGraph,
    attribute,
    declared,
    packed,
    spread,
    value_info,
)
from lrs_edge.errors import BundleError

_FREQUENCIES = "inverse_frequencies"
_SCORES = ("logits", "attention", "next_attention")
_BUFFERS = ("past_", "present_")
#: Of floats these make something else.
_NO_FLOATS = ("QuantizeLinear", "Shape", "LessOrEqual")

#: Scales below this lose more than 1/256 in float16, whose smallest number is the other.
_SMALL, _SMALLEST = 2.0**-17, 2.0**-24


def with_halves(graph: EditableGraph) -> None:
    """Rewrite a graph so that its floats are float16.

    Raises:
        BundleError: It holds a weight that float16 cannot hold.
    """
    _Halves(graph).rewrite()


class _Halves:
    def __init__(self, graph: EditableGraph) -> None:
        self._graph = graph
        #: Types of the values that are floats, and the same value as the other type.
        self._kinds: dict[str, int] = {}
        self._casts: dict[tuple[str, int], str] = {}
        self._same: dict[str, str] = {}
        self._kept = _in_single(graph)

    def rewrite(self) -> None:
        graph = self._graph
        for values in (graph.inputs, graph.outputs):
            for name, value in list(values.items()):
                element, shape = declared(value)
                if element == FLOAT and name.startswith(_BUFFERS):
                    values[name] = value_info(name, HALF, shape)
        for name, value in graph.inputs.items():
            element = declared(value)[0]
            if element in (FLOAT, HALF):
                self._kinds[name] = element
        graph.rewrite(self._rewritten)
        graph.prune()

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        for place, name in enumerate(node.input):
            node.input[place] = self._same.get(name, name)
        if node.op_type in ("Cast", "Identity"):
            yield from self._passed_on(node)
        else:
            if node.op_type == "DequantizeLinear":
                _fit_scales(self._graph, node)
            yield from self._computed(node)

    def _passed_on(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A node that changes at most the type: what takes its result asks for its own."""
        source, out = node.input[0], node.output[0]
        target = attribute(node, "to", FLOAT)
        if not self._is_float(source):
            if node.op_type == "Cast" and target in (FLOAT, HALF):
                self._kinds[out] = target
            yield node
        elif target not in (FLOAT, HALF):
            yield node
        elif self._declared_output(out):
            yield from self._as_output(source, out)
        else:
            self._same[out] = source

    def _computed(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        kind = FLOAT if id(node) in self._kept else HALF
        floats = [place for place, name in enumerate(node.input) if self._is_float(name)]
        for place in floats:
            name = node.input[place]
            yield from self._converted(name, kind)
            node.input[place] = self._named(name, kind)
        out = node.output[0]
        wanted = self._declared_output(out)
        if not floats or node.op_type in _NO_FLOATS:
            yield node
        elif wanted and wanted != kind:
            node.output[0] = self._graph.fresh(out)
            yield node
            self._kinds[node.output[0]] = kind
            yield from self._as_output(node.output[0], out)
        else:
            self._kinds |= dict.fromkeys(node.output, kind)
            yield node

    def _is_float(self, name: str) -> bool:
        if name and self._graph.is_constant(name):
            return self._graph.element(name) in (FLOAT, HALF)
        return name in self._kinds

    def _declared_output(self, name: str) -> int:
        """Type of a graph's output; 0 for any other value."""
        value = self._graph.outputs.get(name)
        return 0 if value is None else declared(value)[0]

    def _as_output(self, name: str, out: str) -> Iterator[onnx.NodeProto]:
        kind = self._declared_output(out)
        if self._kinds[name] == kind:
            yield self._graph.node("Identity", [name], out=out)
        else:
            yield self._graph.node("Cast", [name], out=out, to=kind)
        self._kinds[out] = kind

    def _named(self, name: str, kind: int) -> str:
        """A value as a type, after `_converted`."""
        if self._kinds.get(name) == kind:
            return name
        return self._casts.get((name, kind), name)

    def _converted(self, name: str, kind: int) -> Iterator[onnx.NodeProto]:
        """Make a value of another type where there is none yet."""
        graph, key = self._graph, (name, kind)
        if key in self._casts:
            return
        if graph.is_constant(name):
            self._casts[key] = self._constant(name, kind)
        elif self._kinds[name] != kind:
            cast = graph.node("Cast", [name], to=kind)
            self._casts[key] = cast.output[0]
            self._kinds[cast.output[0]] = kind
            yield cast

    def _constant(self, name: str, kind: int) -> str:
        graph = self._graph
        if graph.element(name) == kind:
            return name
        ending, numpy_kind = ("half", np.float16) if kind == HALF else ("single", np.float32)
        made = partial(_as_floats, graph, name, numpy_kind)
        return graph.define(f"{name}.{ending}", kind, graph.shape(name), made)


def _as_floats(graph: EditableGraph, name: str, kind: type[np.floating]) -> NDArray[Any]:
    values = graph.array(name)
    with np.errstate(over="ignore"):
        made: NDArray[Any] = values.astype(kind)
    if not np.isfinite(made).all() and np.isfinite(values).all():
        raise BundleError(
            f"{name} holds values up to {np.abs(values).max():.3g}, which float16 cannot hold; "
            "TensorRT cannot run this stage"
        )
    return made


def _fit_scales(graph: EditableGraph, node: onnx.NodeProto) -> None:
    """Let a weight have scales that float16 can hold, and integers of those scales.

    Channels of tiny weights would be lost, and TensorRT's parser refuses scales of zero.
    """
    weight, name = node.input[:2]
    if not graph.is_constant(weight) or not graph.is_constant(name) or len(node.input) > 2:
        return
    scales = graph.array(name)
    if graph.element(name) != FLOAT or not (scales < _SMALL).any():
        return
    shape, four = graph.shape(weight), graph.element(weight) == TensorProto.INT4
    block = attribute(node, "block_size", 0)
    axis = attribute(node, "axis", 1) % len(shape)
    fitting = _above(scales)

    def for_all(values: NDArray[Any]) -> NDArray[Any]:
        if block:
            return spread(values, block, shape, axis)
        return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def integers() -> NDArray[Any]:
        ratio = for_all((scales / fitting.astype(np.float32)).astype(np.float32))
        moved = np.rint(graph.array(weight) * ratio).astype(np.int8)
        return packed(moved) if four else moved

    node.input[0] = graph.define(f"{weight}.fitted", graph.element(weight), shape, integers)
    node.input[1] = graph.define(f"{name}.fitted", HALF, scales.shape, lambda: fitting)


def _above(scales: NDArray[Any]) -> NDArray[np.float16]:
    """float16 for each scale: the nearest; for small ones the next that is not below."""
    nearest = scales.astype(np.float16)
    small = scales < _SMALL
    raised = np.where(nearest < scales, np.nextafter(nearest, np.float16(np.inf)), nearest)
    return np.where(small, np.maximum(raised, np.float16(_SMALLEST)), nearest)


def _in_single(graph: EditableGraph) -> set[int]:
    """Nodes that compute in float32, by id."""
    producers = graph.producers()
    kept = set()
    for one in graph.nodes:
        if one.op_type in ("Cos", "Sin") or _FREQUENCIES in one.input:
            kept.add(id(one))
    for name in _SCORES:
        node: onnx.NodeProto | None = producers.get(name)
        while node is not None and node.op_type in ("Identity", "Reshape", "Cast"):
            node = producers.get(node.input[0])
        if node is None or node.op_type != "MatMul":
            continue
        if all(_is_computed(graph, producers, value) for value in node.input):
            kept.add(id(node))
            # What only moves the products moves them as they are.
            kept.update(id(n) for n in graph.consumers()[node.output[0]])
    return kept


def _is_computed(graph: EditableGraph, producers: dict[str, onnx.NodeProto], name: str) -> bool:
    """Whether a value is no weight."""
    if graph.is_constant(name):
        return False
    made = producers.get(name)
    return made is None or made.op_type != "DequantizeLinear"

"""An ONNX graph of a bundle that is rewritten: nodes in order, weights that stay on the disk.

Weights that a rewriting leaves as they are go on lying in the bundle's own file; others are made
one after the other when the graph is saved, so that no more than one of them is in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lrs_edge.errors import BundleError, LrsEdgeError

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64

#: IR version of what is written: the first with operator set 24's element types is 11 or later.
_IR_VERSION = 11
#: Of sets of operators that TensorRT 10.3 reads.
_IR_VERSIONS = {20: 9, 21: 10}
#: Smaller tensors are part of the graph file (bytes), as in bundles.
_INLINE_BYTES = 1024
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Made:
    """A tensor whose values are computed when the graph is saved."""

    element: int
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]


class EditableGraph:
    """One graph. Values are strings, as in ONNX.

    Args:
        path: The graph file; its weights are where it says, beside it.

    Attributes:
        nodes: In an order in which they can be run.
        inputs: Declared inputs by name.
        outputs: Declared outputs by name.

    Raises:
        BundleError: The file is not an ONNX graph.
    """

    def __init__(self, path: Path) -> None:
        try:
            model = onnx.load(path, load_external_data=False)
        # Whatever protobuf raises has no base class of its own.
        except Exception as error:
            raise BundleError(
                f"{path} cannot be read as an ONNX graph ({error}); export the bundle again"
            ) from error
        graph = model.graph
        self._folder = path.parent
        self._name = graph.name
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.inputs = {value.name: value for value in graph.input}
        self.outputs = {value.name: value for value in graph.output}
        self._tensors: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self._made: dict[str, _Made] = {}
        self._names = {name for node in self.nodes for name in (*node.input, *node.output)}
        self._counts: dict[str, int] = {}

    def rewrite(self, rewritten: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto]]) -> None:
        """Put what a function gives in the place of each node, in order."""
        self.nodes = [new for node in self.nodes for new in rewritten(node)]

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that gives each value."""
        return {name: node for node in self.nodes for name in node.output if name}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that take each value."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        while True:
            count = self._counts.get(stem, 0)
            self._counts[stem] = count + 1
            name = f"{stem}_std{count}"
            if name not in self._names and not self.is_constant(name):
                return name

    def node(
        self, op: str, inputs: Sequence[str], out: str = "", label: str = "", **attributes: Any
    ) -> onnx.NodeProto:
        """A node of the standard with one output, which is not part of the graph yet."""
        out = out or self.fresh(op)
        return helper.make_node(op, inputs, [out], name=label or self.fresh("node"), **attributes)

    def is_constant(self, name: str) -> bool:
        """Whether a value is a weight or constant."""
        return name in self._tensors or name in self._made

    def element(self, name: str) -> int:
        """Type of a constant, as `TensorProto.DataType`."""
        return self._made[name].element if name in self._made else self._tensors[name].data_type

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a constant."""
        return self._made[name].shape if name in self._made else tuple(self._tensors[name].dims)

    def constant(self, value: Any, kind: Any = np.int64, stem: str = "const") -> str:
        """A new constant of values that are known."""
        array: NDArray[Any] = np.asarray(value, kind)
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self.define(self.fresh(stem), element, array.shape, lambda: array)

    def define(
        self, name: str, element: int, shape: Sequence[int], make: Callable[[], NDArray[Any]]
    ) -> str:
        """A constant that is computed when the graph is saved.

        Args:
            name: Of the constant; it replaces one of this name.
            element: Its type.
            shape: Its shape.
            make: Gives its values; of 4 bits, as bytes of two each.
        """
        self._made[name] = _Made(element, tuple(shape), make)
        return name

    def array(self, name: str) -> NDArray[Any]:
        """Values of a constant, mapped where they lie in a file; of 4 bits as int8.

        Raises:
            LrsEdgeError: The file of weights cannot be read.
        """
        if name in self._made:
            made = self._made[name]
            return (
                unpacked(made.make(), made.shape)
                if made.element == TensorProto.INT4
                else made.make()
            )
        tensor = self._tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = _place(tensor)
        shape, four = tuple(tensor.dims), tensor.data_type == TensorProto.INT4
        kind = np.uint8 if four else helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = -(-prod(shape) // 2) if four else prod(shape)
        path = self._folder / place["location"]
        try:
            mapped = np.memmap(path, kind, "r", int(place["offset"]), (count,))
        except (OSError, ValueError) as error:
            raise LrsEdgeError(f"weights in {path} cannot be read: {error}") from error
        return unpacked(mapped, shape) if four else mapped.reshape(shape)

    def prune(self) -> None:
        """Leave out nodes whose results nothing needs, and inputs that nothing takes."""
        wanted = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        self.nodes = kept[::-1]
        self.inputs = {name: value for name, value in self.inputs.items() if name in wanted}

    def save(self, path: Path, data: Path, opset: int) -> None:
        """Write the graph, and beside it the weights that are new.

        Weights that are the bundle's stay in its file, to which a link is laid in the same folder
        (a copy where links cannot be made).

        Args:
            path: The graph file.
            data: File for new weights, in the same folder; replaced.
            opset: Operators of the standard that the graph is declared with.

        Raises:
            LrsEdgeError: A file cannot be written.
        """
        self.prune()
        used = {name for node in self.nodes for name in node.input if self.is_constant(name)}
        try:
            with open(data, "wb") as stream:
                tensors = [self._saved(name, stream, data.name) for name in sorted(used)]
            for location in sorted({_place(t)["location"] for t in tensors if t.external_data}):
                if location != data.name:
                    _link(self._folder / location, path.parent / location)
            domains = sorted({node.domain for node in self.nodes} - {""})
            opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
            graph = helper.make_graph(
                self.nodes, self._name, list(self.inputs.values()), list(self.outputs.values())
            )
            graph.initializer.extend(tensors)
            model = helper.make_model(
                graph, opset_imports=opsets, ir_version=_IR_VERSIONS.get(opset, _IR_VERSION)
            )
            model.producer_name = "lrs-edge"
            path.write_bytes(model.SerializeToString(deterministic=True))
        except OSError as error:
            raise LrsEdgeError(
                f"{path} cannot be written ({error.strerror or error}); check the free space and "
                "the permissions"
            ) from error

    def _saved(self, name: str, stream: Any, location: str) -> TensorProto:
        if name not in self._made:
            return self._tensors[name]
        made = self._made[name]
        data = np.ascontiguousarray(made.make())
        tensor = TensorProto(name=name, dims=made.shape, data_type=made.element)
        if data.nbytes < _INLINE_BYTES:
            tensor.raw_data = data.tobytes()
            return tensor
        stream.seek(-stream.tell() % _ALIGNMENT, os.SEEK_CUR)
        offset = stream.tell()
        stream.write(data.data)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": location, "offset": offset, "length": data.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute."""
    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def value_info(name: str, element: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Declaration of an input or output; named dimensions are open."""
    return helper.make_tensor_value_info(name, element, list(shape))


def declared(value: onnx.ValueInfoProto) -> tuple[int, tuple[int | str, ...]]:
    """Type and shape of an input or output."""
    kind = value.type.tensor_type
    dims = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in kind.shape.dim)
    return kind.elem_type, dims


def unpacked(nibbles: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.int8]:
    """int8 of pairs of 4-bit integers -8..7, the first in the low half."""
    both = np.stack([nibbles << 4, nibbles & 0xF0], axis=-1).view(np.int8) >> 4
    return both.ravel()[: prod(shape)].reshape(tuple(shape))


def spread(values: NDArray[Any], block: int, shape: Sequence[int], axis: int = 0) -> NDArray[Any]:
    """What blocks along an axis have one number of each, such as scales, for all of a tensor.

    Args:
        values: As the tensor, but for the axis: one for each block, of which the last may be cut.
        block: Length of a block.
        shape: The tensor's.
        axis: Along which blocks lie.
    """
    return np.repeat(values, block, axis)[tuple(slice(size) for size in shape)]


def packed(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pairs of 4-bit integers per byte, the first in the low half."""
    flat = integers.ravel().view(np.uint8) & 15
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


def _place(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _link(source: Path, target: Path) -> None:
    """Lay a link to a bundle's file of weights, or a copy."""
    if target.exists() and os.path.samefile(source, target):
        return
    target.unlink(missing_ok=True)
    try:
        os.symlink(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)

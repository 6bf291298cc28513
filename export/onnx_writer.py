"""Writing ONNX graphs node by node, with weights streamed to an external data file.

Graphs are built rather than traced: operators and bytes are the same on every machine, and no
weight is in memory for longer than it takes to write it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lrs_edge.export.tensors import Array

#: RotaryEmbedding and RMSNormalization are standard operators since 23.
OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"

Precision = Literal["fp32", "int8"]

#: Offsets in the data file are multiples of this, so that engines can map it into memory.
_ALIGNMENT = 4096

#: Smaller weights stay in the graph file (bytes), and in float32 (elements): nothing is won there.
_INLINE_BYTES = 1024
_MIN_QUANTIZED = 16384


class WeightFile:
    """External data that several graphs may share: a weight is written when first asked for.

    Args:
        path: The data file; it is created.
        precision: `int8` stores large matrices as int8 with one float32 scale per output channel.
    """

    def __init__(self, path: Path, precision: Precision) -> None:
        self.path = path
        self.precision = precision
        self._stream = path.open("wb")
        self._written: dict[str, tuple[TensorProto, ...]] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def weight(self, name: str, load: Callable[[], Array]) -> TensorProto:
        """A float32 tensor, loaded and written if no graph has asked for it yet."""
        if name not in self._written:
            self._written[name] = (self._add(name, load()),)
        return self._written[name][0]

    def matrix(self, name: str, load: Callable[[], Array], axis: int) -> tuple[TensorProto, ...]:
        """A weight at this file's precision, loaded and written if no graph has asked for it yet.

        Args:
            name: Of the weight.
            load: Gives it in the layout that the operator wants.
            axis: Output channels in that layout.

        Returns:
            The weight itself, or what DequantizeLinear makes it from: integers and scales.
        """
        if name not in self._written:
            value = load()
            if self.precision == "fp32" or value.size < _MIN_QUANTIZED:
                self._written[name] = (self._add(name, value),)
            else:
                integers, scale = quantize(value, axis)
                stored = self._add(f"{name}.int8", integers), self._add(f"{name}.scale", scale)
                self._written[name] = stored
        return self._written[name]

    def _add(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Write a tensor; small ones become part of the graph file instead."""
        if array.nbytes < _INLINE_BYTES:
            return numpy_helper.from_array(np.ascontiguousarray(array), name)
        return self._write(name, array)

    def _write(self, name: str, array: NDArray[Any]) -> TensorProto:
        gap = -self._stream.tell() % _ALIGNMENT
        self._stream.write(bytes(gap))
        offset = self._stream.tell()
        np.ascontiguousarray(array).tofile(self._stream)
        # tofile writes behind the buffered stream's back; seek makes the two agree again.
        self._stream.seek(offset + array.nbytes)
        tensor = TensorProto(name=name, dims=array.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self.path.name, "offset": offset, "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def quantize(weight: Array, axis: int) -> tuple[NDArray[np.int8], Array]:
    """Symmetric int8 with one scale per output channel.

    Args:
        weight: float32, any shape.
        axis: The output channels.

    Returns:
        int8 of the same shape, and float32 scales [channels]: weight = int8 * scale.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1.0
    shape = tuple(-1 if i == axis else 1 for i in range(weight.ndim))
    rounded = np.rint(weight / scale.reshape(shape))
    return np.clip(rounded, -127, 127).astype(np.int8), scale


class GraphWriter:
    """One graph in the making. Values are strings, as in ONNX.

    Args:
        name: Name of the graph.
        weights: Where weights go.
    """

    def __init__(self, name: str, weights: WeightFile) -> None:
        self._name = name
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}

    def input(self, name: str, shape: tuple[int | str, ...], kind: type = np.float32) -> str:
        """Declare an input; named dimensions are dynamic."""
        self._inputs.append(_value_info(name, shape, kind))
        return name

    def output(self, name: str, shape: tuple[int | str, ...], kind: type = np.float32) -> None:
        """Declare an output; a node must have produced `name`."""
        self._outputs.append(_value_info(name, shape, kind))

    def node(
        self, op: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output.

        Args:
            op: Operator.
            *inputs: Values; an empty string leaves an optional input out.
            out: Name of the output; made up when empty.
            domain: Of the operator.
            **attributes: Of the node.

        Returns:
            The output's name.
        """
        return self.nodes(op, *inputs, outs=(out,), domain=domain, **attributes)[0]

    def nodes(
        self, op: str, *inputs: str, outs: tuple[str, ...], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; see `node`."""
        names = [out or self._fresh(op) for out in outs]
        label = self._fresh(f"{op}_node")
        self._nodes.append(
            helper.make_node(op, inputs, names, name=label, domain=domain, **attributes)
        )
        return names

    def constant(self, value: Any, kind: type = np.int64) -> str:
        """A small constant, kept in the graph file; equal ones are shared."""
        array: NDArray[Any] = np.asarray(value, kind)
        # Names hold the content, so that equal constants of different scopes are one.
        content = "_".join(str(item) for item in array.ravel().tolist())
        name = f"const_{array.dtype.name}_{'x'.join(map(str, array.shape))}_{content}"
        if len(name) > 120:
            name = self._fresh("const")
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, load: Callable[[], Array]) -> str:
        """A float32 weight; see `WeightFile.weight`."""
        self._initializers[name] = self._weights.weight(name, load)
        return name

    def matrix(self, name: str, load: Callable[[], Array], axis: int) -> str:
        """A weight at the file's precision, as a float32 value; see `WeightFile.matrix`."""
        tensors = self._weights.matrix(name, load, axis)
        self._initializers |= {tensor.name: tensor for tensor in tensors}
        if len(tensors) == 1:
            return name
        return self.node("DequantizeLinear", *(tensor.name for tensor in tensors), axis=axis)

    def linear(
        self,
        x: str,
        name: str,
        load: Callable[[], Array],
        bias: Callable[[], Array] | None = None,
    ) -> str:
        """Multiply by a weight, x @ weight.T + bias.

        Args:
            x: Value [..., K].
            name: Of the weight, without `.weight`.
            load: Gives the weight [N, K], as torch's Linear keeps it.
            bias: Gives the bias [N]; None for none.
        """
        y = self.node("MatMul", x, self.matrix(f"{name}.weight", lambda: load().T, axis=1))
        return y if bias is None else self.node("Add", y, self.weight(f"{name}.bias", bias))

    def save(self, path: Path) -> None:
        """Write the graph file. The same calls give the same bytes."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            [self._initializers[name] for name in sorted(self._initializers)],
        )
        domains = sorted({node.domain for node in self._nodes} - {""})
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        model.producer_name = "lrs-edge"
        path.write_bytes(model.SerializeToString(deterministic=True))

    def _fresh(self, stem: str) -> str:
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        return f"{stem}_{count}"


def _value_info(name: str, shape: tuple[int | str, ...], kind: type) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return helper.make_tensor_value_info(name, element, shape)

"""Writing ONNX graphs node by node, with weights streamed to an external data file.

Graphs are built rather than traced: operators and bytes are the same on every machine, and no
weight is in memory for longer than it takes to write it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.row_source import Load
from lrs_edge_export.graphs.weight_file import Stored, WeightFile

#: RotaryEmbedding and RMSNormalization are standard operators since 23.
OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"


class GraphWriter:
    """One graph in the making. Values are strings, as in ONNX.

    Args:
        name: Name of the graph.
        weights: Where weights go; its plan says what is computed in which precision.
        n_bits: Products with weights that are only stored as integers are MatMulNBits, where the
            plan's target wants them so. Vision graphs leave it out: engines unpack their weights.
    """

    def __init__(self, name: str, weights: WeightFile, *, n_bits: bool = False) -> None:
        self._name = name
        self._weights = weights
        self._n_bits = n_bits and weights.plan.n_bits
        self.floats = weights.plan.floats
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
        self,
        op: str,
        *inputs: str,
        out: str = "",
        domain: str = "",
        label: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node with one output.

        Args:
            op: Operator.
            *inputs: Values; an empty string leaves an optional input out.
            out: Name of the output; made up when empty.
            domain: Of the operator.
            label: Name of the node, which profilers and quantizers see; made up when empty.
            **attributes: Of the node.

        Returns:
            The output's name.
        """
        return self.nodes(op, *inputs, outs=(out,), domain=domain, label=label, **attributes)[0]

    def nodes(
        self,
        op: str,
        *inputs: str,
        outs: tuple[str | None, ...],
        domain: str = "",
        label: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs; see `node`. An output None is left out."""
        names = ["" if out is None else out or self._fresh(op) for out in outs]
        label = label or self._fresh(f"{op}_node")
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

    def real(self, value: float) -> str:
        """A float constant of the graph's type."""
        return self.constant(value, self.floats)

    def cast(self, x: str, kind: type) -> str:
        """A value as another type; `x` must not be of that type already."""
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(kind)))

    def from_float32(self, x: str) -> str:
        """A float32 value as the graph's type."""
        return x if self.floats is np.float32 else self.cast(x, self.floats)

    def to_float32(self, x: str) -> str:
        """A value of the graph's type as float32."""
        return x if self.floats is np.float32 else self.cast(x, np.float32)

    def weight(
        self, name: str, load: Callable[[], Array], kind: type[np.floating] | None = None
    ) -> str:
        """A weight that is never quantized, of the graph's type or another."""
        return self._use(self._weights.vector(name, load, kind or self.floats))[0]

    def kernel(self, name: str, load: Callable[[], Array]) -> str:
        """A convolution's kernel as a value of the graph's type; see `WeightFile.kernel`."""
        names = self._use(self._weights.kernel(name, load))
        return names[0] if len(names) == 1 else self.node("DequantizeLinear", *names, axis=0)

    def linear(
        self,
        x: str,
        name: str,
        load: Load,
        bias: Callable[[], Array] | None = None,
        *,
        outliers: bool = False,
    ) -> str:
        """Multiply by a weight, x @ weight.T + bias.

        Args:
            x: Value [..., K].
            name: Of the layer, without `.weight`.
            load: Gives the weight [N, K], as torch's Linear keeps it.
            bias: Gives the bias [N]; None for none.
            outliers: Some places of x [1, L, K] have far larger values than others, as those that
                an MLP's activation function gives; `int8-dynamic` scales each place on its own.
        """
        stored = self._weights.matrix(name, load, n_bits=self._n_bits)
        names = self._use(stored)
        if stored.n_bits:
            y = self.node("MatMulNBits", x, *names, domain=CONTRIB, label=name, **stored.n_bits)
        elif stored.precision == "int8-dynamic":
            y = (self._by_place if outliers else self._dynamic)(x, name, *names)
        else:
            weight = self._dequantized(stored, names)
            if stored.precision == "int8-static":
                x = self._static(x, name, stored)
                # Scales are float32, but of symmetric graphs, which no type is changed in.
                symmetric = self._weights.plan.symmetric
                weight = weight if symmetric else self.from_float32(weight)
            y = self.node("MatMul", x, weight, label=name)
        return y if bias is None else self.node("Add", y, self.weight(f"{name}.bias", bias))

    def matrix(self, name: str, load: Load) -> str:
        """A weight [K, N] as a value of the graph's type; engines make it once, at loading.

        Args:
            name: Of the layer, without `.weight`.
            load: Gives the weight [N, K], as torch's Linear keeps it.

        Raises:
            ValueError: Its products are planned in int8.
        """
        stored = self._weights.matrix(name, load)
        if stored.precision in ("int8-dynamic", "int8-static"):
            raise ValueError(f"{name} is planned in {stored.precision}, and used as floats")
        return self._dequantized(stored, self._use(stored))

    def _dequantized(self, stored: Stored, names: list[str]) -> str:
        if len(names) == 1:
            return names[0]
        blocks: dict[str, Any] = {"axis": 1}
        if stored.block:
            blocks = {"axis": 0, "block_size": stored.block}
        return self.node("DequantizeLinear", *names, **blocks)

    def _use(self, stored: Stored) -> list[str]:
        self._initializers |= {tensor.name: tensor for tensor in stored.tensors}
        return [tensor.name for tensor in stored.tensors]

    def _dynamic(self, x: str, name: str, integers: str, scales: str) -> str:
        """A product in int8 with inputs quantized as they come, one scale for all of them.

        ONNX Runtime makes one operator of these nodes, DynamicQuantizeMatMul.
        """
        quantized, scale, zero = self.nodes(
            "DynamicQuantizeLinear", self.to_float32(x), outs=("", "", "")
        )
        product = self.node("MatMulInteger", quantized, integers, zero, label=name)
        both = self.node("Mul", scale, scales)
        return self.from_float32(
            self.node("Mul", self.node("Cast", product, to=TensorProto.FLOAT), both)
        )

    def _by_place(self, x: str, name: str, integers: str, scales: str) -> str:
        """A product in int8 with inputs quantized as they come, one scale for each place.

        Symmetric around 128, since MatMulInteger takes one zero point for all places. The scale of
        a place is its largest magnitude; onnxruntime multiplies by the rest of the scales inside
        the product.
        """
        x = self.to_float32(x)
        largest = self.node("ReduceMax", self.node("Abs", x), self.constant([-1]), keepdims=1)
        # A place may be all zeros.
        reach = self.node("Max", largest, self.constant(1e-30, np.float32))
        step, zero = self.constant(1 / 127, np.float32), self.constant(128, np.uint8)
        # QuantizeLinear written out: onnxruntime 1.23, the last for Python 3.10, does not have the
        # one of this opset. Magnitudes are at most 127, so nothing has to be cut off.
        steps = self.node("Round", self.node("Div", self.node("Div", x, reach), step))
        shifted = self.node("Add", steps, self.constant(128, np.float32))
        quantized = self.node("Cast", shifted, to=TensorProto.UINT8)
        product = self.node(
            "MatMulIntegerToFloat",
            *(quantized, integers, step, scales, zero),
            domain=CONTRIB,
            label=name,
        )
        return self.from_float32(self.node("Mul", product, reach))

    def _static(self, x: str, name: str, stored: Stored) -> str:
        """A value through uint8 and back, in the range that it had on the calibration data.

        Through int8 without a zero point, and in the graph's type, where the plan is symmetric.
        """
        if stored.inputs is None:
            raise ValueError(f"{name} is to be quantized statically, but its inputs are not known")
        if self._weights.plan.symmetric:
            most = max(-stored.inputs.low, stored.inputs.high, 1e-6)
            step, zero = self.real(most / 127), self.constant(0, np.int8)
            integers = self.node("QuantizeLinear", x, step, zero)
            return self.node("DequantizeLinear", integers, step, zero)
        low, high = min(stored.inputs.low, 0.0), max(stored.inputs.high, 0.0)
        scale = max(high - low, 1e-8) / 255
        zero = self.constant(round(-low / scale), np.uint8)
        step = self.constant(scale, np.float32)
        integers = self.node("QuantizeLinear", self.to_float32(x), step, zero)
        return self.from_float32(self.node("DequantizeLinear", integers, step, zero))

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

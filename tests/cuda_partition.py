"""Which nodes of a graph onnxruntime's CUDA provider would leave to the CPU, told without a GPU.

Follows `GetCpuPreferredNodes` of onnxruntime (core/framework/fallback_cpu_capability.cc): a node
that takes nothing but small constants, inputs of the graph and what lies on the host already is put
on the CPU, unless its CUDA kernel reads that very input on the host. Inputs that CUDA kernels read
on the host are those of the kernels' registrations. Where a tensor is made on one side and read on
the other, onnxruntime copies it in every run, and refuses to capture a CUDA graph.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, shape_inference

#: Inputs that CUDA kernels read on the host.
_HOST_INPUTS = {
    "Expand": {1},
    "GroupQueryAttention": {6},
    "Pad": {1},
    "Range": {0, 1, 2},
    "ReduceMax": {1},
    "ReduceMean": {1},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Unsqueeze": {1},
}
#: Nodes of CUDA whose output lies on the host.
_HOST_OUTPUTS = ("Shape", "Size")
_SMALL = 100


def copies(path: Path) -> list[str]:
    """Tensors that would be copied between host and device within a run, each with its reader.

    An input of the graph that is read on one side only is bound there, and not copied.
    """
    return _Partition(
        shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    ).copies


class _Partition:
    """Nodes in order, each on the host or on the device."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self._inputs = {value.name for value in graph.input}
        self._constants = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
        self._half = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
        for value in (*graph.value_info, *graph.input):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
                self._half.add(value.name)
        self._on_host: set[str] = set()
        self._sides: dict[str, set[bool]] = {}
        self.copies: list[str] = []
        for node in graph.node:
            self._place(node)
        self.copies += sorted(name for name, both in self._sides.items() if len(both) > 1)

    def _place(self, node: onnx.NodeProto) -> None:
        if node.op_type in _HOST_OUTPUTS:
            # A shape is known without the tensor's content.
            self._on_host |= set(node.output)
            return
        host_node = self._goes_to_host(node)
        if host_node:
            self._on_host |= set(node.output)
        for place, name in enumerate(node.input):
            if not name or name in self._constants:
                continue
            here = host_node or place in _HOST_INPUTS.get(node.op_type, ())
            if name in self._inputs:
                self._sides.setdefault(name, set()).add(here)
            elif (name in self._on_host) != here:
                self.copies.append(f"{name} -> {node.name}")

    def _goes_to_host(self, node: onnx.NodeProto) -> bool:
        known = [name for name in node.input if name]
        if not self._on_host & set(known) or self._half & set(known):
            return False
        asked = _HOST_INPUTS.get(node.op_type, ())
        if any(name in self._on_host and place in asked for place, name in enumerate(node.input)):
            return False
        return all(
            self._constants.get(name, _SMALL + 1) <= _SMALL
            or name in self._inputs
            or name in self._on_host
            for name in known
        )

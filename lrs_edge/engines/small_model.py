"""Small ONNX models, written without the onnx package, which the runtime does not depend on.

They do what is done to a graph's inputs and outputs on the device where it runs. Field numbers are
those of onnx.proto3; IR version 8 and opset 17 are old enough for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.wire_format import bytes_field, number_field, text_field

#: Element types as TensorProto numbers them.
TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}

#: AttributeProto.type of an integer, and of several.
_INT, _INTS = 2, 7


@dataclass(frozen=True)
class Value:
    """An input or output: its element type, and names or sizes of its axes.

    Axes of one name have one size.
    """

    dtype: str
    axes: Sequence[str | int]


@dataclass(frozen=True)
class Node:
    """One operator of the standard domain, with one result; attributes are integers."""

    operator: str
    inputs: Sequence[str]
    output: str
    attributes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)


def small_model(
    nodes: Sequence[Node],
    inputs: Mapping[str, Value],
    outputs: Mapping[str, Value],
    constants: Mapping[str, NDArray[np.generic]] | None = None,
) -> bytes:
    """Serialized ModelProto.

    Args:
        nodes: In the order in which they run.
        inputs: By name.
        outputs: By name.
        constants: Inputs of nodes whose values are stored in the model.

    Raises:
        KeyError: A type that is not listed here.
    """
    graph = (
        b"".join(bytes_field(1, _node(node)) for node in nodes)
        + text_field(2, "small")
        + b"".join(bytes_field(5, _tensor(*item)) for item in (constants or {}).items())
        + b"".join(bytes_field(11, _value_info(*item)) for item in inputs.items())
        + b"".join(bytes_field(12, _value_info(*item)) for item in outputs.items())
    )
    opset = text_field(1, "") + number_field(2, 17)
    return number_field(1, 8) + bytes_field(7, graph) + bytes_field(8, opset)


def _node(node: Node) -> bytes:
    return (
        b"".join(text_field(1, name) for name in node.inputs)
        + text_field(2, node.output)
        + text_field(4, node.operator)
        + b"".join(bytes_field(5, _attribute(*item)) for item in node.attributes.items())
    )


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return text_field(1, name) + number_field(3, value) + number_field(20, _INT)
    numbers = b"".join(number_field(8, number) for number in value)
    return text_field(1, name) + numbers + number_field(20, _INTS)


def _tensor(name: str, value: NDArray[np.generic]) -> bytes:
    dims = b"".join(number_field(1, size) for size in value.shape)
    kind = number_field(2, TYPES[value.dtype.name])
    return dims + kind + text_field(8, name) + bytes_field(9, value.tobytes())


def _value_info(name: str, value: Value) -> bytes:
    shape = b"".join(
        bytes_field(1, number_field(1, axis) if isinstance(axis, int) else text_field(2, axis))
        for axis in value.axes
    )
    tensor = number_field(1, TYPES[value.dtype]) + bytes_field(2, shape)
    return text_field(1, name) + bytes_field(2, bytes_field(1, tensor))

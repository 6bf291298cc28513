"""ONNX models of one node, written without the onnx package, which the runtime does not depend on.

Field numbers are those of onnx.proto3; IR version 8 and opset 17 are old enough for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.wire_format import bytes_field, number_field, text_field

_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}

#: AttributeProto.type of an integer.
_INT = 2


def one_node_model(
    operator: str,
    inputs: Sequence[str],
    types: Mapping[str, str],
    constants: Mapping[str, NDArray[np.generic]] | None = None,
    *,
    attributes: Mapping[str, int] | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> bytes:
    """Serialized ModelProto of `y = operator(inputs)`.

    Args:
        operator: An operator of the standard domain.
        inputs: Names of the operator's inputs.
        types: Element type of `y` and of every input that is not a constant.
        constants: Inputs whose values are stored in the model.
        attributes: Of the operator, integers.
        axes: Names of the axes of `y` and of inputs, whose sizes are free; axes of one name have
            one size. What is left out is a matrix of any size.

    Raises:
        KeyError: A type that is not listed here.
    """
    constants, attributes, axes = constants or {}, attributes or {}, axes or {}
    node = (
        b"".join(text_field(1, name) for name in inputs)
        + text_field(2, "y")
        + text_field(4, operator)
        + b"".join(bytes_field(5, _attribute(name, value)) for name, value in attributes.items())
    )
    shown = [*(name for name in inputs if name not in constants), "y"]
    *given, result = [
        _value_info(name, types[name], axes.get(name, (f"{name}_0", f"{name}_1"))) for name in shown
    ]
    graph = (
        bytes_field(1, node)
        + text_field(2, "one_node")
        + b"".join(bytes_field(5, _tensor(name, value)) for name, value in constants.items())
        + b"".join(bytes_field(11, value) for value in given)
        + bytes_field(12, result)
    )
    opset = text_field(1, "") + number_field(2, 17)
    return number_field(1, 8) + bytes_field(7, graph) + bytes_field(8, opset)


def _attribute(name: str, value: int) -> bytes:
    return text_field(1, name) + number_field(3, value) + number_field(20, _INT)


def _tensor(name: str, value: NDArray[np.generic]) -> bytes:
    dims = b"".join(number_field(1, size) for size in value.shape)
    kind = number_field(2, _TYPES[value.dtype.name])
    return dims + kind + text_field(8, name) + bytes_field(9, value.tobytes())


def _value_info(name: str, dtype: str, axes: Sequence[str]) -> bytes:
    shape = b"".join(bytes_field(1, text_field(2, axis)) for axis in axes)
    tensor = number_field(1, _TYPES[dtype]) + bytes_field(2, shape)
    return text_field(1, name) + bytes_field(2, bytes_field(1, tensor))

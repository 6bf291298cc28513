"""Tiny ONNX models written without the onnx package, which the runtime does not depend on.

Field numbers are those of onnx.proto3; IR version 8 and opset 17 are old enough for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}


def one_node_model(
    operator: str,
    inputs: Sequence[str],
    types: Mapping[str, str],
    constants: Mapping[str, NDArray[np.generic]],
) -> bytes:
    """Serialized ModelProto of `y = operator(inputs)` over matrices of any size.

    Args:
        operator: An operator of the standard domain.
        inputs: Names of the operator's inputs.
        types: Element type of `y` and of every input that is no constant.
        constants: Inputs whose values are stored in the model.

    Raises:
        KeyError: A type that is not listed here.
    """
    node = b"".join(_text(1, name) for name in inputs) + _text(2, "y") + _text(4, operator)
    given = [name for name in inputs if name not in constants]
    graph = (
        _part(1, node)
        + _text(2, "one_node")
        + b"".join(_part(5, _tensor(name, value)) for name, value in constants.items())
        + b"".join(_part(11, _matrix(name, types[name])) for name in given)
        + _part(12, _matrix("y", types["y"]))
    )
    opset = _text(1, "") + _number(2, 17)
    return _number(1, 8) + _part(7, graph) + _part(8, opset)


def _tensor(name: str, value: NDArray[np.generic]) -> bytes:
    dims = b"".join(_number(1, size) for size in value.shape)
    kind = _number(2, _TYPES[value.dtype.name])
    return dims + kind + _text(8, name) + _part(9, value.tobytes())


def _matrix(name: str, dtype: str) -> bytes:
    shape = b"".join(_part(1, _text(2, f"{name}_{axis}")) for axis in range(2))
    tensor = _number(1, _TYPES[dtype]) + _part(2, shape)
    return _text(1, name) + _part(2, _part(1, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _text(field: int, value: str) -> bytes:
    return _part(field, value.encode())

"""A one-node ONNX model `y = Gather(x, indices, axis=2)`, written without the onnx package.

It compacts key/value buffers on whatever device holds them, without a copy to the host. The
runtime does not depend on `onnx`, so the few protobuf fields needed are encoded here (field numbers
of onnx.proto3; IR version 8, opset 17: old enough for every engine).
"""

from __future__ import annotations

_TYPES = {"float32": 1, "float16": 10, "int8": 3}
_INT64 = 7


def gather_model(dtype: str) -> bytes:
    """Serialized ModelProto: x [1, heads, old, dim] of `dtype`, indices int64 [n] -> y.

    Raises:
        KeyError: `dtype` is none of `float32`, `float16` and `int8`.
    """
    element = _TYPES[dtype]
    axis = _text(1, "axis") + _number(3, 2) + _number(20, 2)
    node = _text(1, "x") + _text(1, "indices") + _text(2, "y") + _text(4, "Gather") + _part(5, axis)
    graph = (
        _part(1, node)
        + _text(2, "gather")
        + _part(11, _value_info("x", element, ("one", "heads", "old", "dim")))
        + _part(11, _value_info("indices", _INT64, ("new",)))
        + _part(12, _value_info("y", element, ("one", "heads", "new", "dim")))
    )
    opset = _text(1, "") + _number(2, 17)
    return _number(1, 8) + _part(7, graph) + _part(8, opset)


def _value_info(name: str, element: int, dims: tuple[str, ...]) -> bytes:
    shape = b"".join(_part(1, _text(2, dim)) for dim in dims)
    tensor = _number(1, element) + _part(2, shape)
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

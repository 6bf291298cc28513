"""Shapes of what moves, joins and cuts tensors, and what goes element by element.

Each function gives the outputs of a node of known inputs; WireError where they do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.wire_format import WireError

if TYPE_CHECKING:
    from lrs_edge.bundle.graphs import Node

#: Elements of one tensor.
MAX_ELEMENTS = 1 << 28
#: Integer tensors up to this size have values.
_MAX_VALUES = 4096


@dataclass(frozen=True)
class Value:
    """A tensor: its shape, its values where they are few integers, and whether it is constant.

    `kind` is the type (TensorProto.DataType) of a constant that the file holds, else 0.
    """

    shape: tuple[int, ...]
    values: NDArray[np.int64] | None = None
    constant: bool = False
    kind: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


def _known(value: Value, what: str) -> list[int]:
    """Values of an input that a shape is made of. Raises WireError where they are not known."""
    if value.values is None:
        raise WireError(f"the shape that {what} makes depends on data")
    return [int(number) for number in value.values.ravel().tolist()]


def _axis(node: Node, rank: int, default: int, name: str = "axis") -> int:
    axis = node.numbers.get(name, (default,))[0]
    if not -rank <= axis < max(rank, 1):
        raise WireError(f"{node.op} has an axis {axis} of {rank}")
    return axis % rank if rank else 0


def _axes(node: Node, inputs: Sequence[Value], rank: int) -> list[int] | None:
    """Axes given as the second input or as an attribute; None where there are none."""
    if len(inputs) > 1 and node.inputs[1]:
        axes = _known(inputs[1], node.op)
    elif "axes" in node.numbers:
        axes = list(node.numbers["axes"])
    else:
        return None
    if any(not -rank <= axis < rank for axis in axes):
        raise WireError(f"{node.op} has axes {axes[:8]} of {rank}")
    return sorted({axis % rank for axis in axes})


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of tensors taken together, as numpy's; a few microseconds instead of tens."""
    found = shapes[0]
    for shape in shapes[1:]:
        if shape == found or not shape:
            continue
        if not found:
            found = shape
            continue
        rank = max(len(found), len(shape))
        sides = [(1,) * (rank - len(side)) + side for side in (found, shape)]
        for one, other in zip(*sides, strict=True):
            if one != other and 1 not in (one, other):
                raise WireError(f"shapes {found} and {shape} do not fit together")
        found = tuple(other if one == 1 else one for one, other in zip(*sides, strict=True))
    return found


_INTEGER_FUNCTIONS: dict[str, Callable[..., NDArray[np.int64]]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Min": np.minimum,
    "Max": np.maximum,
    "Cast": lambda x: x,
    "Identity": lambda x: x,
}

#: Same shape as the first input, whatever the others are.
_LIKE_FIRST = frozenset(
    (
        *("BatchNormalization", "Clip", "DequantizeLinear", "LayerNormalization"),
        *("QuantizeLinear", "RMSNormalization", "RotaryEmbedding"),
    )
)


def elementwise(node: Node, inputs: Sequence[Value]) -> Value:
    """The output of a node that is not in `MOVES`, with values where it computes few integers."""
    if node.op in _LIKE_FIRST:
        return Value(inputs[0].shape)
    given = [value for name, value in zip(node.inputs, inputs, strict=True) if name]
    shape = broadcast([value.shape for value in given])
    function = _INTEGER_FUNCTIONS.get(node.op)
    numbers = [value.values for value in given]
    few = prod(shape) <= _MAX_VALUES and len(numbers) == (
        1 if node.op in ("Cast", "Identity") else 2
    )
    if function is None or not few or any(n is None for n in numbers):
        return Value(shape)
    with np.errstate(all="ignore"):
        return Value(shape, function(*numbers).astype(np.int64))


def _shape(node: Node, inputs: Sequence[Value]) -> list[Value]:
    shape = inputs[0].shape
    start, end = (node.numbers.get(name, (None,))[0] for name in ("start", "end"))
    part = shape[slice(start, end)]
    return [Value((len(part),), np.array(part, np.int64))]


def _concat(node: Node, inputs: Sequence[Value]) -> list[Value]:
    axis = _axis(node, len(inputs[0].shape), 0)
    shapes = [list(value.shape) for value in inputs]
    joined = sum(shape[axis] for shape in shapes)
    for shape in shapes:
        if len(shape) != len(shapes[0]):
            raise WireError("Concat joins tensors of several ranks")
        shape[axis] = joined
    if any(shape != shapes[0] for shape in shapes):
        raise WireError("Concat joins tensors that do not fit")
    values = None
    if joined <= _MAX_VALUES and all(value.values is not None for value in inputs):
        values = np.concatenate([v.values for v in inputs if v.values is not None], axis)
    return [Value(tuple(shapes[0]), values)]


def _gather(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data, indices = inputs[0], inputs[1]
    axis = _axis(node, len(data.shape), 0)
    shape = data.shape[:axis] + indices.shape + data.shape[axis + 1 :]
    values = None
    if data.values is not None and indices.values is not None and prod(shape) <= _MAX_VALUES:
        values = np.asarray(np.take(data.values, indices.values, axis), np.int64)
    return [Value(shape, values)]


def _slice(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data = inputs[0]
    starts, ends = _known(inputs[1], "Slice"), _known(inputs[2], "Slice")
    count = len(starts)
    axes = _known(inputs[3], "Slice") if len(inputs) > 3 and node.inputs[3] else list(range(count))
    steps = _known(inputs[4], "Slice") if len(inputs) > 4 and node.inputs[4] else [1] * count
    if not count == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise WireError("Slice has bounds that do not fit")
    parts = [slice(None)] * len(data.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # The engine's bounds for going backwards are not Python's; nothing written here does.
        if step < 0 or not -len(parts) <= axis < len(parts):
            raise WireError("Slice goes backwards, or along an axis that is not there")
        parts[axis] = slice(start, end, step)
    shape = tuple(
        len(range(*part.indices(size))) for part, size in zip(parts, data.shape, strict=True)
    )
    return [Value(shape, None if data.values is None else data.values[tuple(parts)])]


def _reshape(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data, wanted = inputs[0], _known(inputs[1], "Reshape")
    keep_zero = node.numbers.get("allowzero", (0,))[0]
    shape = [
        data.shape[i] if size == 0 and not keep_zero else size for i, size in enumerate(wanted)
    ]
    if -1 in shape:
        others = prod(size for size in shape if size != -1)
        if others == 0 or data.size % others:
            raise WireError("Reshape does not fit")
        shape[shape.index(-1)] = data.size // others
    if min(shape, default=0) < 0 or prod(shape) != data.size:
        raise WireError("Reshape does not fit")
    return [Value(tuple(shape), None if data.values is None else data.values.reshape(shape))]


def _transpose(node: Node, inputs: Sequence[Value]) -> list[Value]:
    shape = inputs[0].shape
    order = node.numbers.get("perm", tuple(reversed(range(len(shape)))))
    if sorted(order) != list(range(len(shape))):
        raise WireError("Transpose has an order that does not fit")
    return [Value(tuple(shape[axis] for axis in order))]


def _squeeze(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data = inputs[0]
    axes = _axes(node, inputs, len(data.shape))
    if axes is None:
        axes = [i for i, size in enumerate(data.shape) if size == 1]
    if any(data.shape[axis] != 1 for axis in axes):
        raise WireError("Squeeze takes away an axis that is not 1")
    shape = tuple(size for i, size in enumerate(data.shape) if i not in axes)
    return [Value(shape, None if data.values is None else data.values.reshape(shape))]


def _unsqueeze(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data = inputs[0]
    added = len(inputs[1].shape and _known(inputs[1], "Unsqueeze")) if len(inputs) > 1 else 1
    axes = _axes(node, inputs, len(data.shape) + added) or []
    shape = list(data.shape)
    for axis in axes:
        shape.insert(axis, 1)
    return [Value(tuple(shape), None if data.values is None else data.values.reshape(shape))]


def _expand(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    wanted = _known(inputs[1], "Expand")
    if min(wanted, default=0) < 0 or prod(wanted) > MAX_ELEMENTS:
        raise WireError(f"Expand makes a tensor of shape {wanted[:8]}")
    return [Value(broadcast([inputs[0].shape, tuple(wanted)]))]


def _range(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    (start,), (end,), (step,) = (_known(value, "Range") for value in inputs)
    if step == 0 or not 0 <= (count := len(range(start, end, step))) <= MAX_ELEMENTS:
        raise WireError("Range makes too many numbers")
    values = np.arange(start, end, step, dtype=np.int64) if count <= _MAX_VALUES else None
    return [Value((count,), values)]


def _pad(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data, pads = inputs[0], _known(inputs[1], "Pad")
    rank = len(data.shape)
    if len(pads) != 2 * rank or (len(inputs) > 3 and node.inputs[3]):
        raise WireError("Pad has other axes than its input")
    if any(abs(pad) > MAX_ELEMENTS for pad in pads):
        raise WireError("Pad makes too much")
    return [Value(tuple(s + pads[i] + pads[rank + i] for i, s in enumerate(data.shape)))]


def _split(node: Node, inputs: Sequence[Value]) -> list[Value]:
    shape = inputs[0].shape
    axis = _axis(node, len(shape), 0)
    if len(inputs) > 1 and node.inputs[1]:
        sizes = _known(inputs[1], "Split")
    else:
        count = len(node.outputs)
        size = -(-shape[axis] // count)
        sizes = [min(size, shape[axis] - i * size) for i in range(count)]
    if len(sizes) != len(node.outputs) or min(sizes) < 0 or sum(sizes) != shape[axis]:
        raise WireError("Split does not fit")
    return [Value((*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]


def _reduce(node: Node, inputs: Sequence[Value]) -> list[Value]:
    shape = inputs[0].shape
    axes = _axes(node, inputs, len(shape))
    if axes is None:
        if node.numbers.get("noop_with_empty_axes", (0,))[0]:
            return [Value(shape)]
        axes = list(range(len(shape)))
    if node.numbers.get("keepdims", (1,))[0]:
        return [Value(tuple(1 if i in axes else size for i, size in enumerate(shape)))]
    return [Value(tuple(size for i, size in enumerate(shape) if i not in axes))]


def _flatten(node: Node, inputs: Sequence[Value]) -> list[Value]:
    shape = inputs[0].shape
    axis = node.numbers.get("axis", (1,))[0]
    return [Value((prod(shape[:axis]), prod(shape[axis:])))]


#: By operator; all others go element by element.
MOVES: dict[str, Callable[[Node, Sequence[Value]], list[Value]]] = {
    "Shape": _shape,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Range": _range,
    "Pad": _pad,
    "Split": _split,
    "Flatten": _flatten,
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
}

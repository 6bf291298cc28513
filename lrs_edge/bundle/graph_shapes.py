"""How large the tensors of a graph get, and how much a run computes, found without running it.

The graph is gone through once, at sizes that its role is run at: every tensor has a shape, and
integers that shapes are made of have values. A graph whose shapes cannot be told this way depends
on its data, which those of `lrs_edge_export` never do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.wire_format import WireError

if TYPE_CHECKING:
    from lrs_edge.bundle.graphs import GraphFacts, Node

#: New tokens and places filled before them, at which decoders are gone through.
SITUATIONS = ((256, 768), (1, 0))
#: A projector that has no fixed number of tokens gets those of a large tile.
_FEATURES = 2048
#: Elements of one tensor, and of all that are alive at a time (2 GiB as float32).
_MAX_ELEMENTS = 1 << 28
_MAX_ALIVE = 1 << 29
#: What a run may compute besides what its weights account for.
_FREE_PRODUCTS = 1 << 36
_FREE_ELEMENTS = 1 << 31
_FREE_FOLDED = 1 << 24
#: Integer tensors up to this size have values.
_MAX_VALUES = 4096
_MAX_RANK = 16
#: Operators of those below whose output is their input's memory, and others whose output is not:
#: engines write what goes element by element in place.
_VIEWS = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))
_COPIES = frozenset(("Softmax",))
#: Numbers of bits, and of inputs in a block, that MatMulNBits has kernels for; types of constants.
_N_BITS, _N_BITS_BLOCKS = (4, 8), (16, 32, 64, 128, 256)
_FLOAT, _UINT8, _FLOAT16 = 1, 2, 10


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


def check_sizes(facts: GraphFacts) -> None:
    """Go through a graph at each of the sizes that it is run at.

    Raises:
        WireError: Shapes depend on data, tensors get too large, or a run computes far more than the
            weights account for.
        ValueError: Shapes do not fit together.
    """
    situations = SITUATIONS if "past_length" in facts.inputs else SITUATIONS[:1]
    for new, past in situations:
        _Pass(facts, new, past).run()


def peak_elements(facts: GraphFacts, new: int, past: int) -> int:
    """Elements of all tensors that are alive at a time, without inputs and constants.

    Args:
        facts: The graph.
        new: New tokens, of a decoder.
        past: Places that are filled before them.

    Raises:
        WireError: As `check_sizes`.
        ValueError: Shapes do not fit together.
    """
    one = _Pass(facts, new, past)
    one.run()
    return one.peak


class _Pass:
    """One pass over a graph at fixed sizes."""

    def __init__(self, facts: GraphFacts, new: int, past: int) -> None:
        self._facts = facts
        self._new, self._past = new, past
        self._names = {"N": 1, "L": new, "T": past + new, "S": past + new, "M": _FEATURES}
        self._values: dict[str, Value] = {"": Value(())}
        self._weights = sum(prod(c.shape) for c in facts.constants.values())
        self._products = self._elements = self._folded = self._alive = 0
        self.peak = 0

    def run(self) -> None:
        facts = self._facts
        for name, shape in facts.inputs.items():
            self._values[name] = self._input(name, shape)
        for name, constant in facts.constants.items():
            self._values[name] = Value(constant.shape, constant.values, True, constant.kind)
        last = {name: i for i, node in enumerate(facts.nodes) for name in node.inputs}
        for i, node in enumerate(facts.nodes):
            self._step(node, i, last)
        for name in facts.outputs:
            if name not in self._values:
                raise WireError(f"nothing makes the output {name[:60]!r}")

    def _input(self, name: str, shape: tuple[int | str, ...]) -> Value:
        sizes = []
        for dim in shape:
            if isinstance(dim, str) and dim not in self._names:
                raise WireError(f"{name[:60]!r} has a dimension {dim[:60]!r} that no graph has")
            sizes.append(self._names[dim] if isinstance(dim, str) else dim)
        if prod(sizes) > _MAX_ELEMENTS:
            raise WireError(f"the input {name[:60]!r} is too large")
        lengths = {"past_length": self._past, "total_length": self._past + self._new}
        known = np.array([lengths[name]], np.int64) if name in lengths else None
        return Value(tuple(sizes), known)

    def _step(self, node: Node, place: int, last: Mapping[str, int]) -> None:
        inputs = []
        for name in node.inputs:
            if name not in self._values:
                raise WireError(f"{node.op} takes {name[:60]!r}, which nothing has made")
            inputs.append(self._values[name])
        made = self._shapes(node, inputs)
        if len(node.outputs) > len(made):
            raise WireError(f"{node.op} has {len(node.outputs)} outputs")
        constant = all(self._values[name].constant for name in node.inputs if name)
        for name, value in zip(node.outputs, made, strict=False):
            self._keep(node, name, replace(value, constant=constant), used=name in last)
        if node.op in _COPIES or (node.op in _FUNCTIONS and node.op not in _VIEWS):
            self.peak = max(self.peak, self._alive)
        for name in dict.fromkeys(node.inputs):
            if last[name] == place and name and not self._values[name].constant:
                self._alive -= self._values[name].size
        self.peak = max(self.peak, self._alive)

    def _keep(self, node: Node, name: str, value: Value, *, used: bool) -> None:
        if name and name in self._values:
            raise WireError(f"{name[:60]!r} is made twice")
        if min(value.shape, default=0) < 0 or len(value.shape) > _MAX_RANK:
            raise WireError(f"{node.op} makes a tensor of shape {value.shape}")
        # Weights as other types are as large as the files make them.
        free = value.constant and node.op in ("DequantizeLinear", "Cast", "Transpose", "Identity")
        if value.size > _MAX_ELEMENTS and not free:
            raise WireError(f"{node.op} makes a tensor of {value.size} elements")
        if name:
            self._values[name] = value
        self._count(value.size, constant=value.constant, kept=used)

    def _count(self, size: int, *, constant: bool, kept: bool) -> None:
        if constant:
            self._folded += size
        else:
            self._elements += size
            self._alive += size if kept else 0
        if self._alive > _MAX_ALIVE:
            raise WireError("its tensors are too large together")
        if (
            self._products > _FREE_PRODUCTS + 16 * self._weights * _tokens(self._new)
            or self._elements > _FREE_ELEMENTS + 2 * self._weights
            or self._folded > _FREE_FOLDED + 4 * self._weights
        ):
            raise WireError("a run computes far more than the weights account for")

    def _shapes(self, node: Node, inputs: Sequence[Value]) -> list[Value]:
        function = _FUNCTIONS.get(node.op)
        found = [_elementwise(node, inputs)] if function is None else function(node, inputs)
        if node.op in _PRODUCTS:
            self._products += _PRODUCTS[node.op](node, inputs, found[0])
        if node.op == "GroupQueryAttention":
            self._check_attention(node, inputs)
        return found

    def _check_attention(self, node: Node, inputs: Sequence[Value]) -> None:
        """What the operator trusts in: places and lengths that lie inside of its buffers."""
        total = self._past + self._new
        ends, whole = inputs[5].values, inputs[6].values
        sound = ends is not None and ends.tolist() == [total - 1]
        sound = sound and whole is not None and whole.ravel().tolist() == [total]
        if len(inputs) > 7 and node.inputs[7]:
            tables, rows = inputs[7:9], inputs[9].values
            sound = sound and rows is not None and rows.shape == (1, self._new)
            sound = sound and rows is not None and 0 <= rows.min() <= rows.max() < total
            sound = sound and all(t.shape == (total, tables[0].shape[-1]) for t in tables)
        if not sound:
            raise WireError("GroupQueryAttention is given other lengths than the cache has")


def _tokens(new: int) -> int:
    return max(new, 256)


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


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
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


def _elementwise(node: Node, inputs: Sequence[Value]) -> Value:
    if node.op in _LIKE_FIRST:
        return Value(inputs[0].shape)
    given = [value for name, value in zip(node.inputs, inputs, strict=True) if name]
    shape = _broadcast([value.shape for value in given])
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
    if min(wanted, default=0) < 0 or prod(wanted) > _MAX_ELEMENTS:
        raise WireError(f"Expand makes a tensor of shape {wanted[:8]}")
    return [Value(_broadcast([inputs[0].shape, tuple(wanted)]))]


def _range(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    (start,), (end,), (step,) = (_known(value, "Range") for value in inputs)
    if step == 0 or not 0 <= (count := len(range(start, end, step))) <= _MAX_ELEMENTS:
        raise WireError("Range makes too many numbers")
    values = np.arange(start, end, step, dtype=np.int64) if count <= _MAX_VALUES else None
    return [Value((count,), values)]


def _pad(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data, pads = inputs[0], _known(inputs[1], "Pad")
    rank = len(data.shape)
    if len(pads) != 2 * rank or (len(inputs) > 3 and node.inputs[3]):
        raise WireError("Pad has other axes than its input")
    if any(abs(pad) > _MAX_ELEMENTS for pad in pads):
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


def _matmul(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    left, right = inputs[0].shape, inputs[1].shape
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        raise WireError(f"{_node.op} has factors {left} and {right}")
    return [Value((*_broadcast([left[:-2], right[:-2]]), left[-2], right[-1]))]


def _gemm(node: Node, inputs: Sequence[Value]) -> list[Value]:
    left, right = inputs[0].shape, inputs[1].shape
    if len(left) != 2 or len(right) != 2:
        raise WireError("Gemm has factors that are not matrices")
    rows, inner = left[::-1] if node.numbers.get("transA", (0,))[0] else left
    other, columns = right[::-1] if node.numbers.get("transB", (0,))[0] else right
    if inner != other:
        raise WireError("Gemm has factors that do not fit")
    return [Value((rows, columns))]


def _conv(node: Node, inputs: Sequence[Value]) -> list[Value]:
    data, kernel = inputs[0].shape, inputs[1].shape
    spatial = len(data) - 2
    if (
        spatial < 1
        or len(kernel) != len(data)
        or node.texts.get("auto_pad", "")
        not in (
            "",
            "NOTSET",
        )
    ):
        raise WireError("Conv has a kernel or padding that is not allowed")
    pads = node.numbers.get("pads", (0,) * (2 * spatial))
    strides = node.numbers.get("strides", (1,) * spatial)
    steps = node.numbers.get("dilations", (1,) * spatial)
    group = node.numbers.get("group", (1,))[0]
    sound = len(pads) == 2 * spatial and len(strides) == len(steps) == spatial and group >= 1
    if not sound or min(pads) < 0 or min(strides) < 1 or min(steps) < 1:
        raise WireError("Conv has padding or strides that do not fit")
    if kernel[1] * group != data[1] or kernel[0] % group or 0 in kernel:
        raise WireError("Conv has channels that do not fit")
    sizes = []
    for i in range(spatial):
        room = data[2 + i] + pads[i] + pads[spatial + i] - steps[i] * (kernel[2 + i] - 1) - 1
        if room < 0:
            raise WireError("Conv has a kernel larger than its input")
        sizes.append(room // strides[i] + 1)
    return [Value((data[0], kernel[0], *sizes))]


def _depth_to_space(node: Node, inputs: Sequence[Value]) -> list[Value]:
    shape = inputs[0].shape
    (block,) = node.numbers.get("blocksize", (0,))
    if len(shape) != 4 or block < 1 or shape[1] % block**2:
        raise WireError("DepthToSpace does not fit")
    return [Value((shape[0], shape[1] // block**2, shape[2] * block, shape[3] * block))]


def _dynamic(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    return [Value(inputs[0].shape), Value(()), Value(())]


def _n_bits(node: Node, inputs: Sequence[Value]) -> list[Value]:
    """MatMulNBits over blocks, scales and zero points that are as long as its attributes say.

    Kernels read as many bytes as follow from the attributes, so nothing may be shorter; what other
    versions of the operator take besides (an order of inputs, a bias) is not let through.
    """
    names = "K", "N", "bits", "block_size"
    inner, columns, bits, block = (node.numbers[name][0] for name in names)
    # Others may say that the weight lies in an order of some device's own.
    if set(node.texts) - {*names, "accuracy_level"}:
        raise WireError("MatMulNBits has attributes that are not known")
    data, given = inputs[0].shape, inputs[1:]
    sound = bits in _N_BITS and block in _N_BITS_BLOCKS and min(inner, columns) > 0
    if not sound or not data or data[-1] != inner or not 2 <= len(given) <= 3:
        raise WireError("MatMulNBits has factors that do not fit")
    blocks = -(-inner // block)
    sizes = columns * blocks * block * bits // 8, columns * blocks, columns * -(-blocks * bits // 8)
    kinds = (_UINT8,), (_FLOAT, _FLOAT16), (_UINT8,)
    for value, size, allowed in zip(given, sizes, kinds, strict=False):
        if value.size != size or value.kind not in allowed:
            raise WireError("MatMulNBits has weights, scales or zero points that do not fit")
    return [Value((*data[:-1], columns))]


def _attention(node: Node, inputs: Sequence[Value]) -> list[Value]:
    """GroupQueryAttention over buffers of which the outputs are the same."""
    heads, kv_heads = (node.numbers[name][0] for name in ("num_heads", "kv_num_heads"))
    query, keys, values = inputs[0].shape, inputs[3].shape, inputs[4].shape
    packed = not node.inputs[1]
    sound = len(keys) == 4 and keys == values and keys[:2] == (1, kv_heads) and kv_heads > 0
    sound = sound and len(query) == 3 and query[0] == 1 and heads % kv_heads == 0
    if not sound:
        raise WireError("GroupQueryAttention has buffers that do not fit")
    width = keys[3]
    wide = (heads + 2 * kv_heads) * width if packed else heads * width
    others = () if packed else (inputs[1].shape, inputs[2].shape)
    if query[2] != wide or any(s != (1, query[1], kv_heads * width) for s in others):
        raise WireError("GroupQueryAttention has vectors that do not fit")
    return [Value((1, query[1], heads * width)), Value(keys), Value(values)]


def _packed_attention(node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Attention of projections that it makes itself, of one matrix for all three."""
    states, weights, heads = inputs[0].shape, inputs[1].shape, node.numbers["num_heads"][0]
    sound = len(states) == 3 and weights == (states[2], 3 * states[2]) and heads > 0
    # A mask or past tokens would be further inputs.
    if not sound or states[2] % heads or len(inputs) > 3 or len(node.outputs) > 1:
        raise WireError("Attention has vectors that do not fit")
    return [Value(states)]


def _multi_head_attention(node: Node, inputs: Sequence[Value]) -> list[Value]:
    query, heads = inputs[0].shape, node.numbers["num_heads"][0]
    sound = len(inputs) == 3 and len(query) == 3 and heads > 0 and query[2] % heads == 0
    if not sound or any(value.shape != query for value in inputs) or len(node.outputs) > 1:
        raise WireError("MultiHeadAttention has vectors that do not fit")
    return [Value(query)]


def _skip_norm(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A norm of a sum, and the sum itself; what lies between both is never given."""
    states = inputs[0].shape
    if inputs[1].shape != states:
        raise WireError("a norm adds states that do not fit")
    return [Value(states), Value(()), Value(()), Value(states)]


_FUNCTIONS: dict[str, Callable[[Node, Sequence[Value]], list[Value]]] = {
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
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvInteger": _conv,
    "DepthToSpace": _depth_to_space,
    "DynamicQuantizeLinear": _dynamic,
    "MatMulNBits": _n_bits,
    "GroupQueryAttention": _attention,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head_attention,
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
}

_Cost = Callable[["Node", Sequence[Value], Value], int]


def _inner(_node: Node, inputs: Sequence[Value], made: Value) -> int:
    return made.size * inputs[0].shape[-1]


def _gemm_cost(_node: Node, inputs: Sequence[Value], made: Value) -> int:
    return inputs[0].size * made.shape[-1]


def _conv_cost(_node: Node, inputs: Sequence[Value], made: Value) -> int:
    return made.size * prod(inputs[1].shape[1:])


def _attention_cost(_node: Node, inputs: Sequence[Value], made: Value) -> int:
    return 2 * made.size * inputs[3].shape[2]


def _vision_attention_cost(node: Node, inputs: Sequence[Value], made: Value) -> int:
    projections = made.size * inputs[1].shape[1] if node.op == "Attention" else 0
    return projections + 2 * made.size * made.shape[1]


_PRODUCTS: dict[str, _Cost] = {
    **dict.fromkeys(("MatMul", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits"), _inner),
    "MatMulIntegerToFloat": _inner,
    "Gemm": _gemm_cost,
    "Conv": _conv_cost,
    "ConvInteger": _conv_cost,
    "GroupQueryAttention": _attention_cost,
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _vision_attention_cost),
}

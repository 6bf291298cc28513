"""Shapes of what multiplies, convolves and attends, and how many products that takes.

Each function gives the outputs of a node of known inputs; WireError where they do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

from lrs_edge.bundle.graph_values import Value, broadcast
from lrs_edge.bundle.wire_format import WireError

if TYPE_CHECKING:
    from lrs_edge.bundle.graphs import Node

#: Numbers of bits, and of inputs in a block, that MatMulNBits has kernels for; types of constants.
_N_BITS, _N_BITS_BLOCKS = (4, 8), (16, 32, 64, 128, 256)
_FLOAT, _UINT8, _FLOAT16 = 1, 2, 10


def _matmul(_node: Node, inputs: Sequence[Value]) -> list[Value]:
    left, right = inputs[0].shape, inputs[1].shape
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        raise WireError(f"{_node.op} has factors {left} and {right}")
    return [Value((*broadcast([left[:-2], right[:-2]]), left[-2], right[-1]))]


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


#: By operator.
PRODUCTS: dict[str, Callable[[Node, Sequence[Value]], list[Value]]] = {
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


#: Products of a run, by operator.
COSTS: dict[str, _Cost] = {
    **dict.fromkeys(("MatMul", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits"), _inner),
    "MatMulIntegerToFloat": _inner,
    "Gemm": _gemm_cost,
    "Conv": _conv_cost,
    "ConvInteger": _conv_cost,
    "GroupQueryAttention": _attention_cost,
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _vision_attention_cost),
}

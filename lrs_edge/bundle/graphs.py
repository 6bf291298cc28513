"""What an ONNX file of a bundle may contain, checked before an engine sees it.

A bundle is data, but a graph can be a program: loops, functions, files read from elsewhere, tensors
whose sizes are computed. Only the operators that `lrs_edge_export` writes, and ordinary arithmetic
beside them, are let through; no subgraphs, no functions, no custom operators. What is left runs
straight through, and `lrs_edge.bundle.graph_shapes` says how large its tensors get and how much it
computes. Field numbers are those of onnx.proto3 (onnx 1.23).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.files import is_inside, read_limited
from lrs_edge.bundle.graph_shapes import check_sizes, peak_elements
from lrs_edge.bundle.wire_format import (
    BYTES,
    FIXED32,
    VARINT,
    Field,
    Reader,
    Span,
    WireError,
    signed,
)
from lrs_edge.errors import BundleError

#: Weights lie outside; what is left of a 256-layer model is under 4 MB.
MAX_GRAPH_BYTES = 16 << 20
MAX_NODES = 20_000
_MAX_FIELDS = 600_000
_MAX_RANK = 8
#: Values of integer constants that can stand for shapes are looked at up to this many.
_MAX_VALUES = 4096
_MAX_TEXT = 1024

_IR_VERSIONS = range(3, 15)
_OPSETS = {"": range(13, 31), "com.microsoft": range(1, 2)}

#: Same shape out as in, or that of all inputs broadcast together.
ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "DequantizeLinear", "Div"),
        *("Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual"),
        *("HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization"),
        *("LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Max", "Min", "Mod"),
        *("Mul", "Neg", "Not", "Or", "Pow", "QuantizeLinear", "RMSNormalization"),
        *("Reciprocal", "Relu", "RotaryEmbedding", "Round", "Sigmoid", "Sign", "Sin"),
        *("Softmax", "Softplus", "Sqrt", "Sub", "Sum", "Tanh", "Where", "Xor"),
    )
)
_OPERATORS = {
    "": ELEMENTWISE
    | frozenset(
        (
            *("BatchNormalization", "Concat", "Conv", "ConvInteger", "DepthToSpace"),
            *("DynamicQuantizeLinear", "Expand", "Flatten", "Gather", "Gemm", "MatMul"),
            *("MatMulInteger", "Pad", "Range", "ReduceMax", "ReduceMean", "ReduceMin"),
            *("ReduceSum", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose"),
            *("Unsqueeze",),
        )
    ),
    "com.microsoft": frozenset(
        (
            *("Attention", "BiasGelu", "DynamicQuantizeMatMul", "FastGelu"),
            *("GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention"),
            *("QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
        )
    ),
}

#: Bits of one element, by TensorProto.DataType.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
_INTEGERS = {6: "<i4", 7: "<i8"}
#: int32, int64 and bool: never what keys, values or pixels are.
_WHOLE = (6, 7, 9)

_TEXT, _NUMBER, _PART = Field(BYTES), Field(VARINT), Field(BYTES)
_TEXTS, _NUMBERS, _PARTS = Field(BYTES, True), Field(VARINT, True), Field(BYTES, True)
_MODEL = {1: _NUMBER, 2: _TEXT, 3: _TEXT, 4: _TEXT, 5: _NUMBER, 6: _TEXT, 7: _PART, 8: _PARTS}
_OPSET = {1: _TEXT, 2: _NUMBER}
_GRAPH = {1: _PARTS, 2: _TEXT, 5: _PARTS, 10: _TEXT, 11: _PARTS, 12: _PARTS, 13: _PARTS}
_NODE = {1: _TEXTS, 2: _TEXTS, 3: _TEXT, 4: _TEXT, 5: _PARTS, 6: _TEXT, 7: _TEXT}
_ATTRIBUTE = {
    1: _TEXT,
    2: Field(FIXED32),
    3: _NUMBER,
    4: _TEXT,
    7: Field(FIXED32, True),
    8: _NUMBERS,
    9: _TEXTS,
    13: _TEXT,
    20: _NUMBER,
}
_TENSOR = {
    1: _NUMBERS,
    2: _NUMBER,
    4: Field(FIXED32, True),
    5: _NUMBERS,
    7: _NUMBERS,
    8: _TEXT,
    9: _TEXT,
    12: _TEXT,
    13: _PARTS,
    14: _NUMBER,
}
_ENTRY = {1: _TEXT, 2: _TEXT}
_VALUE = {1: _TEXT, 2: _PART, 3: _TEXT}
_TYPE = {1: _PART, 6: _TEXT}
_TENSOR_TYPE = {1: _NUMBER, 2: _PART}
_SHAPE = {1: _PARTS}
_DIM = {1: _NUMBER, 2: _TEXT, 3: _TEXT}


@dataclass(frozen=True)
class Node:
    """One operation; attributes that are integers or text, by name."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, tuple[int, ...]]
    texts: Mapping[str, str]
    name: str = ""


@dataclass(frozen=True)
class Constant:
    """A tensor that the file holds: its shape, and its values where they are a few integers.

    `kind` is its type, TensorProto.DataType.
    """

    shape: tuple[int, ...]
    values: NDArray[np.int64] | None
    kind: int


@dataclass
class GraphFacts:
    """What a graph file says: nodes in order, constants, inputs and outputs with their shapes.

    Dimensions that the graph leaves open are names.
    """

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    #: Names of inputs and outputs that are integers or truth values.
    integers: set[str] = field(default_factory=set)
    #: Bytes of constants outside of the graph file, by file of the bundle.
    stored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphRun:
    """What one run of a graph takes.

    Attributes:
        stored: Bytes of weights by file of the bundle.
        peak: Numbers in all tensors that are alive at a time, without weights and buffers.
        operators: Names of the operators in it.
    """

    stored: Mapping[str, int]
    peak: int
    operators: frozenset[str]


def check_graph(root: Path, name: str, sizes: Mapping[str, int]) -> None:
    """Check one graph file of a bundle.

    Args:
        root: The bundle's folder.
        name: Path of the graph in it.
        sizes: Bytes of the files that the manifest lists.

    Raises:
        BundleError: The file is not an ONNX graph, or holds what no graph of a bundle may hold.
    """
    with _refused(root / name):
        check_sizes(_read(root, name, sizes))


def graph_run(root: Path, name: str, sizes: Mapping[str, int], new: int, past: int) -> GraphRun:
    """What one run of a graph of a bundle reads and makes.

    Args:
        root: The bundle's folder.
        name: Path of the graph in it.
        sizes: Bytes of the files that the manifest lists.
        new: New tokens, of a decoder.
        past: Places that are filled before them.

    Raises:
        BundleError: As `check_graph`.
    """
    with _refused(root / name):
        facts = _read(root, name, sizes)
        operators = frozenset(node.op for node in facts.nodes)
        return GraphRun(facts.stored, peak_elements(facts, new, past), operators)


def read_facts(root: Path, name: str, sizes: Mapping[str, int]) -> GraphFacts:
    """What a graph file of a bundle says; arguments and errors as of `check_graph`."""
    with _refused(root / name):
        return _read(root, name, sizes)


def _read(root: Path, name: str, sizes: Mapping[str, int]) -> GraphFacts:
    data = read_limited(root / name, MAX_GRAPH_BYTES)
    return read_graph(data, PurePosixPath(name).parent, sizes)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns whatever a bad graph provokes into one error."""
    try:
        yield
    # Besides the errors of reading: inputs or attributes that are missing, or of another kind.
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{path} is not an ONNX graph that a bundle may hold: {reason}; use a bundle that "
            "`lrs-edge export` wrote"
        ) from error


def read_graph(data: bytes, folder: PurePosixPath, sizes: Mapping[str, int]) -> GraphFacts:
    """Parse a graph and check everything but the sizes of its tensors.

    Args:
        data: The file.
        folder: Where it lies in the bundle, which paths of external data start from.
        sizes: Bytes of the files that the manifest lists.

    Raises:
        WireError: The file holds anything else than what is allowed.
    """
    reader = Reader(data, _MAX_FIELDS)
    model = reader.message(Span(0, len(data)), _MODEL)
    if _number(model, 1) not in _IR_VERSIONS:
        raise WireError(f"it has IR version {_number(model, 1)}")
    domains = set()
    for value in model.get(8, []):
        opset = reader.message(_span(value), _OPSET)
        domain, version = _text(reader, opset, 1), _number(opset, 2)
        if version not in _OPSETS.get(domain, ()) or domain in domains:
            raise WireError(f"it wants operators {domain[:60]!r} of version {version}")
        domains.add(domain)
    if 7 not in model:
        raise WireError("it has no graph")
    parts = reader.message(_span(model[7][0]), _GRAPH)
    facts = GraphFacts()
    external = _External(folder, sizes)
    _read_constants(reader, parts, facts, external)
    facts.stored = external.taken
    for number, values in ((11, facts.inputs), (12, facts.outputs), (13, {})):
        for value in parts.get(number, []):
            found, shape, kind = _read_value(reader, _span(value))
            if found in values:
                raise WireError(f"{found[:60]!r} is declared twice")
            values[found] = shape
            if kind in _WHOLE and number != 13:
                facts.integers.add(found)
    if len(parts.get(1, [])) > MAX_NODES:
        raise WireError(f"it has more than {MAX_NODES} nodes")
    facts.nodes = [_read_node(reader, _span(value), domains) for value in parts.get(1, [])]
    return facts


def _read_node(reader: Reader, span: Span, domains: set[str]) -> Node:
    parts = reader.message(span, _NODE)
    op, domain = _text(reader, parts, 4), _text(reader, parts, 7)
    if domain not in domains or op not in _OPERATORS.get(domain, ()):
        shown = f"{domain}.{op}" if domain else op
        raise WireError(f"the operator {shown[:60]!r} is not one that bundles may use")
    numbers: dict[str, tuple[int, ...]] = {}
    texts: dict[str, str] = {}
    for value in parts.get(5, []):
        attribute = reader.message(_span(value), _ATTRIBUTE)
        name = _text(reader, attribute, 1)
        if name in numbers or name in texts:
            raise WireError(f"{op} has {name[:60]!r} twice")
        texts[name] = _text(reader, attribute, 4)
        if 3 in attribute or 8 in attribute:
            numbers[name] = tuple(reader.numbers(attribute.get(3, []) + attribute.get(8, [])))
            if len(numbers[name]) > 2 * _MAX_RANK or max(map(abs, numbers[name]), default=0) >> 31:
                raise WireError(f"{op} has {name[:60]!r} out of bounds")
    inputs, outputs = (_names(reader, parts.get(number, [])) for number in (1, 2))
    return Node(op, inputs, outputs, numbers, texts, _text(reader, parts, 3))


def _names(reader: Reader, values: list[int | Span]) -> tuple[str, ...]:
    return tuple(reader.text(value) for value in values)


def _read_constants(
    reader: Reader, parts: dict[int, list[int | Span]], facts: GraphFacts, external: _External
) -> None:
    for value in parts.get(5, []):
        tensor = reader.message(_span(value), _TENSOR)
        name = _text(reader, tensor, 8)
        shape = tuple(reader.numbers(tensor.get(1, [])))
        kind = _number(tensor, 2)
        if name in facts.constants:
            raise WireError(f"the constant {name[:60]!r} is there twice")
        if kind not in _BITS or len(shape) > _MAX_RANK or min(shape, default=0) < 0:
            raise WireError(f"the constant {name[:60]!r} has a type or shape that is not allowed")
        size = -(-prod(shape) * _BITS[kind] // 8)
        if _number(tensor, 14):
            external.take(reader, tensor, name, size)
            facts.constants[name] = Constant(shape, None, kind)
        else:
            if 13 in tensor:
                raise WireError(f"the constant {name[:60]!r} lies at two places")
            values = _inline(reader, tensor, shape, kind, size)
            facts.constants[name] = Constant(shape, values, kind)


def _inline(
    reader: Reader,
    tensor: dict[int, list[int | Span]],
    shape: tuple[int, ...],
    kind: int,
    size: int,
) -> NDArray[np.int64] | None:
    """Values of a constant in the graph file itself, where they are a few integers."""
    name = _text(reader, tensor, 8)
    count = prod(shape)
    if 9 in tensor:
        raw = reader.bytes(tensor[9][0])
        if len(raw) != size or any(number in tensor for number in (4, 5, 7)):
            raise WireError(f"the constant {name[:60]!r} has {len(raw)} bytes instead of {size}")
        if kind not in _INTEGERS or count > _MAX_VALUES:
            return None
        return np.frombuffer(raw, _INTEGERS[kind]).astype(np.int64).reshape(shape)
    typed = [number for number in (4, 5, 7) if number in tensor]
    if len(typed) > 1:
        raise WireError(f"the constant {name[:60]!r} has values of two types")
    if typed == [4]:
        held = sum(
            (part.end - part.start) // 4 if isinstance(part, Span) else 1 for part in tensor[4]
        )
        values: list[int] = []
    else:
        values = reader.numbers(tensor[typed[0]]) if typed else []
        held = len(values)
    if held != (-(-count // 2) if _BITS[kind] == 4 else count):
        raise WireError(f"the constant {name[:60]!r} has {held} values instead of {count}")
    if kind not in _INTEGERS or count > _MAX_VALUES:
        return None
    return np.array(values, np.int64).reshape(shape)


class _External:
    """External data of a graph: plain parts of listed files, no more of it than the files hold."""

    def __init__(self, folder: PurePosixPath, sizes: Mapping[str, int]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._left: dict[str, int] = {}
        self._files: dict[str, str] = {}

    def take(
        self, reader: Reader, tensor: dict[int, list[int | Span]], name: str, size: int
    ) -> None:
        """Check where one tensor of `size` bytes lies. Raises WireError."""
        if any(number in tensor for number in (4, 5, 7, 9)):
            raise WireError(f"the constant {name[:60]!r} lies at two places")
        place: dict[str, str] = {}
        for value in tensor.get(13, []):
            entry = reader.message(_span(value), _ENTRY)
            place[_text(reader, entry, 1)] = _text(reader, entry, 2)
        location = place.get("location", "")
        if location not in self._files:
            self._files[location] = self._listed(location)
        file = self._files[location]
        numbers = [place.get(key, "0") for key in ("offset", "length")]
        known = {"location", "offset", "length"}
        if set(place) != known or not all(re.fullmatch(r"[0-9]{1,15}", text) for text in numbers):
            raise WireError(f"the constant {name[:60]!r} has a place that cannot be read")
        offset, length = map(int, numbers)
        if length != size or offset + length > self._sizes[file]:
            raise WireError(f"the constant {name[:60]!r} does not lie inside {location[:100]!r}")
        # Otherwise a small file could stand for any number of large weights.
        left = self._left.get(file, self._sizes[file]) - length
        if left < 0:
            raise WireError(f"its constants are more than {location[:100]!r} holds")
        self._left[file] = left

    @property
    def taken(self) -> dict[str, int]:
        """Bytes of each file that constants lie in."""
        return {file: self._sizes[file] - left for file, left in self._left.items()}

    def _listed(self, location: str) -> str:
        """Path in the bundle of a file that constants name. Raises WireError."""
        file = str(self._folder / location)
        # Windows' separators too: the engine would take them there.
        if not is_inside(location) or "\\" in location or file not in self._sizes:
            raise WireError(
                f"it has constants in {location[:100]!r}, which is not listed in the manifest"
            )
        return file


def _read_value(reader: Reader, span: Span) -> tuple[str, tuple[int | str, ...], int]:
    """Name, shape and TensorProto.DataType of an input or output, which must be a tensor."""
    parts = reader.message(span, _VALUE)
    name = _text(reader, parts, 1)
    kind = reader.message(_span(parts[2][0]), _TYPE) if 2 in parts else {}
    tensor = reader.message(_span(kind[1][0]), _TENSOR_TYPE) if 1 in kind else {}
    if tensor and _number(tensor, 1) not in _BITS:
        raise WireError(f"{name[:60]!r} has a type that is not allowed")
    shape: list[int | str] = []
    if 2 in tensor:
        for value in reader.message(_span(tensor[2][0]), _SHAPE).get(1, []):
            dim = reader.message(_span(value), _DIM)
            shape.append(_number(dim, 1) if 1 in dim else _text(reader, dim, 2))
    if len(shape) > _MAX_RANK or any(isinstance(d, int) and not 0 <= d < 1 << 31 for d in shape):
        raise WireError(f"{name[:60]!r} has a shape that is not allowed")
    return name, tuple(shape), _number(tensor, 1)


def _span(value: int | Span) -> Span:
    if not isinstance(value, Span):
        raise WireError("a number stands where a part should be")
    return value


def _text(reader: Reader, parts: dict[int, list[int | Span]], number: int) -> str:
    text = reader.text(parts[number][0]) if number in parts else ""
    if len(text) > _MAX_TEXT:
        raise WireError("it has a name that is too long")
    return text


def _number(parts: dict[int, list[int | Span]], number: int) -> int:
    value = parts[number][0] if number in parts else 0
    if isinstance(value, Span):
        raise WireError("text stands where a number should be")
    return signed(value)

"""External data of ONNX graphs: weights streamed to one file, quantized on the way.

A matrix passes through in chunks of rows, so that no more than one chunk is ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs import block_layout
from lrs_edge_export.graphs.row_source import Load, RowSource, Whole
from lrs_edge_export.quantization import (
    InputStatistics,
    Quantized,
    gptq,
    quantize_channels,
    round_to_nearest,
)
from lrs_edge_export.quantization.precision import INT4_BLOCK, INT8_BLOCK, Plan, Precision

#: Offsets in the data file are multiples of this, so that engines can map it into memory.
_ALIGNMENT = 4096

#: Smaller weights stay in the graph file (bytes), and in float (elements): nothing is won there.
_INLINE_BYTES = 1024
MIN_QUANTIZED = 16384

#: Elements of a matrix that are in memory at once: 128 MiB in float32.
_CHUNK = 32 << 20


@dataclass(frozen=True)
class Stored:
    """One weight in the file.

    Attributes:
        precision: It is stored at.
        tensors: The weight itself; or integers and scales, and zero points if blocks have any.
        block: Inputs that share a scale; 0 for one scale per output channel.
        inputs: What is known of the inputs, for `int8-static`.
        n_bits: Attributes of the MatMulNBits that the tensors are laid out for; empty where they
            are not.
    """

    precision: Precision
    tensors: tuple[TensorProto, ...]
    block: int = 0
    inputs: InputStatistics | None = None
    n_bits: Mapping[str, Any] = field(default_factory=dict)


class WeightFile:
    """External data that several graphs may share: a weight is written when first asked for.

    Args:
        path: The data file; it is created.
        plan: Precisions.

    Attributes:
        plan: Precisions of what is asked for from now on.
        sizes: Elements of every weight that can be quantized, by the name of its layer.
    """

    def __init__(self, path: Path, plan: Plan | None = None) -> None:
        self.path = path
        self.plan = plan or Plan()
        self.sizes: dict[str, int] = {}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._end = 0
        self._written: dict[tuple[str, Precision, bool], Stored] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def quantizable(self) -> dict[str, int]:
        """Those of `sizes` that are worth quantizing."""
        return {name: size for name, size in self.sizes.items() if size >= MIN_QUANTIZED}

    def vector(self, name: str, load: Callable[[], Array], kind: type[np.floating]) -> Stored:
        """A weight that is never quantized: norms, biases, embeddings of places.

        Args:
            name: Of the weight.
            load: Gives it, float32.
            kind: Type it is stored as.
        """
        precision: Precision = "fp16" if kind is np.float16 else "fp32"
        key = name, precision, False
        if key not in self._written:
            value = _as_floats(load(), kind, name)
            self._written[key] = Stored(precision, (self._add(_label(name, precision), value),))
        return self._written[key]

    def kernel(self, name: str, load: Callable[[], Array]) -> Stored:
        """A convolution's kernel [N, ...]: float, or int8 with one scale per output channel.

        Args:
            name: Of the layer, without `.weight`.
            load: Gives the kernel, float32.
        """
        precision = self.plan.of(name)
        if precision not in ("fp32", "fp16"):
            precision = "int8-weight"
        key = f"{name}.weight", precision, False
        if key not in self._written:
            value = load()
            self.sizes[name] = value.size
            if precision in ("fp32", "fp16") or value.size < MIN_QUANTIZED:
                return self.vector(f"{name}.weight", lambda: value, self.plan.floats)
            integers, scales = quantize(value, axis=0)
            self._written[key] = Stored(
                precision,
                (
                    self._add(f"{name}.weight.int8", integers),
                    self._add(f"{name}.weight.scale", scales.astype(self.plan.floats)),
                ),
            )
        return self._written[key]

    def matrix(self, name: str, load: Load, *, n_bits: bool = False) -> Stored:
        """A linear layer's weight, transposed to [K, N] as MatMul wants it, at its precision.

        Args:
            name: Of the layer, without `.weight`.
            load: Gives the weight [N, K], float32.
            n_bits: Where it is only stored as integers, it is laid out for MatMulNBits instead.

        Raises:
            ExportError: The weight does not fit into float16.
        """
        precision = self.plan.of(name)
        # Of all others there is one layout only.
        n_bits = n_bits and precision in ("int8-weight", "int4-weight")
        key = f"{name}.weight", precision, n_bits
        if key not in self._written:
            source = load if isinstance(load, RowSource) else Whole(load())
            self._written[key] = self._matrix(name, source, n_bits=n_bits)
        return self._written[key]

    def _matrix(self, name: str, source: RowSource, *, n_bits: bool) -> Stored:
        rows, cols = source.shape
        self.sizes[name] = rows * cols
        precision, floats = self.plan.of(name), self.plan.floats
        if rows * cols < MIN_QUANTIZED and precision not in ("fp32", "fp16"):
            precision = "fp16" if floats is np.float16 else "fp32"
        chunks = source.chunks(max(_CHUNK // cols // 2 * 2, 2))
        weight, label = f"{name}.weight", _label(f"{name}.weight", precision)
        if precision in ("fp32", "fp16"):
            parts = ((_as_floats(chunk, floats, weight).T,) for chunk in chunks)
            names = ((label, np.dtype(floats), (cols, rows)),)
            return Stored(precision, self._columns(names, parts))
        if precision in ("int8-dynamic", "int8-static"):
            symmetric = self.plan.symmetric and precision == "int8-static"
            channels = _all_channels if symmetric else _channels
            parts8 = (channels(chunk) for chunk in chunks)
            names8 = (
                (f"{weight}.int8", np.dtype(np.int8), (cols, rows)),
                (f"{weight}.scale", np.dtype(floats if symmetric else np.float32), (rows,)),
            )
            known = self._inputs(name) if precision == "int8-static" else None
            return Stored(precision, self._columns(names8, parts8), inputs=known)
        bits, block = (4, INT4_BLOCK) if precision == "int4-weight" else (8, INT8_BLOCK)
        made = self._rounded(name, bits, block, chunks)
        if n_bits:
            tensors = self._n_bits(weight, source.shape, bits, block, made)
            attributes = block_layout.attributes(source.shape, bits, block)
            return Stored(precision, tensors, block=block, n_bits=attributes)
        return Stored(precision, self._blocks(weight, source.shape, bits, block, made), block=block)

    def _has_zeros(self, bits: int) -> bool:
        """Whether blocks of so many bits have zero points."""
        return bits == 4 and self.plan.zero_points

    def _rounded(
        self, name: str, bits: int, block: int, chunks: Iterator[Array]
    ) -> Iterator[Quantized]:
        """Chunks of rows as integers."""
        zero_points = self._has_zeros(bits)

        def rounded(chunk: Array) -> Quantized:
            known = self._inputs(name) if bits == 4 else None
            moments = [] if known is None else known.second_moments
            return _quantized(chunk, bits, block, moments, zero_points=zero_points)

        for number, chunk in enumerate(chunks):
            if bits == 4 and self.plan.rounded is not None:
                yield self.plan.rounded(name, number, chunk.shape, partial(rounded, chunk))
            else:
                yield rounded(chunk)

    def _n_bits(
        self,
        weight: str,
        shape: tuple[int, int],
        bits: int,
        block: int,
        chunks: Iterator[Quantized],
    ) -> tuple[TensorProto, ...]:
        """Blocks [N, ceil(K / block), bytes], scales and zero points; see `block_layout.layout`."""
        floats, zero_points = self.plan.floats, self._has_zeros(bits)
        tensors = block_layout.layout(shape, bits, block, floats, zero_points=zero_points)
        sizes = [int(np.prod(dims)) * kind.itemsize for _, kind, dims in tensors]
        starts = [self._reserve(size) for size in sizes]
        ends = list(starts)
        for chunk in chunks:
            for number, array in enumerate(block_layout.packed(chunk, bits, block)):
                part = np.ascontiguousarray(array, tensors[number][1])
                self._write(ends[number], part)
                ends[number] += part.nbytes
        return tuple(
            self._external(
                f"{weight}.{label}", helper.np_dtype_to_tensor_dtype(kind), dims, start, size
            )
            for (label, kind, dims), start, size in zip(tensors, starts, sizes, strict=True)
        )

    def _blocks(
        self,
        weight: str,
        shape: tuple[int, int],
        bits: int,
        block: int,
        chunks: Iterator[Quantized],
    ) -> tuple[TensorProto, ...]:
        """Integers [K, N] with scales [ceil(K / block), N], and zero points alike."""
        (rows, cols), floats = shape, self.plan.floats

        def parts() -> Iterator[tuple[NDArray[Any], ...]]:
            for made in chunks:
                both = made.integers.T, made.scales.astype(floats).T
                yield both if made.zeros is None else (*both, made.zeros.T)

        blocks, kind = -(-cols // block), np.dtype(np.int8)
        names = [
            (f"{weight}.int{bits}", kind, (cols, rows)),
            (f"{weight}.scale{bits}", np.dtype(floats), (blocks, rows)),
        ]
        if self._has_zeros(bits):
            names.append((f"{weight}.zero{bits}", kind, (blocks, rows)))
        packed = (0, 2) if bits == 4 else ()
        return self._columns(names, parts(), packed=packed)

    def _inputs(self, name: str) -> InputStatistics | None:
        return None if self.plan.calibrator is None else self.plan.calibrator().inputs(name)

    def _columns(
        self,
        tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]],
        parts: Iterator[tuple[NDArray[Any], ...]],
        *,
        packed: Collection[int] = (),
    ) -> tuple[TensorProto, ...]:
        """Write tensors [K, N] that come as blocks of columns [K, n], or [N] as [n].

        Args:
            tensors: Name, type and shape of each.
            parts: One array per tensor at a time; all but the last have an even number of columns.
            packed: Numbers of those that hold two 4-bit integers per byte.
        """
        places = []
        for number, (_, kind, shape) in enumerate(tensors):
            count = int(np.prod(shape))
            size = -(-count // 2) if number in packed else count * kind.itemsize
            places.append((self._reserve(size), size))
        start = 0
        for part in parts:
            for number, array in enumerate(part):
                offset, (_, kind, shape) = places[number][0], tensors[number]
                halved = number in packed
                self._put(offset, array.astype(kind, copy=False), shape, start, halved=halved)
            start += part[0].shape[-1]
        made = []
        for number, (name, kind, shape) in enumerate(tensors):
            element = helper.np_dtype_to_tensor_dtype(kind)
            if number in packed:
                element = TensorProto.INT4
            made.append(self._external(name, element, shape, *places[number]))
        return tuple(made)

    def _put(
        self, offset: int, array: NDArray[Any], shape: tuple[int, ...], start: int, *, halved: bool
    ) -> None:
        """Write columns `start` and on of a tensor whose first byte is at `offset`."""
        width = shape[-1]
        if halved:
            array = _packed(array, width)
        unit = array.dtype.itemsize
        if array.shape[-1] * (2 if halved else 1) >= width:
            self._write(offset, np.ascontiguousarray(array))
            return
        begin = start // 2 if halved else start * unit
        stride = width // 2 if halved else width * unit
        rows = np.ascontiguousarray(array.reshape(-1, array.shape[-1]))
        for row, values in enumerate(rows):
            self._write(offset + row * stride + begin, values)

    def _write(self, offset: int, array: NDArray[Any]) -> None:
        view = memoryview(array.data).cast("B")
        while view:
            done = os.pwrite(self._file, view, offset)
            view, offset = view[done:], offset + done

    def _add(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Write a tensor; small ones become part of the graph file instead."""
        array = np.ascontiguousarray(array)
        if array.nbytes < _INLINE_BYTES:
            return numpy_helper.from_array(array, name)
        offset = self._reserve(array.nbytes)
        self._write(offset, array)
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self._external(name, element, array.shape, offset, array.nbytes)

    def _reserve(self, size: int) -> int:
        """Offset of a new region; what is not written there stays zero."""
        offset = self._end + -self._end % _ALIGNMENT
        self._end = offset + size
        os.ftruncate(self._file, self._end)
        return offset

    def _external(
        self, name: str, element: int, shape: Sequence[int], offset: int, size: int
    ) -> TensorProto:
        tensor = TensorProto(name=name, dims=shape)
        tensor.data_type = element
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self.path.name, "offset": offset, "length": size}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def quantize(weight: Array, axis: int) -> tuple[NDArray[np.int8], Array]:
    """Symmetric int8 with one scale per output channel.

    Args:
        weight: float32, any shape.
        axis: The output channels.

    Returns:
        int8 of the same shape, and float32 scales [channels]: weight = int8 * scale.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1.0
    shape = tuple(-1 if i == axis else 1 for i in range(weight.ndim))
    rounded = np.rint(weight / scale.reshape(shape))
    return np.clip(rounded, -127, 127).astype(np.int8), scale


def _all_channels(chunk: Array) -> tuple[NDArray[Any], ...]:
    """For int8 inputs, whose products no processor cuts off."""
    integers, scales = quantize(chunk, axis=0)
    return integers.T, scales


def _channels(chunk: Array) -> tuple[NDArray[Any], ...]:
    integers, scales = quantize_channels(chunk)
    return integers.T, scales


def _quantized(
    chunk: Array, bits: int, block: int, moments: Sequence[Array], *, zero_points: bool
) -> Quantized:
    if moments:
        return gptq(chunk, bits, block, moments, zero_points=zero_points)
    return round_to_nearest(chunk, bits, block, zero_points=zero_points)


def _packed(integers: NDArray[np.int8], width: int) -> NDArray[np.uint8]:
    """Two 4-bit integers per byte, the first in the low half, row-major over the whole tensor.

    Args:
        integers: int8 [K, n] of -8..7.
        width: Columns of the whole tensor; where it is odd, all of them are given.
    """
    if integers.shape[-1] == width:
        flat = integers.ravel()
    elif width % 2:
        raise ExportError(f"a matrix of {width} outputs is too large for int4-weight; use int8")
    else:
        flat = integers.ravel()
    nibbles = flat.view(np.uint8) & 15
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed: NDArray[np.uint8] = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)
    return packed if integers.shape[-1] == width else packed.reshape(len(integers), -1)


def _as_floats(value: Array, kind: type[np.floating], name: str) -> NDArray[Any]:
    """The weight in another type. Raises ExportError where float16 cannot hold it."""
    if kind is np.float32:
        return value
    with np.errstate(over="ignore"):
        half = value.astype(kind)
    if not np.isfinite(half).all():
        raise ExportError(
            f"{name} holds values up to {np.abs(value).max():.3g}, which float16 cannot hold; "
            "export this stage in another precision"
        )
    return half


def _label(name: str, precision: Precision) -> str:
    """Name of a float tensor in the graphs: the checkpoint's own at float32."""
    return name if precision == "fp32" else f"{name}.{precision}"

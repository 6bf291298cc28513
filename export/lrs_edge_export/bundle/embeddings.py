"""The embeddings file of a bundle, written in chunks of rows: no table is ever whole in memory.

Order and spelling are the safetensors library's, so that the file equals what
`safetensors.numpy.save` makes of the same tables, byte for byte (`tests/test_embeddings.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.safetensors_file import NewTensor, write_file
from lrs_edge_export.checkpoints.tensors import Array

#: Values in memory at once (float32, and as many of the stored type).
_CHUNK_VALUES = 2 << 20

_Kind = np.dtype[np.float16 | np.float32]

_NAMES: dict[_Kind, str] = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}


def write_embeddings(path: Path, tables: Mapping[str, Rows | Array], *, rounded: bool) -> None:
    """Write tables as float16 where that loses nothing, or rounding is asked for, else as float32.

    Every table is read twice: to find its type, then to write it.

    Args:
        path: The file; it is replaced.
        tables: By name; arrays of any shape, float32.
        rounded: Take float16 wherever no value becomes infinite.

    Raises:
        ExportError: A table cannot be read.
        OSError: The file cannot be written.
    """
    kinds = {name: _stored_type(table, rounded=rounded) for name, table in tables.items()}
    # The library puts wider types first, so that all tensors are aligned.
    order = sorted(tables, key=lambda name: (-kinds[name].itemsize, name))
    write_file(path, [_stored(name, tables[name], kinds[name]) for name in order])


def _stored(name: str, table: Rows | Array, kind: _Kind) -> NewTensor:
    def blocks() -> Iterator[memoryview]:
        for chunk in _chunks(table):
            yield np.ascontiguousarray(chunk.astype(kind, copy=False)).data

    return NewTensor.of(name, _NAMES[kind], table.shape, blocks)


def _stored_type(table: Rows | Array, *, rounded: bool) -> _Kind:
    """The type that a table is stored in; see `write_embeddings`."""
    for chunk in _chunks(table):
        with np.errstate(over="ignore"):
            half: NDArray[np.float16] = chunk.astype(np.float16)
        # Checkpoints hold finite values only: what is infinite now did not fit.
        kept = np.isfinite(half).all() if rounded else _same(half, chunk)
        if not kept:
            return np.dtype(np.float32)
    return np.dtype(np.float16)


def _same(half: NDArray[np.float16], chunk: Array) -> bool:
    return bool(np.array_equal(half.astype(np.float32), chunk))


def _chunks(table: Rows | Array) -> Iterator[Array]:
    """Consecutive parts of a table along its first axis."""
    size = max(_CHUNK_VALUES // max(math.prod(table.shape[1:]), 1), 1)
    if isinstance(table, Rows):
        yield from table.chunks(size)
        return
    for start in range(0, len(table), size):
        yield table[start : start + size]

"""The embeddings file of a bundle, written in chunks of rows: no table is ever whole in memory.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes of header length (little
endian), a JSON header padded with spaces to a multiple of 8 bytes, then the tensors. Order and
spelling are the library's, so that the file equals what `safetensors.numpy.save` makes of the same
tables, byte for byte (checked by `tests/test_embeddings.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.tensors import Array

#: Values in memory at once (float32, and as many of the stored type).
_CHUNK_VALUES = 2 << 20

_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}


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
    header, place = {}, 0
    for name in order:
        end = place + math.prod(tables[name].shape) * kinds[name].itemsize
        header[name] = {
            "dtype": _NAMES[kinds[name]],
            "shape": list(tables[name].shape),
            "data_offsets": [place, end],
        }
        place = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            for chunk in _chunks(tables[name]):
                stream.write(np.ascontiguousarray(chunk.astype(kinds[name], copy=False)).data)


def _stored_type(table: Rows | Array, *, rounded: bool) -> np.dtype[np.float16 | np.float32]:
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

"""Safetensors files that are larger than memory: parts are read, and files written, in blocks.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes of header length (little
endian), a JSON header padded with spaces to a multiple of 8 bytes, then the tensors.

The safetensors library checks every header here, but neither reads nor writes. It writes only what
is whole in memory. It reads from mapped pages, which count as the process's until the file is
closed: 1.1 GB of weights, tensor by tensor, took 1.7 s and 72 MB in blocks; mapped, 3.8 s and
1,184 MB, or 4.6 s and 72 MB where the file was opened again for every 8 MB (safetensors 0.8, two
cores under other load, medians of three).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lrs_edge.errors import ExportError

#: Bytes that are in memory at once.
BLOCK = 8 << 20

#: Bytes of one value, by the format's names of types that are written here.
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        kind: Type as the format names it, such as `BF16`.
        shape: Sizes.
        offset: Its first byte in the file.
        size: Bytes.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def blocks(self, dtype: np.dtype[Any], start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Values start .. stop - 1, flat, in their order; the file is open meanwhile.

        Args:
            dtype: To read them as.
            start: First value.
            stop: Value after the last.

        Raises:
            ExportError: The file ends too early, or cannot be read.
        """
        step = max(BLOCK // dtype.itemsize, 1)
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(self.offset + start * dtype.itemsize)
                for place in range(start, stop, step):
                    count = min(step, stop - place)
                    block = np.fromfile(stream, dtype, count)
                    if len(block) != count:
                        raise damaged(self.path, "it ends too early")
                    yield block
        except OSError as error:
            raise damaged(self.path, error) from error


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Attributes:
        name: Its name.
        kind: Type as the format names it.
        shape: Sizes.
        size: Bytes.
        blocks: Gives its content, `size` bytes in all.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int
    blocks: Callable[[], Iterable[memoryview | bytes]]

    @classmethod
    def of(
        cls,
        name: str,
        kind: str,
        shape: Sequence[int],
        blocks: Callable[[], Iterable[memoryview | bytes]],
    ) -> NewTensor:
        """A tensor of `F32`, `F16` or `BF16`. Raises KeyError for another type."""
        return cls(name, kind, tuple(shape), math.prod(shape) * _SIZES[kind], blocks)

    @classmethod
    def copied(cls, name: str, stored: StoredTensor) -> NewTensor:
        """A tensor of another file, byte for byte, whatever its type."""
        raw = np.dtype(np.uint8)
        return cls(
            name,
            stored.kind,
            stored.shape,
            stored.size,
            lambda: (block.data for block in stored.blocks(raw, 0, stored.size)),
        )


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The places of all tensors in a file, and its metadata.

    Raises:
        ExportError: The file is missing or damaged.
    """
    try:
        # The library checks the header's form, and that the tensors cover the file exactly.
        with safe_open(str(path), framework="numpy"), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    metadata = header.pop("__metadata__", None) or {}
    return {
        name: StoredTensor(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }, metadata


def write_file(
    path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file, tensors in the given order.

    Args:
        path: The file; it is replaced.
        tensors: Of different names.
        metadata: Further texts in the header.

    Raises:
        ExportError: A tensor that is copied cannot be read.
        OSError: The file cannot be written.
        ValueError: A tensor's blocks are not as long as it should be.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = sum(stream.write(block) for block in tensor.blocks())
            if written != tensor.size:
                raise ValueError(f"{tensor.name} has {written} bytes, not {tensor.size}")


def damaged(path: Path, error: Exception | str) -> ExportError:
    """What is said of a file that cannot be used, with its reason."""
    reason = " ".join(str(error).split())[:200]
    return ExportError(f"{path} cannot be read ({reason}); download it again")

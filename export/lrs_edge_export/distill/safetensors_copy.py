"""Copies of safetensors files with some tensors left out or replaced, byte for byte otherwise.

The format: 8 bytes of header length (little endian), a JSON header with type, shape and place of
every tensor, then the data (https://github.com/huggingface/safetensors, "Format"). Data is copied
in blocks, so that files of any size pass through little memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lrs_edge.errors import ExportError

#: A header longer than this is refused, as the safetensors library does.
MAX_HEADER_BYTES = 100_000_000

_BLOCK = 1 << 20

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def dtype_of(path: Path, name: str) -> torch.dtype | None:
    """Type of a floating-point tensor as it is stored; None if it is not there or of another."""
    entry = _read_header(path)[0].get(name)
    names = {shown: dtype for dtype, shown in _TYPES.items()}
    return None if entry is None else names.get(entry["dtype"])


def copy_with(
    source: Path | None,
    target: Path,
    keep: Callable[[str], bool],
    new: Mapping[str, Tensor],
) -> None:
    """Write a safetensors file.

    Args:
        source: Tensors are copied from here; None for none.
        target: The new file.
        keep: Which of them.
        new: Further tensors: float32, float16 or bfloat16.

    Raises:
        ExportError: The source is no safetensors file.
        OSError: The target cannot be written.
    """
    header, begin = ({}, 0) if source is None else _read_header(source)
    metadata = header.pop("__metadata__", {"format": "pt"})
    kept = {name: entry for name, entry in header.items() if keep(name) and name not in new}
    written: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, entry in kept.items():
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        written[name] = entry | {"data_offsets": [place, place + size]}
        place += size
    for name, tensor in new.items():
        size = tensor.numel() * tensor.element_size()
        written[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    encoded = json.dumps(written, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        if source is not None:
            with source.open("rb") as original:
                for entry in kept.values():
                    first, stop = entry["data_offsets"]
                    original.seek(begin + first)
                    _copy_bytes(original, stream, stop - first, source)
        for tensor in new.values():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            stream.write(raw.numpy().tobytes())


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int, path: Path) -> None:
    while count > 0:
        block = source.read(min(count, _BLOCK))
        if not block:
            raise ExportError(f"{path} ends too early; download it again")
        target.write(block)
        count -= len(block)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins. Raises ExportError when damaged."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ExportError(f"{path} is no safetensors file; download it again")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ExportError(f"{path} is no safetensors file; download it again")
    return header, 8 + length

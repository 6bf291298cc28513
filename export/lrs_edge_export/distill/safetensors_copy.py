"""Copies of safetensors files with some tensors left out or replaced, byte for byte otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lrs_edge_export.checkpoints.safetensors_file import NewTensor, read_header, write_file

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def dtype_of(path: Path, name: str) -> torch.dtype | None:
    """Type of a floating-point tensor as it is stored; None if it is not there or of another.

    Raises:
        ExportError: The file is not a safetensors file.
    """
    stored = read_header(path)[0].get(name)
    names = {shown: dtype for dtype, shown in _TYPES.items()}
    return None if stored is None else names.get(stored.kind)


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
        ExportError: The source is not a safetensors file.
        OSError: The target cannot be written.
    """
    stored, metadata = ({}, {}) if source is None else read_header(source)
    tensors = [
        NewTensor.copied(name, tensor)
        for name, tensor in stored.items()
        if keep(name) and name not in new
    ]
    tensors += [_written(name, tensor) for name, tensor in new.items()]
    # transformers refuses a file that does not say so.
    write_file(target, tensors, metadata or {"format": "pt"})


def _written(name: str, tensor: Tensor) -> NewTensor:
    def blocks() -> list[memoryview]:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [raw.numpy().data]

    return NewTensor.of(name, _TYPES[tensor.dtype], tensor.shape, blocks)

"""Weights of a checkpoint, read one tensor at a time and never all at once.

Knows file formats, not models. Every reader hands out float32 numpy arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lrs_edge.errors import ExportError

Array = NDArray[np.float32]

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

#: An index longer than this is refused unread; that of a 70B model has a tenth of it.
MAX_INDEX_BYTES = 16 << 20


class TensorSource(Protocol):
    """Named tensors; nothing is read before it is asked for."""

    def names(self) -> Iterable[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        ...

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there, ExportError when damaged."""
        ...


class Scoped:
    """The tensors under one prefix, by the rest of their names."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source = source
        self.prefix = prefix

    def names(self) -> list[str]:
        """Names without the prefix."""
        start = len(self.prefix)
        return [name[start:] for name in self._source.names() if name.startswith(self.prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._source.shape(self.prefix + name)

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there."""
        return self._source.read(self.prefix + name)

    def has(self, name: str) -> bool:
        """True where the tensor is there."""
        try:
            self.shape(name)
        except KeyError:
            return False
        return True

    def require(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Check that tensors are there and have the shapes that the config asks for.

        Args:
            shapes: Expected shape by name.
            what: Names the part of the model in the message.

        Raises:
            ExportError: Tensors are missing, or have other shapes.
        """
        missing = [name for name in shapes if not self.has(name)]
        if missing:
            raise ExportError(
                f"{what}: {_listed(self.prefix + name for name in missing)} missing from the "
                "checkpoint; download it again, or correct config.json"
            )
        for name, wanted in shapes.items():
            found = self.shape(name)
            if found != wanted:
                raise ExportError(
                    f"{what}: {self.prefix}{name} has shape {list(found)}, config.json asks for "
                    f"{list(wanted)}; weights and config do not belong together"
                )


class SafetensorsSource:
    """Tensors of safetensors files, memory-mapped.

    Args:
        files: File of each tensor by name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._open: dict[Path, Any] = {}

    def names(self) -> list[str]:
        """All names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        handle, path = self._handle(name)
        try:
            return tuple(handle.get_slice(name).get_shape())
        except SafetensorError as error:
            raise _damaged(path, error) from error

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there, ExportError when damaged."""
        handle, path = self._handle(name)
        try:
            return _float32(handle.get_tensor(name), name)
        except SafetensorError as error:
            raise _damaged(path, error) from error

    def _handle(self, name: str) -> tuple[Any, Path]:
        path = self._files[name]
        if path not in self._open:
            # The torch reader, because numpy knows no bfloat16.
            self._open[path] = open_safetensors(path)
        return self._open[path], path


class TorchSource:
    """Tensors of `pytorch_model*.bin` files, read without unpickling code.

    Raises:
        ExportError: A file is not a plain dictionary of tensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            # torch.load raises whatever the damaged or hostile file provokes.
            except Exception as error:
                raise _damaged(path, error) from error
            if not isinstance(state, dict):
                raise ExportError(f"{path} holds no dictionary of tensors; use safetensors files")
            self._tensors |= {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}

    def names(self) -> list[str]:
        """All names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there."""
        return _float32(self._tensors[name], name)


def open_tensors(folder: Path) -> TensorSource:
    """The weights of a checkpoint folder: safetensors if there are any, else `.bin` files.

    Raises:
        ExportError: No weights, or an index or a file that cannot be used.
    """
    for index in (folder / name for name in INDEX_NAMES):
        if index.is_file():
            shards = _read_index(index)
            if index.name.startswith("model."):
                return SafetensorsSource(shards)
            return TorchSource(sorted(set(shards.values())))
    single = folder / "model.safetensors"
    if single.is_file():
        return SafetensorsSource(dict.fromkeys(open_safetensors(single).keys(), single))
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file():
        return TorchSource([pickled])
    raise ExportError(
        f"{folder} holds no weights (model.safetensors, model.safetensors.index.json or "
        "pytorch_model.bin); name the folder that holds them"
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_tensors` reads, indexes included, sorted by name."""
    for index in (folder / name for name in INDEX_NAMES):
        if index.is_file():
            return sorted({index, *_read_index(index).values()})
    single = (folder / "model.safetensors", folder / "pytorch_model.bin")
    return [path for path in single if path.is_file()][:1]


def open_safetensors(path: Path) -> Any:
    """A lazily read safetensors file.

    Raises:
        ExportError: The file is missing or damaged.
    """
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _read_index(index: Path) -> dict[str, Path]:
    """File of each tensor; the names of files come from the checkpoint and are not trusted."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ExportError(f"{index} is larger than {MAX_INDEX_BYTES} bytes; not a weight index")
    try:
        weights = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{index} is not a weight index; download it again") from error
    found: dict[str, Path] = {}
    for name, file in files.items():
        if not _is_plain_name(file):
            raise ExportError(
                f"{index} names {file!r}, which is not a file beside it; do not use this checkpoint"
            )
        found[name] = index.parent / file
    for path in sorted(set(found.values())):
        if not path.is_file():
            raise ExportError(f"{path} is missing; {index.name} lists it, download it again")
    return found


def _is_plain_name(name: str) -> bool:
    """True for a file name without any directory part, in both path syntaxes."""
    return (
        name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def _float32(tensor: torch.Tensor, name: str) -> Array:
    if not tensor.is_floating_point():
        raise ExportError(
            f"{name} is {tensor.dtype}; export from the checkpoint before it was quantized"
        )
    array: Array = tensor.detach().to(torch.float32).numpy()
    if not math.isfinite(float(array.sum(dtype=np.float64))):
        raise ExportError(f"{name} holds values that are not finite; the checkpoint is damaged")
    return array


def _damaged(path: Path, error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[:200]
    return ExportError(f"{path} cannot be read ({reason}); download it again")


def _listed(names: Iterable[str], most: int = 4) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more

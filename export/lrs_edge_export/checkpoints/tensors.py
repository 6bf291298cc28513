"""Weights of a checkpoint, read one tensor or some of its rows at a time, never all at once.

Knows file formats, not models. Every reader hands out float32 numpy arrays, and keeps nothing:
files are read in blocks rather than mapped, because mapped pages count as memory of the process
for as long as the mapping lives.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.safetensors_file import StoredTensor, damaged, read_header

# Only `.bin` files need it: what a checkpoint is can be said before it is imported.
if TYPE_CHECKING:
    import torch

Array = NDArray[np.float32]

#: Of tensors by name.
Shapes = dict[str, tuple[int, ...]]

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

#: An index longer than this is refused unread; that of a 70B model has a tenth of it.
MAX_INDEX_BYTES = 16 << 20

#: Bytes of a `.bin` file that are read at once.
_BLOCK = 8 << 20

#: How safetensors files store floating-point values; bfloat16, which numpy lacks, as its bits.
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


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

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor, along its first axis, as float32; nothing else is read.

        Args:
            name: Of the tensor, which has an axis.
            start: First row.
            stop: Row after the last; 0 <= start <= stop <= rows.

        Raises:
            KeyError: The tensor is not there.
            ExportError: It is damaged.
            ValueError: It does not have these rows.
        """
        ...

    def stored(self, name: str) -> str:
        """The name that a tensor, or the one that it is cut from, has in the checkpoint's files."""
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

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`."""
        return self._source.rows(self.prefix + name, start, stop)

    def stored(self, name: str) -> str:
        """The name that a tensor has in the checkpoint's files; see `TensorSource.stored`."""
        return self._source.stored(self.prefix + name)

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
        if missing and len(missing) == len(shapes) > 1:
            raise self._in_another_layout(missing, what)
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

    def _in_another_layout(self, missing: list[str], what: str) -> ExportError:
        """Nothing is there by these names: downloading the file again would not help."""
        wanted = (
            f"{what}: the checkpoint has no {self.prefix}{missing[0]}, nor any that belong to it"
        )
        found = list(self._source.names())
        if not found:
            return ExportError(f"{wanted}: it holds no tensors at all; download it again")
        return ExportError(
            f"{wanted}; its names are such as {', '.join(sorted(found)[:2])}: it was saved in a "
            "layout that is not known, or is another model"
        )

    def refuse_others(self, prefix: str, known: Collection[str], what: str) -> None:
        """Refuse tensors that the graph would leave out, such as biases that no config names.

        Args:
            prefix: Expression for what stands before the names.
            known: Names that are read.
            what: Names the part of the model in the message.

        Raises:
            ExportError: There are others. Tables that are computed anew are none.
        """
        for name in self.names():
            found = re.match(prefix, name)
            rest = name[found.end() :] if found else ""
            if found and rest not in known and not rest.endswith("rotary_emb.inv_freq"):
                raise ExportError(
                    f"{what}: the checkpoint has {self.prefix}{name}, which the exported model "
                    "would leave out; its architecture, or a field of config.json, is not supported"
                )


class SafetensorsSource:
    """Tensors of safetensors files. A file is open only while it is read.

    Args:
        files: File of each tensor by name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._listed: dict[Path, dict[str, StoredTensor]] = {}

    def names(self) -> list[str]:
        """All names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._find(name).shape

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there, ExportError when damaged."""
        stored = self._find(name)
        return _read_values(stored, name, 0, math.prod(stored.shape)).reshape(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`."""
        stored = self._find(name)
        shape = rows_shape(name, stored.shape, start, stop)
        width = math.prod(shape[1:])
        return _read_values(stored, name, start * width, stop * width).reshape(shape)

    def stored(self, name: str) -> str:
        """The name itself."""
        return name

    def _find(self, name: str) -> StoredTensor:
        path = self._files[name]
        if path not in self._listed:
            self._listed[path] = read_header(path)[0]
        try:
            return self._listed[path][name]
        except KeyError:
            raise damaged(path, f"it does not hold {name}") from None


def _read_values(stored: StoredTensor, name: str, start: int, stop: int) -> Array:
    """Values start .. stop - 1 of a tensor, flat, read and widened block by block."""
    if stored.kind not in _STORED:
        raise _not_float(name, stored.kind)
    values = np.empty(stop - start, np.float32)
    place = 0
    for block in stored.blocks(np.dtype(_STORED[stored.kind]), start, stop):
        part = values[place : place + len(block)]
        _widen(block, stored.kind, part)
        _check_finite(part, name)
        place += len(block)
    return values


def _widen(block: NDArray[Any], kind: str, target: Array) -> None:
    """Write stored values as float32."""
    if kind == "BF16":
        # The upper half of a float32.
        np.left_shift(block, 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore"):  # Infinities are found right after.
            target[:] = block


class TorchSource:
    """Tensors of `pytorch_model*.bin` files, read without unpickling code.

    A file is mapped anew for every read: PyTorch offers no other way to let go of its pages. At the
    worst, the pages of one tensor are in memory besides its float32 values. Files in PyTorch's
    format from before 1.6 cannot be mapped, and are refused.

    Raises:
        ExportError: A file is not a plain dictionary of tensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path in paths:
            for name, tensor in _load_torch(path).items():
                self._places[name] = path, tuple(tensor.shape)

    def names(self) -> list[str]:
        """All names."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._places[name][1]

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there."""
        path, shape = self._places[name]
        return _copy_torch(_load_torch(path)[name].reshape(-1), name).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`."""
        path, whole = self._places[name]
        shape = rows_shape(name, whole, start, stop)
        return _copy_torch(_load_torch(path)[name][start:stop].reshape(-1), name).reshape(shape)

    def stored(self, name: str) -> str:
        """The name itself."""
        return name


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped. Raises ExportError."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch.load raises whatever the damaged or hostile file provokes.
    except Exception as error:
        raise damaged(path, error) from error
    if not isinstance(state, dict):
        raise ExportError(f"{path} holds no dictionary of tensors; use safetensors files")
    return {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}


def _copy_torch(tensor: torch.Tensor, name: str) -> Array:
    """A flat tensor's values, in memory of their own."""
    import torch

    if not tensor.is_floating_point():
        raise _not_float(name, str(tensor.dtype))
    values = np.empty(len(tensor), np.float32)
    step = _BLOCK // tensor.element_size()
    for place in range(0, len(values), step):
        part = values[place : place + step]
        part[:] = tensor[place : place + step].detach().to(torch.float32).numpy()
        _check_finite(part, name)
    return values


def rows_shape(name: str, shape: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """Shape of some rows. Raises ValueError where the tensor has no such rows."""
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"{name} of shape {list(shape)} has no rows {start}..{stop}")
    return (stop - start, *shape[1:])


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
        return SafetensorsSource(dict.fromkeys(read_header(single)[0], single))
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


def _check_finite(values: Array, name: str) -> None:
    if not np.isfinite(values).all():
        raise ExportError(f"{name} holds values that are not finite; the checkpoint is damaged")


def _not_float(name: str, kind: str) -> ExportError:
    return ExportError(f"{name} is {kind}; export from the checkpoint before it was quantized")


def _listed(names: Iterable[str], most: int = 4) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more

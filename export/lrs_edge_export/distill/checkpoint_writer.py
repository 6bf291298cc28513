"""A new checkpoint with a trained region focus module; the one it came from is only read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.target import check_target, replacing_folder
from lrs_edge_export.checkpoints.checkpoint import Checkpoint
from lrs_edge_export.checkpoints.safetensors_file import read_header
from lrs_edge_export.checkpoints.tensors import INDEX_NAMES, Scoped, weight_files
from lrs_edge_export.distill.safetensors_copy import copy_with, dtype_of
from lrs_edge_export.distill.start import start_layers
from lrs_edge_export.families.parts import PRUNER

REPORT = "distill.json"

_INDEX = "model.safetensors.index.json"

#: Larger files are hard-linked where that can be done, smaller ones copied.
_LINK_BYTES = 16 << 20

#: Weights in other forms, which would contradict the new ones.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def check_distilled(target: Path, source: Path, *, force: bool) -> None:
    """Refuse a folder that a new checkpoint should not be written to, before any work is done.

    Raises:
        ExportError: It is the source, a file, or not empty (with `force`: no checkpoint made by
            `distill`).
    """
    if target.resolve() == source.resolve():
        raise ExportError(f"{target} is the checkpoint itself; name another folder with -o")
    check_target(target, mark=REPORT, made_by="a checkpoint that `distill` made", force=force)


def write_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    llm: Scoped,
    student: Mapping[str, Tensor],
    layer_list: tuple[int, ...],
    report: Mapping[str, Any],
    *,
    whole_last_layer: bool,
) -> None:
    """Write a checkpoint whose RFM is the student; all other tensors stay byte for byte.

    Weights come in the type that the language model's have. Shards without any tensor of an RFM are
    hard-linked, or copied across file systems: to change one in place would change both.

    Args:
        checkpoint: Where everything else comes from.
        target: The new folder; replaced if it exists.
        llm: Weights of its language model, by name such as `layers.0.mlp.up_proj.weight`.
        student: float32 weights of the RFM, by name such as `layers.0.mlp.up_proj.weight`.
        layer_list: Layers of the language model that it learned from.
        report: Written to `distill.json`.
        whole_last_layer: Also write the scoring layer's output projection and MLP, which scores
            do not depend on, as the authors' loader wants them: those of the language model.

    Raises:
        ExportError: The folder cannot be written.
    """
    try:
        with replacing_folder(target) as folder:
            writer = _Writer(checkpoint, llm, folder)
            writer.copy_side_files()
            writer.write_config(layer_list)
            tensors = writer.pruner(student, layer_list, whole_last_layer=whole_last_layer)
            writer.write_weights(tensors)
            encoded = json.dumps(report, indent=1) + "\n"
            (folder / REPORT).write_text(encoded, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error})") from error


class _Writer:
    """Writes one checkpoint folder."""

    def __init__(self, checkpoint: Checkpoint, llm: Scoped, folder: Path) -> None:
        self._checkpoint = checkpoint
        self._llm = llm
        self._folder = folder
        files = [path for path in weight_files(checkpoint.path) if path.name not in INDEX_NAMES]
        if any(path.suffix != ".safetensors" for path in files):
            files = _converted(files, folder)
        self._shards = {path: list(read_header(path)[0]) for path in files}
        self._file_of = {name: path for path, names in self._shards.items() for name in names}

    def copy_side_files(self) -> None:
        """Everything that is not a weight, and the vision tower where it lies inside."""
        path = self._checkpoint.path
        weights = {file.name for file in weight_files(path)}
        for file in sorted(path.iterdir()):
            skipped = file.name.startswith(".") or file.name in {"config.json", REPORT, *weights}
            if file.is_file() and not skipped and file.suffix not in _WEIGHT_SUFFIXES:
                _link(file, self._folder / file.name)
        for inside in self._towers():
            target = self._folder / inside.relative_to(path.resolve())
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(inside.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    _link(file, target / file.name)

    def _towers(self) -> set[Path]:
        """Folders inside the checkpoint that `config.json` may mean by its vision tower."""
        name, path = self._checkpoint.config.values.get("mm_vision_tower"), self._checkpoint.path
        if not isinstance(name, str) or "\0" in name:
            return set()
        places = {(path / part).resolve() for part in (name, name.rstrip("/").rsplit("/", 1)[-1])}
        return {place for place in places if path.resolve() in place.parents and place.is_dir()}

    def write_config(self, layer_list: tuple[int, ...]) -> None:
        """`config.json` with the layers that the RFM learned from."""
        values = self._checkpoint.config.values | {"llm_layer_list": list(layer_list)}
        encoded = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (self._folder / "config.json").write_text(encoded, encoding="utf-8")

    def pruner(
        self,
        student: Mapping[str, Tensor],
        layer_list: tuple[int, ...],
        *,
        whole_last_layer: bool,
    ) -> dict[str, Tensor]:
        """The RFM's tensors by their names in the checkpoint, in the language model's types."""
        starts, found = start_layers(layer_list), {}
        for name, value in student.items():
            _, place, rest = name.split(".", 2)
            found[PRUNER + name] = self._like(f"layers.{starts[int(place)]}.{rest}", value)
        if whole_last_layer:
            before = f"layers.{starts[-1]}."
            for name in [name for name in self._llm.names() if name.startswith(before)]:
                key = f"{PRUNER}layers.{len(layer_list)}.{name[len(before) :]}"
                if key not in found:
                    found[key] = self._read(name)
        found[f"{PRUNER}norm.weight"] = self._read("norm.weight")
        return found

    def _like(self, name: str, value: Tensor) -> Tensor:
        """A tensor in the type that one of the language model's has."""
        stored = self._llm.stored(name)
        return value.detach().cpu().to(dtype_of(self._file_of[stored], stored))

    def _read(self, name: str) -> Tensor:
        stored = self._llm.stored(name)
        with safe_open(str(self._file_of[stored]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def write_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """All shards; those that hold an RFM are written again, with the new one in the first."""
        replaced = [
            p for p, names in self._shards.items() if any(n.startswith(PRUNER) for n in names)
        ]
        single = len(self._shards) == 1 and bool(replaced)
        count = len(self._shards) + (0 if replaced else 1)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards.items(), 1):
            name = (
                "model.safetensors" if single else f"model-{number:05d}-of-{count:05d}.safetensors"
            )
            new = tensors if replaced and path == replaced[0] else {}
            if path in replaced:
                copy_with(path, self._folder / name, _is_kept, new)
            elif path.parent == self._folder:
                path.rename(self._folder / name)
            else:
                _link(path, self._folder / name)
            weight_map |= dict.fromkeys([*filter(_is_kept, names), *new], name)
        if not replaced:
            name = f"model-{count:05d}-of-{count:05d}.safetensors"
            copy_with(None, self._folder / name, _is_kept, tensors)
            weight_map |= dict.fromkeys(tensors, name)
        for path in replaced:
            if path.parent == self._folder:
                path.unlink()
        if not single:
            self._write_index(weight_map)

    def _write_index(self, weight_map: dict[str, str]) -> None:
        size = sum((self._folder / name).stat().st_size for name in set(weight_map.values()))
        values = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _is_kept(name: str) -> bool:
    return not name.startswith(PRUNER)


def _converted(files: list[Path], folder: Path) -> list[Path]:
    """Pickled weights as safetensors, file by file, in the folder under passing names."""
    from safetensors.torch import save_file

    found = []
    for path in files:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # torch.load raises whatever the damaged or hostile file provokes.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ExportError(f"{path} cannot be read ({reason}); download it again") from error
        # A copy each: safetensors refuses tensors that share memory.
        tensors = {k: v.clone().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
        target = folder / f"{path.stem}.converted.safetensors"
        save_file(tensors, target, metadata={"format": "pt"})
        found.append(target)
    return found


def _link(source: Path, target: Path) -> None:
    """A hard link to a large file, a copy of a small one or where links cannot be made."""
    real = source.resolve()
    if real.stat().st_size >= _LINK_BYTES:
        try:
            os.link(real, target)
        except OSError:
            shutil.copyfile(real, target)
        return
    shutil.copyfile(real, target)

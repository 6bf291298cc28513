"""A checkpoint seen as if its region focus module were a copy of layers of its language model.

That is where a student starts (paper, figure 2): student layers 0 .. N are the layer before the
first listed one, and the listed ones. Nothing is written; names lead to other tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from lrs_edge.errors import ExportError, UsageError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.tensors import Array, Scoped, TensorSource, open_tensors

PRUNER = "model.mm_projector.token_pruner."
LLM = "model."


def start_layers(layer_list: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of the language model that student layers 0 .. N start from, N = len(layer_list).

    As the authors' `_load_pretrained_weights`: the layer before the first, then the list.
    """
    return (layer_list[0] - 1, *layer_list)


def check_layer_list(layer_list: tuple[int, ...], layers: int) -> None:
    """Refuse lists that no student can start from.

    Args:
        layer_list: Layers of the language model to learn from, counted from 0.
        layers: Layers that the language model has.

    Raises:
        UsageError: It is empty, not ascending, or names layers that are not there.
    """
    ascending = all(a < b for a, b in itertools.pairwise(layer_list))
    if not layer_list or not ascending or layer_list[0] < 1 or layer_list[-1] >= layers:
        raise UsageError(
            f"--layer-list {','.join(map(str, layer_list))}: it must be ascending layers of "
            f"1..{layers - 1} (the language model has {layers}, counted from 0; the student's "
            "first layer starts from the one before the list)"
        )


def own_layers(checkpoint: Checkpoint) -> int | None:
    """Length N of the checkpoint's own `llm_layer_list`; None without RFM. Raises ExportError."""
    names = open_tensors(checkpoint.path).names()
    if not any(name.startswith(PRUNER) for name in names):
        return None
    return len(checkpoint.config.integers("llm_layer_list")) or None


@dataclass(frozen=True)
class StartCheckpoint(Checkpoint):
    """A checkpoint whose RFM tensors are those of the language model.

    Attributes:
        layer_list: Layers to learn from.
    """

    layer_list: tuple[int, ...] = ()

    def tensors(self) -> Scoped:
        """All weights, the RFM's being the language model's. Raises ExportError."""
        return Scoped(_Aliased(open_tensors(self.path), start_layers(self.layer_list)), "")


def with_start_layers(checkpoint: Checkpoint, layer_list: tuple[int, ...]) -> StartCheckpoint:
    """The checkpoint as if its RFM were made of the language model's layers."""
    values = checkpoint.config.values | {"llm_layer_list": list(layer_list)}
    config = Settings(values, checkpoint.config.path)
    return StartCheckpoint(
        checkpoint.path, checkpoint.name, config, checkpoint.from_hub, layer_list
    )


class _Aliased:
    """Tensors of a checkpoint; names of the RFM lead to layers of the language model."""

    def __init__(self, source: TensorSource, starts: tuple[int, ...]) -> None:
        self._source = source
        self._names = {name: name for name in source.names() if not name.startswith(PRUNER)}
        for place, layer in enumerate(starts):
            before = f"{LLM}layers.{layer}."
            rest = [name[len(before) :] for name in self._names if name.startswith(before)]
            if not rest:
                raise ExportError(
                    f"the checkpoint has no {before}* tensors; it cannot teach layer {layer}"
                )
            self._names |= {f"{PRUNER}layers.{place}.{name}": before + name for name in rest}
        if f"{LLM}norm.weight" in self._names:
            self._names[f"{PRUNER}norm.weight"] = f"{LLM}norm.weight"

    def names(self) -> Iterable[str]:
        """All names."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._source.shape(self._names[name])

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there."""
        return self._source.read(self._names[name])

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`."""
        return self._source.rows(self._names[name], start, stop)

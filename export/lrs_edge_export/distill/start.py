"""A model seen as if its region focus module were a copy of layers of its language model.

That is where a student starts (paper, figure 2): student layers 0 .. N are the layer before the
first listed one, and the listed ones. Nothing is written; names lead to other tensors.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from lrs_edge.errors import UsageError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint
from lrs_edge_export.checkpoints.model import DecoderStage, Model
from lrs_edge_export.checkpoints.renamed import Renamed
from lrs_edge_export.checkpoints.tensors import Scoped, open_tensors
from lrs_edge_export.families.parts import PRUNER


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


def with_start_layers(model: Model, layer_list: tuple[int, ...]) -> Model:
    """The model with layers of its language model as RFM, which are to be trained."""
    names = {"norm.weight": "norm.weight"}
    for place, layer in enumerate(start_layers(layer_list)):
        before, new = f"layers.{layer}.", f"layers.{place}."
        names |= {
            new + name.removeprefix(before): name
            for name in model.llm.tensors.names()
            if name.startswith(before)
        }
    config = replace(model.llm.config, layers=len(layer_list))
    copied = Scoped(Renamed(model.llm.tensors, names), "")
    return replace(model, rfm=DecoderStage(config, copied, scoring=True))

"""Which layers of the language model know where the evidence is: measured, not guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lrs_edge.errors import UsageError
from lrs_edge.search.rfm import LEAST_SCORE
from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.distill.collect import Collector, OnProgress, in_batches
from lrs_edge_export.distill.evidence import Localisation, localisation
from lrs_edge_export.distill.sequences import GroupInput
from lrs_edge_export.distill.teacher import attention_by_layer

#: Questions on which layers are compared, unless more are asked for.
LOCALISE_QUESTIONS = 200


@dataclass(frozen=True)
class Row:
    """Means over questions.

    Attributes:
        questions: How many had their evidence in view.
        share: Evidence tokens among all tokens of tiles.
        mass: Score on them.
        recall: Of them in the top quarter.
        best: Questions whose best token is one of them.
    """

    questions: int
    share: float
    mass: float
    recall: float
    best: float

    @classmethod
    def of(cls, found: Sequence[Localisation]) -> Row:
        """The means; zeros of nothing."""
        if not found:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        columns = ("share", "mass", "recall", "best")
        means = {name: float(np.mean([getattr(x, name) for x in found])) for name in columns}
        return cls(len(found), **means)


def measure_layers(
    collector: Collector,
    images: Mapping[str, Sequence[int]],
    teacher: DecoderStage,
    device: torch.device,
    progress: OnProgress,
) -> tuple[list[Row], list[Row]]:
    """Localisation of every layer, on all levels of the images.

    On finer levels the tiles of the evidence are looked at among others drawn at random.

    Args:
        collector: Makes groups.
        images: Questions with boxes by image.
        teacher: The language model.
        device: Where its layers run.
        progress: Told what is done.

    Returns:
        One row for each layer; and the same by scores relative to the generic instruction, nothing
        where the collector's assembler knows none.

    Raises:
        ImageError: An image cannot be read.
        ExportError: Weights are damaged.
    """
    layers = range(teacher.config.layers)
    found: list[list[Localisation]] = [[] for _ in layers]
    relative: list[list[Localisation]] = [[] for _ in layers]
    groups = []
    for image, numbers in images.items():
        for level in range(collector.levels(image)):
            groups += collector.groups(image, numbers, level)
    progress(f"localisation: {len(groups)} sequences, {len(layers)} layers")
    done = 0
    for batch in in_batches(collector.assembler, groups):
        inputs = [made.packed for made in batch]
        for layer, scores in attention_by_layer(teacher, inputs, layers, device):
            for made, rows in zip(batch, scores, strict=True):
                asked = rows.numpy()
                if collector.assembler.is_relative:
                    asked, generic = asked[:-1], np.maximum(asked[-1], LEAST_SCORE)
                    quotients = np.maximum(asked, LEAST_SCORE) / generic
                    relative[layer] += _judged(quotients, made)
                found[layer] += _judged(asked, made)
        done += len(batch)
        progress(f"localisation: {done} of {len(groups)} sequences")
    quotients_of = relative if collector.assembler.is_relative else []
    return [Row.of(rows) for rows in found], [Row.of(rows) for rows in quotients_of]


def _judged(scores: NDArray[np.float32], made: GroupInput) -> list[Localisation]:
    """Localisation of scores float32 [Q, n], of the questions whose evidence is in view."""
    found = [
        localisation(row, evidence, made.shown)
        for row, evidence in zip(scores, made.evidence, strict=True)
    ]
    return [judged for judged in found if judged is not None]


def choose_layers(rows: Sequence[Row], count: int) -> tuple[int, ...]:
    """The layer that localises best, and those that lead to it.

    Args:
        rows: Localisation of every layer.
        count: Layers N to learn from.

    Returns:
        N layers in order; the last is the one of highest recall of those that N layers lead to (of
        equals the one of more mass).

    Raises:
        UsageError: There are not so many layers, or no evidence was in view.
    """
    if not 1 <= count < len(rows):
        raise UsageError(
            f"--layers is {count}; the language model has {len(rows)} layers, so it must be "
            f"1..{len(rows) - 1}"
        )
    if not any(row.questions for row in rows):
        raise UsageError(
            "no question's evidence (hbox) lies in view on any level; check the boxes, or name "
            "the layers with --layer-list"
        )
    best = max(range(count, len(rows)), key=lambda layer: (rows[layer].recall, rows[layer].mass))
    return tuple(range(best - count + 1, best + 1))


def layer_table(rows: Sequence[Row], layer_list: Iterable[int]) -> str:
    """The measurements as text; layers of the list are marked."""
    listed = set(layer_list)
    lines = ["  layer  questions  evidence share  mass   recall in top 25 %  best token"]
    for layer, row in enumerate(rows):
        mark = "*" if layer in listed else " "
        lines.append(
            f"{mark} {layer:<5}  {row.questions:<9}  {row.share:<14.3f}  {row.mass:<5.3f}  "
            f"{row.recall:<18.3f}  {row.best:.3f}"
        )
    return "\n".join(lines)

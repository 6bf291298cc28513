"""Attention distillation of the region focus module: `lrs-edge distill`.

The way of the data: `questions` are read, `features` gives the vision tokens of their images'
tiles, `sequences` puts both together as inference would, `localise` measures which layers of the
language model know where to look, `collect` lets the `teacher` say it for every sequence, `train`
makes the `student` say the same, `measure` compares them, and `checkpoint_writer` writes the
result. `layers` is the decoder that both run on.
"""

from __future__ import annotations

from lrs_edge_export.distill.collect import Sampling
from lrs_edge_export.distill.loss import LossWeights
from lrs_edge_export.distill.options import DistillOptions, DistillResult
from lrs_edge_export.distill.pipeline import distill
from lrs_edge_export.distill.train import TrainOptions

__all__ = [
    "DistillOptions",
    "DistillResult",
    "LossWeights",
    "Sampling",
    "TrainOptions",
    "distill",
]

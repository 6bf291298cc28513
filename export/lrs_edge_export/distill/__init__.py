"""Attention distillation of the region focus module: `lrs-edge distill`.

The way of the data: `questions` are read, `features` gives the vision tokens of their images'
tiles, `sequences` puts both together as inference would, `localise` measures which layers of the
language model know where to look (`survey` does no more than that), `collect` lets the `teacher`
say it for every sequence, `train` makes the `student` say the same, `measure` compares them, and
`checkpoint_writer` writes the result. `packing` is the decoder that both run on.
"""

from __future__ import annotations

from lrs_edge_export.distill.collect import Sampling
from lrs_edge_export.distill.loss import LossWeights
from lrs_edge_export.distill.options import DistillOptions, DistillResult
from lrs_edge_export.distill.pipeline import distill
from lrs_edge_export.distill.survey import Survey, survey_layers, survey_table
from lrs_edge_export.distill.train import TrainOptions
from lrs_edge_export.families.scoring import GENERIC

__all__ = [
    "GENERIC",
    "DistillOptions",
    "DistillResult",
    "LossWeights",
    "Sampling",
    "Survey",
    "TrainOptions",
    "distill",
    "survey_layers",
    "survey_table",
]

"""Choosing between ways to be int8: by what they make of the outputs, never by a clock.

So the same checkpoint and calibration data give the same bundle on every machine. Which way is
faster is known by operations: products in int8 come before products in floats.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrs_edge.engines.devices import StageName
from lrs_edge_export.bundle.stages import StageWriter
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.vision import EfficientNetTower
from lrs_edge_export.quantization import CalibrationData
from lrs_edge_export.quantization.precision import Plan, Precision, Target
from lrs_edge_export.quantization.probe import Probe, least_cosine


@dataclass(frozen=True)
class Candidate:
    """A precision of a stage as measured: least cosine to float over tiles or prompts."""

    stage: StageName
    precision: Precision
    cosine: float


def int8_precisions(
    stage: StageName, model: Model, target: Target = "cpu", *, large: bool = False
) -> tuple[Precision, ...]:
    """Ways to be int8 for a target, the one with the fewest operations in floats first.

    On a CPU matrix products have one: static int8 was as fast for them, and less faithful
    (`docs/benchmarks.md`). Convolutions have no dynamic one. ONNX Runtime computes in no integers
    on CUDA, and TensorRT in static ones.

    Args:
        stage: Which.
        model: The checkpoint.
        target: Engine that the bundle is for.
        large: The stage is too large to measure what a way makes of its outputs, so that only
            one that needs no measuring comes into question for TensorRT.
    """
    if target == "cuda" or (target == "tensorrt" and (stage != "vision" or large)):
        return ("int8-weight",)
    if target == "tensorrt":
        return ("int8-static", "int8-weight")
    if stage == "vision" and isinstance(model.vision.tower, EfficientNetTower):
        return ("int8-static", "int8-weight")
    return ("int8-dynamic",)


def measure(
    stage: StageName, plans: Sequence[Plan], model: Model, data: CalibrationData, folder: Path
) -> list[Candidate]:
    """Compare a stage under several plans with itself in float32.

    Args:
        stage: Which.
        plans: Of different precisions.
        model: The checkpoint.
        data: Calibration data.
        folder: Where graphs lie for a moment.
    """
    probe = Probe(stage, data)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paths = {}
        for plan in (Plan(), *plans):
            target = Path(place) / plan.precision
            target.mkdir()
            with StageWriter(model, target, tiles=lambda: data.tiles) as writer:
                writer.write(stage, plan)
            paths[plan.precision] = target / probe.graph
        wanted = probe.outputs(paths["fp32"], "fp32")
        return [
            Candidate(
                stage,
                plan.precision,
                least_cosine(probe.outputs(paths[plan.precision], plan.precision), wanted),
            )
            for plan in plans
        ]


def ranked(candidates: list[Candidate], limit: float) -> list[Candidate]:
    """Candidates, the chosen one first.

    The first of those above the limit; where none is, the most faithful.
    """
    good = [one for one in candidates if one.cosine >= limit]
    best = good[0] if good else max(candidates, key=lambda one: one.cosine)
    return [best, *(one for one in candidates if one is not best)]

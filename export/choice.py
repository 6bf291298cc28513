"""Choosing between ways to compute in int8 by measuring both on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrs_edge.export.precision import Plan, Precision
from lrs_edge.export.probe import Probe, least_cosine
from lrs_edge.export.quantization import CalibrationData
from lrs_edge.export.stage_writer import Stage, StageWriter
from lrs_edge.export.stages import ClipTower, Model

#: Of candidates that are nearly as fast, within this factor, the more faithful is taken.
_NEARLY = 1.1

#: Rounds of timing; each takes a median, and the best round counts.
_ROUNDS = 3


@dataclass(frozen=True)
class Candidate:
    """A precision of a stage as measured: seconds of a tile or prompt, least cosine to float."""

    stage: Stage
    precision: Precision
    seconds: float
    cosine: float


def int8_precisions(stage: Stage, model: Model) -> tuple[Precision, ...]:
    """Ways to be int8. Convolutions have no dynamic one; int8 weights are what is left for them."""
    if stage == "vision" and not isinstance(model.vision.tower, ClipTower):
        return ("int8-static", "int8-weight")
    return ("int8-dynamic", "int8-static")


def measure(
    stage: Stage, plans: Sequence[Plan], model: Model, data: CalibrationData, folder: Path
) -> list[Candidate]:
    """Time a stage under several plans, and compare it with itself in float32.

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
        # In turns, so that what else the machine does meets all of them.
        seconds = [
            {plan.precision: probe.seconds(paths[plan.precision], plan.precision) for plan in plans}
            for _ in range(_ROUNDS)
        ]
        return [
            Candidate(
                stage,
                plan.precision,
                min(one[plan.precision] for one in seconds),
                least_cosine(probe.outputs(paths[plan.precision], plan.precision), wanted),
            )
            for plan in plans
        ]


def ranked(candidates: list[Candidate], limit: float) -> list[Candidate]:
    """Candidates, the best first.

    The fastest of those above the limit (or of all where none is), and of nearly equally fast ones
    the most faithful.
    """
    good = [one for one in candidates if one.cosine >= limit] or candidates
    fastest = min(one.seconds for one in good)
    best = max(
        (one for one in good if one.seconds <= fastest * _NEARLY), key=lambda one: one.cosine
    )
    return [best, *(one for one in candidates if one is not best)]

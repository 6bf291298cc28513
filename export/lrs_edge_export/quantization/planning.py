"""What a request for precisions becomes: measured choices, and sensitive weights kept higher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec

from lrs_edge.bundle.parity import Choice, ParityReport
from lrs_edge.engines.devices import STAGE_NAMES, StageName
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.stages import STATIC_TILES, Plans, calibrated, check_plan
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.parity.limits import LIMITS
from lrs_edge_export.quantization import CalibrationData, KeptStates, Results, load_calibration
from lrs_edge_export.quantization.calibration import read_data, tiles_along_side, written_data
from lrs_edge_export.quantization.choice import Candidate, int8_precisions, measure, ranked
from lrs_edge_export.quantization.effort import (
    IMAGES,
    Effort,
    matrices,
    measured_speed,
    tokens_of,
)
from lrs_edge_export.quantization.precision import Plan, Precision
from lrs_edge_export.quantization.sensitivity import LayerError, kept_higher, measure_sensitivity
from lrs_edge_export.quantization.static_choice import best_variant, static_variants
from lrs_edge_export.quantization.work_folder import WorkFolder

#: Name of the calibration data among kept results.
_DATA = "calibration"

#: Weights of a stage above which neither a choice nor sensitivity is measured: both need the whole
#: stage in memory in float32, several times over, and exports must be possible on small machines.
MOST_WEIGHTS = 1 << 27

#: Percentage of a stage's weights kept higher where nothing else is asked for, and the precisions
#: for which that is worth the time it takes to find them. `int8-dynamic` is none of them: since the
#: inputs of down projections have a scale for each place, keeping layers higher gains nothing
#: (`docs/quantization.md`).
KEPT_HIGHER = 15.0
_KEEPING: tuple[Precision, ...] = ("int8-static", "int4-weight")


@dataclass(frozen=True)
class Planned:
    """Plans, and what was measured to make them.

    Attributes:
        plans: Of the stages.
        choices: Measured ways to be int8, by stage, the chosen one first.
        errors: Sensitivity of weights, by stage, the most sensitive first.
    """

    plans: Plans
    choices: dict[StageName, list[Candidate]]
    errors: dict[StageName, list[LayerError]]

    def added_to(self, report: ParityReport) -> ParityReport:
        """A report that says what was measured here, too."""
        kept = {stage: tuple(sorted(self.plans.of(stage).higher)) for stage in STAGE_NAMES}
        choices = [
            Choice(stage, one.precision, round(one.cosine, 6))
            for stage, candidates in self.choices.items()
            for one in candidates
        ]
        return msgspec.structs.replace(
            report,
            kept_higher={stage: linears for stage, linears in kept.items() if linears},
            choices=tuple(choices),
        )


class Planner:
    """Makes plans for the stages of a checkpoint.

    Args:
        model: The checkpoint.
        options: What was asked for.
        folder: Where graphs lie for a moment.
        progress: Called with one line per step.
        work: Where results are kept for the case that this is killed; None keeps none.
    """

    def __init__(
        self,
        model: Model,
        options: ExportOptions,
        folder: Path,
        progress: Callable[[str], None],
        work: WorkFolder | None = None,
    ) -> None:
        self._work = work
        self._model = model
        self._options = options
        self._folder = folder
        self._progress = progress

    @cached_property
    def data(self) -> CalibrationData:
        """Calibration data, loaded when first needed."""
        kept = None if self._work is None else self._work.get(_DATA)
        if kept is not None:
            return read_data(kept)
        self._progress("running the model over the calibration data")
        found = load_calibration(self._options.calibration, self._model)
        if self._work is not None:
            self._work.put(written_data(found), _DATA)
        return found

    @cached_property
    def _effort(self) -> Effort:
        """What GPTQ will take, of all stages together."""
        model, side = self._model, tiles_along_side(self._model, IMAGES)
        stages = [stage for stage in STAGE_NAMES if asks_int4(stage, model, self._options)]
        work = {stage: (matrices(model, stage), tokens_of(model, stage, side)) for stage in stages}
        return Effort(work, measured_speed(), self._progress)

    def plan(self) -> Planned:
        """Measure what has to be measured.

        Raises:
            ExportError: A stage cannot have the precision that was asked for.
        """
        if any(asks_int4(stage, self._model, self._options) for stage in STAGE_NAMES):
            self._effort.announce()
            if self._work is not None:
                self._progress(
                    f"what is done is kept in {self._work.path}: if this is killed, the same "
                    "command goes on from there"
                )
        planned = Planned(Plans(), {}, {})
        rfm = self._model.rfm
        shared = rfm is not None and rfm.of_llm
        for stage in STAGE_NAMES:
            if stage == "rfm" and (rfm is None or shared):
                continue
            plan = self._stage_plan(stage, planned)
            planned = replace(planned, plans=planned.plans.with_stage(stage, plan))
        if shared:
            # The same weights, in the same file.
            planned = replace(planned, plans=planned.plans.with_stage("rfm", planned.plans.llm))
        return planned

    def _stage_plan(self, stage: StageName, planned: Planned) -> Plan:
        asked = self._options.precisions.of(stage)
        target = self._options.target
        if asked == "fp32" and target != "cpu":
            # GroupQueryAttention has no float32 kernel on CUDA, and TensorRT none that is fast.
            asked = "fp16"
        if asked != "int8":
            check_plan(stage, asked, self._model)
            return self._kept(stage, asked, planned)
        ways = int8_precisions(stage, self._model, target, large=is_large(self._model, stage))
        if self._options.vision_attention:
            # Graphs that share weights cannot have static ranges.
            ways = tuple(way for way in ways if way != "int8-static")
        if len(ways) == 1:
            return self._kept(stage, ways[0], planned)
        errors: dict[Precision, list[LayerError]] = {}
        plans = []
        for precision in ways:
            plans.append(self._kept(stage, precision, planned))
            errors[precision] = planned.errors.pop(stage, [])
        self._progress(f"measuring ways to compute {stage} in int8")
        limit = LIMITS["int8-dynamic"].cosine
        found = ranked(measure(stage, plans, self._model, self.data, self._folder), limit)
        planned.choices[stage] = found
        best = next(plan for plan in plans if plan.precision == found[0].precision)
        if errors[best.precision]:
            planned.errors[stage] = errors[best.precision]
        return best

    def _kept(self, stage: StageName, precision: Precision, planned: Planned) -> Plan:
        """The plan for a precision, in which sensitive weights are kept higher."""
        options = self._options
        symmetric = options.symmetric or options.target == "tensorrt"
        plan = Plan(precision, target=options.target, symmetric=symmetric)
        kept = None if self._work is None else KeptStates(stage, self._work)
        plan = calibrated(plan, stage, self._model, lambda: self.data, kept)
        plan = self._sparing(plan, stage, planned)
        if stage == "rfm" and symmetric and precision == "int8-static":
            # One token's product: onnxruntime 1.32 puts a reshape in front of it, and then refuses
            # int8 that has no zero point.
            layers = self._model.region_focus.config.layers
            query = f"layers.{layers}.self_attn.q_proj"
            plan = replace(plan, higher=plan.higher | {query})
        if precision != "int4-weight":
            return plan
        return replace(plan, rounded=Results(stage, self._work, self._effort).rounded)

    def _sparing(self, plan: Plan, stage: StageName, planned: Planned) -> Plan:
        """The plan with what is too sensitive for it kept higher."""
        options, precision = self._options, plan.precision
        percent = options.keep_higher
        if percent is None:
            percent = KEPT_HIGHER if precision in _KEEPING else 0.0
        if precision in ("fp32", "fp16") or not (options.sensitivity or percent > 0):
            return plan
        if is_large(self._model, stage):
            if options.sensitivity or options.keep_higher:
                raise ExportError(
                    f"sensitivity of {stage} needs the whole stage in memory, which has more than "
                    f"{MOST_WEIGHTS:,} weights; leave --sensitivity and --keep-higher out"
                )
            return replace(plan, higher=self._suspects(stage))
        errors = measure_sensitivity(
            stage, plan, self._model, self.data, self._folder, self._progress
        )
        planned.errors[stage] = errors
        if stage == "vision" and precision == "int8-static" and options.keep_higher is None:
            self._progress("measuring how many layers to keep in float32")
            found = static_variants(
                errors,
                self._model,
                self.data,
                STATIC_TILES,
                self._folder,
                symmetric=plan.symmetric,
            )
            return replace(plan, higher=best_variant(found).kept)
        return replace(plan, higher=kept_higher(errors, percent))

    def _suspects(self, stage: StageName) -> frozenset[str]:
        """What is kept higher where nothing is measured: the inputs with the largest outliers."""
        if stage == "vision":
            return frozenset()
        config = (self._model.region_focus if stage == "rfm" else self._model.llm).config
        return frozenset(f"layers.{layer}.mlp.down_proj" for layer in range(config.layers))


def asks_int4(stage: StageName, model: Model, options: ExportOptions) -> bool:
    """Whether a stage with weights of its own is to be rounded to 4 bits."""
    if stage == "rfm" and (model.rfm is None or model.rfm.of_llm):
        return False
    return options.precisions.of(stage) == "int4-weight"


def is_large(model: Model, stage: StageName) -> bool:
    """Whether a stage has more than MOST_WEIGHTS weights, so that nothing is measured of it."""
    tower = model.vision.tower
    if stage == "vision":
        return isinstance(tower, TransformerTower) and tower.weights > MOST_WEIGHTS
    if stage == "rfm":
        return model.region_focus.config.weights > MOST_WEIGHTS
    return model.llm_weights > MOST_WEIGHTS

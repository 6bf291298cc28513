"""The graphs of a model's three stages, each under a plan of precisions, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType

from lrs_edge.engines.devices import StageName
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.checkpoints.towers import ClipTower
from lrs_edge_export.checkpoints.vision import EfficientNetTower
from lrs_edge_export.graphs import decoder_graph, vision_graph
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import (
    CalibrationData,
    Calibrator,
    DecoderCalibrator,
    KeptStates,
    VisionCalibrator,
    spread,
    static_vision,
)
from lrs_edge_export.quantization.precision import Plan, Precision

VISION, RFM, RFM_MASKED, LLM = "vision.onnx", "rfm.onnx", "rfm_masked.onnx", "llm.onnx"
LLM_INT8_KV = "llm_int8_kv.onnx"
#: What follows an RFM that is the language model's first layers.
LLM_REST = "llm_rest.onnx"
#: The vision stage of onnxruntime's own operators, for CUDA.
VISION_FUSED = "vision_fused.onnx"
TOWER, PROJECTOR = "vision_tower.onnx", "projector.onnx"

#: A quantized vision graph is made from one in floats, which lies beside it for a moment.
_FLOAT_VISION = "vision_float.onnx"

#: Tiles that ranges of activations are measured on; more take longer and change little.
STATIC_TILES = 40

#: The order in which stages are written: an RFM may point at the language model's weights.
WRITTEN: tuple[StageName, ...] = ("vision", "llm", "rfm")


@dataclass(frozen=True)
class Plans:
    """A plan per stage."""

    vision: Plan = field(default_factory=Plan)
    rfm: Plan = field(default_factory=Plan)
    llm: Plan = field(default_factory=Plan)

    def of(self, stage: StageName) -> Plan:
        """The plan of a stage."""
        return {"vision": self.vision, "rfm": self.rfm, "llm": self.llm}[stage]

    def with_stage(self, stage: StageName, plan: Plan) -> Plans:
        """The same plans but for one stage."""
        return replace(self, **{stage: plan})


def calibrated(
    plan: Plan,
    stage: StageName,
    model: Model,
    data: Callable[[], CalibrationData],
    kept: KeptStates | None = None,
) -> Plan:
    """The plan, which can ask for what is known of the inputs of a stage's matrix products.

    Args:
        plan: Precisions.
        stage: Of the model.
        model: The checkpoint.
        data: Loads the calibration data; called when the first weight needs it.
        kept: States of a decoder's layers that an export that was killed has come to.
    """
    moments = plan.precision == "int4-weight"

    @cache
    def load() -> Calibrator:
        if stage == "vision":
            return VisionCalibrator(model.vision, data().tiles, second_moments=moments)
        if stage == "rfm":
            sequences = data().sequences
            return DecoderCalibrator(
                model.region_focus, sequences, second_moments=moments, kept=kept
            )
        return DecoderCalibrator(
            model.llm, data().pruned, second_moments=moments, head=True, kept=kept
        )

    return replace(plan, calibrator=load)


class StageWriter:
    """Writes stages, and keeps their weight files open, so that checks can write more graphs.

    Args:
        model: The checkpoint.
        folder: Where files go.
        cuts: Layers after which the LLM is also cut into segments.
        vision_attention: Also write tower and projector apart.
        tiles: Loads calibration tiles float32 [N, 3, S, S], for vision in `int8-static`.
    """

    def __init__(
        self,
        model: Model,
        folder: Path,
        *,
        cuts: tuple[int, ...] = (),
        vision_attention: bool = False,
        tiles: Callable[[], Array] | None = None,
    ) -> None:
        self.model = model
        self.folder = folder
        self.head = decoder_graph.LanguageHead(model.vocabulary, model.lm_head)
        self._cuts = cuts
        self._vision_attention = vision_attention
        self._tiles = tiles
        self._stack = ExitStack()
        self.weights: dict[StageName, WeightFile] = {}

    def __enter__(self) -> StageWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def write(self, stage: StageName, plan: Plan) -> None:
        """Write all graphs of a stage.

        Raises:
            ExportError: The plan cannot be followed for this stage.
        """
        {"vision": self._write_vision, "rfm": self._write_rfm, "llm": self._write_llm}[stage](plan)

    def _write_vision(self, plan: Plan) -> None:
        static = plan.precision == "int8-static"
        name = _FLOAT_VISION if static else VISION
        # Ranges are measured, and quantized, in float32 whatever the target.
        weights = self._open("vision", name, Plan() if static else plan)
        vision_graph.write_vision(self.model.vision, self.folder / name, weights)
        if static:
            self._quantize_vision(plan)
            return
        if plan.target == "cuda" and vision_graph.fuses(self.model.vision):
            path = self.folder / VISION_FUSED
            vision_graph.write_vision(self.model.vision, path, weights, fused=True)
        if self._vision_attention:
            parts = self.folder / TOWER, self.folder / PROJECTOR
            tower = clip_tower(self.model)
            vision_graph.write_tower(self.model.vision, tower, *parts, weights)

    def _quantize_vision(self, plan: Plan) -> None:
        if self._tiles is None or self._vision_attention:
            raise ValueError("int8-static needs calibration tiles, and cannot share weights")
        source, target = self.folder / _FLOAT_VISION, self.folder / VISION
        tiles = spread(self._tiles(), STATIC_TILES)
        static_vision(source, tiles, target, exclude=plan.higher, symmetric=plan.symmetric)
        source.unlink()
        source.with_name(f"{source.name}.data").unlink()

    def _write_rfm(self, plan: Plan) -> None:
        rfm = self.model.rfm
        if rfm is None:
            return
        if rfm.of_llm:
            # The language model is written, and all that the RFM reads with it.
            weights = self.weights["rfm"] = self.weights["llm"]
        else:
            weights = self._open("rfm", RFM, plan)
        decoder_graph.write_rfm(rfm, "gqa", self.folder / RFM, weights)
        decoder_graph.write_rfm(rfm, "masked", self.folder / RFM_MASKED, weights)
        if rfm.of_llm:
            rest = self.folder / LLM_REST
            scoring = rfm.config.layers
            decoder_graph.write_llm_rest(
                self.model.llm, self.head, scoring, rest, weights, on_device=_on_device(weights)
            )

    def _write_llm(self, plan: Plan) -> None:
        weights = self._open("llm", LLM, plan)
        path, on_device = self.folder / LLM, _on_device(weights)
        decoder_graph.write_llm(self.model.llm, self.head, path, weights, on_device=on_device)
        if self._cuts:
            paths = [self.folder / name for name in segment_names(len(self._cuts) + 1)]
            decoder_graph.write_llm_segments(self.model.llm, self.head, self._cuts, paths, weights)

    def write_int8_kv(self, scales: Mapping[str, Array]) -> None:
        """Write the language model once more over int8 key/value buffers; adds no weights.

        Args:
            scales: One scale per channel of each buffer; see `quantization/kv_scales.py`.
        """
        path, weights = self.folder / LLM_INT8_KV, self.weights["llm"]
        decoder_graph.write_llm(
            self.model.llm, self.head, path, weights, scales, on_device=_on_device(weights)
        )

    def _open(self, stage: StageName, graph: str, plan: Plan) -> WeightFile:
        weights = self._stack.enter_context(WeightFile(self.folder / f"{graph}.data", plan))
        self.weights[stage] = weights
        return weights


def _on_device(weights: WeightFile) -> bool:
    """Whether graphs of the language model are written so that CUDA graphs can be captured."""
    return weights.plan.target == "cuda"


def segment_names(count: int) -> list[str]:
    """Files of the LLM's segments."""
    return [f"llm_segment{number}.onnx" for number in range(count)]


def clip_tower(model: Model) -> ClipTower:
    """The model's CLIP tower. Raises ExportError where it is another network."""
    tower = model.vision.tower
    if not isinstance(tower, ClipTower):
        raise ExportError(
            "--vision-attention needs a CLIP tower, whose class token attends to the patches; that "
            f"of a {model.family} checkpoint is another network"
        )
    return tower


def check_plan(stage: StageName, precision: Precision, model: Model) -> None:
    """Refuse what makes no sense for a stage. Raises ExportError."""
    convolutional = stage == "vision" and isinstance(model.vision.tower, EfficientNetTower)
    if convolutional and precision in ("int4-weight", "int8-dynamic"):
        raise ExportError(
            f"--vision {precision} quantizes matrix products, and this vision tower is made of "
            "convolutions; use int8-static, int8-weight, fp16 or fp32"
        )

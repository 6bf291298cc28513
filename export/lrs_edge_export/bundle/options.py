"""What the user of the export can choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lrs_edge.engines.devices import STAGE_NAMES, StageName
from lrs_edge.errors import ExportError
from lrs_edge_export.quantization.precision import REFUSED, REQUESTS, TARGETS, Requested, Target


@dataclass(frozen=True)
class Precisions:
    """Precision asked for, per stage."""

    vision: Requested = "fp32"
    rfm: Requested = "fp32"
    llm: Requested = "fp32"

    def __post_init__(self) -> None:
        for stage in STAGE_NAMES:
            if self.of(stage) not in REQUESTS:
                raise ExportError(
                    f"precision {self.of(stage)!r} is unknown; use one of {', '.join(REQUESTS)}"
                )

    @classmethod
    def all(cls, precision: Requested) -> Precisions:
        """The same for every stage."""
        return cls(precision, precision, precision)

    def of(self, stage: StageName) -> Requested:
        """What was asked for a stage."""
        requests: dict[StageName, Requested] = {
            "vision": self.vision,
            "rfm": self.rfm,
            "llm": self.llm,
        }
        return requests[stage]


@dataclass(frozen=True)
class AccuracyCheck:
    """Questions that the finished bundle is asked.

    Attributes:
        questions: LRS-VQA or MME-RealWorld-RS question file.
        images: Folder of the images it names.
        limit: Only the first so many questions.
        baseline: A bundle to compare with, usually the same checkpoint at fp32.
        most_lost: Percentage points below the baseline that fail the export.
    """

    questions: Path
    images: Path
    limit: int | None = None
    baseline: Path | None = None
    most_lost: float = 2.0


@dataclass(frozen=True)
class ExportOptions:
    """What the user can choose.

    Attributes:
        vision_tower: Folder or hub name of the vision tower; None to follow config.json.
        revision: Of a checkpoint on the hub: branch, tag or commit; None for its main branch.
        name: Of the bundle; None takes the checkpoint's.
        precisions: Of the stages.
        target: Engine the bundle is for: on CUDA and for TensorRT everything that is not quantized
            is float16.
        symmetric: Static int8 of the vision encoder is such that TensorRT's parser takes it; always
            so for TensorRT.
        calibration: Folder of images and questions; None takes those that come with the package.
        keep_higher: Percentage of a stage's weights, the most sensitive ones by measurement, kept
            at a higher precision; None for the usual share (`quantization/planning.py`).
        sensitivity: Measure every weight's sensitivity even where none is kept higher.
        work: Folder in which matrices rounded to 4 bits are kept until the bundle is written, so
            that an export that is killed can go on; None takes one beside the target for large
            stages.
        int8_kv: Also write the language model over an int8 KV cache.
        licence: Of the weights; None takes the recipe's.
        parity: Whether to compare with PyTorch at the end.
        parity_images: Folder of images for that; None takes synthetic ones.
        accuracy: Questions that the finished bundle is asked; None for none.
        rfm_layers: The RFM is so many first layers of the language model, by reference to its
            weights and at its precision, in place of the checkpoint's own; `default` for as many
            as the recipe or the family says; None for the checkpoint's own.
        relative_to: A generic instruction: a token's score is its attention under the question
            divided by that under this text; empty for the attention itself.
        local_pool: By which local tokens are pooled; None for the family's.
        force: Replace an existing target.
        attention_layers: Layers after which the LLM is also cut into segments, for ways to prune
            that need attention from inside it; ascending.
        vision_attention: Also write tower and projector apart, for ways to prune that need
            attention from inside a CLIP tower.
    """

    vision_tower: str | None = None
    revision: str | None = None
    name: str | None = None
    precisions: Precisions = field(default_factory=Precisions)
    target: Target = "cpu"
    symmetric: bool = False
    calibration: Path | None = None
    keep_higher: float | None = None
    sensitivity: bool = False
    work: Path | None = None
    int8_kv: bool = False
    licence: str | None = None
    parity: bool = True
    parity_images: Path | None = None
    accuracy: AccuracyCheck | None = None
    rfm_layers: int | Literal["default"] | None = None
    relative_to: str = ""
    local_pool: int | None = None
    force: bool = False
    attention_layers: tuple[int, ...] = ()
    vision_attention: bool = False

    def __post_init__(self) -> None:
        if self.vision_attention and self.precisions.vision == "int8-static":
            raise ExportError(
                "--vision-attention shares weights between graphs, which int8-static cannot; use "
                "--vision int8-dynamic"
            )
        if self.symmetric and self.precisions.vision not in ("int8", "int8-static"):
            raise ExportError(
                f"--symmetric is for a vision encoder in int8-static, not "
                f"{self.precisions.vision}; add --vision int8-static"
            )
        asked = {self.precisions.of(stage) for stage in STAGE_NAMES}
        if self.sensitivity and asked <= {"fp32", "fp16"}:
            raise ExportError(
                "--sensitivity measures what it costs to quantize each weight, and no stage is "
                f"quantized at {' or '.join(sorted(asked))}; add --precision int8, or leave it out"
            )
        self._check_target()
        folders = self.calibration, self.parity_images
        if None not in folders and len({Path(str(one)).resolve() for one in folders}) == 1:
            raise ExportError(
                f"{self.calibration} is named both for calibration and for the parity check, which "
                "would say little then; name two folders"
            )

    @property
    def smoothed(self) -> tuple[StageName, ...]:
        """Decoders whose activations get fixed scales of int8, so that they are smoothed first."""
        decoders: tuple[StageName, ...] = ("rfm", "llm")
        static = [one for one in decoders if self.precisions.of(one) == "int8-static"]
        return tuple(static) if self.target == "tensorrt" else ()

    def _check_target(self) -> None:
        """Refuse what the target does not run, or no faster. Raises ExportError."""
        if self.target not in TARGETS:
            raise ExportError(f"target {self.target!r} is unknown; use one of {', '.join(TARGETS)}")
        for stage in STAGE_NAMES:
            asked = self.precisions.of(stage)
            if asked != "int8" and (reason := REFUSED[self.target].get(asked)):
                raise ExportError(f"--{stage} {asked} {reason}")

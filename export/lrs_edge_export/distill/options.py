"""What `distill` is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lrs_edge.errors import BackendError
from lrs_edge_export.distill.collect import Sampling
from lrs_edge_export.distill.localise import Row, layer_table
from lrs_edge_export.distill.measure import Measured, measure_table
from lrs_edge_export.distill.train import TrainOptions

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class DistillOptions:
    """What the user can choose.

    Attributes:
        images: Folder of the images; None for that of the data, or `images` in it.
        work: Folder of everything that is worth keeping; None for `<target>.work`.
        vision_tower: Folder or hub name of the vision tower; None to follow config.json.
        layers: N, layers to learn from; None for as many as the checkpoint lists, else 2.
        layer_list: These layers, without measuring.
        from_existing: Start from the checkpoint's own RFM instead of the LLM's layers.
        sampling: How sequences are made.
        limit: Most questions used, whole images; None for all.
        held_out: Share of the images whose questions are only measured on.
        train: Of the training.
        precision: Of the student's products; `auto` is bf16 where the processor has it.
        device: `cpu` or `cuda`.
        threads: None leaves them to the libraries.
        force: Replace an existing target.
    """

    images: Path | None = None
    work: Path | None = None
    vision_tower: str | None = None
    layers: int | None = None
    layer_list: tuple[int, ...] | None = None
    from_existing: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    held_out: float = 0.1
    train: TrainOptions = field(default_factory=TrainOptions)
    precision: Precision = "auto"
    device: str = "cpu"
    threads: int | None = None
    force: bool = False


def torch_device(name: str) -> torch.device:
    """Where layers run. Raises BackendError where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("PyTorch finds no CUDA device; use --device cpu")
    return torch.device(name)


@dataclass(frozen=True)
class DistillResult:
    """What was done.

    Attributes:
        path: The new checkpoint.
        layer_list: Layers of the language model that the RFM learned from.
        localisation: One row for each layer of the language model; None where not measured.
        measured: Teacher, student and chance on held-out questions.
        report: What `distill.json` holds.
    """

    path: Path
    layer_list: tuple[int, ...]
    localisation: tuple[Row, ...] | None
    measured: tuple[Measured, ...]
    report: Mapping[str, Any]

    @property
    def layer_table(self) -> str:
        """The localisation as text; empty where it was not measured."""
        return "" if self.localisation is None else layer_table(self.localisation, self.layer_list)

    @property
    def measure_table(self) -> str:
        """The measurements on held-out questions as text."""
        return measure_table(self.measured)

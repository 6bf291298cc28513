"""Checkpoints to bundles: `lrs-edge export`.

The way of the data: `checkpoints` finds files and reads weights one at a time, `families` turns
them into the canonical three stages, `graphs` writes ONNX, `quantization` rounds, `parity` compares
with the PyTorch of `torch_model`, `bundle` puts it all together. `distill` trains a region focus
module. Needs the `export` extra; the runtime imports none of it.

`scenes` makes large question-answer scenes from labelled tiles; it needs no extra. So that it can
be imported without torch, the names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrs_edge_export.bundle.writer import (
        AccuracyCheck,
        ExportOptions,
        ExportResult,
        Precisions,
        export_bundle,
    )

__all__ = ["AccuracyCheck", "ExportOptions", "ExportResult", "Precisions", "export_bundle"]


def __getattr__(name: str) -> Any:
    """The names of `__all__`, imported now (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("lrs_edge_export.bundle.writer"), name)

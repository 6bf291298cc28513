"""Family `qwen2.5-vl`: Qwen2.5-VL, most of whose tower's layers attend within windows."""

from __future__ import annotations

from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.parts import MAX_TILE, MAX_WIDTH
from lrs_edge_export.families.qwen2_vl import TEXT
from lrs_edge_export.families.qwen_vl import ASSISTANT, Variant, read_qwen_vl, tower_fields
from lrs_edge_export.families.scoring import QWEN2_5_VL

_PATCH = 14


def _window(settings: Settings) -> int:
    """Tokens along a window's side. Raises ExportError."""
    pixels = settings.integer("window_size", 1, MAX_TILE, default=112)
    patch = settings.integer("patch_size", 1, MAX_TILE, default=_PATCH)
    merge = settings.integer("spatial_merge_size", 1, 16, default=2)
    if not 1 <= pixels // merge // patch <= 64:
        raise settings.wrong("window_size", f"must be 1..64 tokens of {merge * patch} pixels")
    return pixels // merge // patch


def _tower(settings: Settings, tensors: Scoped, grid: int) -> QwenTower:
    fields = tower_fields(settings, tensors, grid, _PATCH, "hidden_size", "silu")
    full = settings.values.get("fullatt_block_indexes", [7, 15, 23, 31])
    layers = Settings({"full": full}, settings.path).integers("full")
    return QwenTower(
        **fields,
        intermediate=settings.integer("intermediate_size", 1, MAX_WIDTH, default=3420),
        window=_window(settings) * settings.integer("spatial_merge_size", 1, 16, default=2),
        full_layers=layers,
        rms_norm=True,
        gated=True,
    )


_VARIANT = Variant(
    family="qwen2.5-vl",
    text=TEXT,
    sections=(16, 24, 24),
    interleaved=False,
    qk_norm=False,
    conversation=ASSISTANT,
    tower=_tower,
    patch=_PATCH,
    tokens_in_window=_window,
)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_qwen_vl(checkpoint, vision_tower, _VARIANT)


FAMILY = Family(
    "qwen2.5-vl", ("Qwen2_5_VLForConditionalGeneration",), "Qwen2.5-VL", read, scoring=QWEN2_5_VL
)

"""Family `qwen3-vl`: Qwen3-VL, whose tower gives its inner layers' outputs to the decoder, too.

The tower's tokens are the last output's, and those of some layers before (deepstack). A vision
token carries all of them: the decoder's first layers each add one to what they give. The search and
the pruning see one token; the region focus module, the first of these layers, adds its own.
"""

from __future__ import annotations

import math

from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.parts import MAX_TOKENS, MAX_WIDTH
from lrs_edge_export.families.qwen_vl import PLAIN, Variant, read_qwen_vl, tower_fields
from lrs_edge_export.families.scoring import QWEN2_5_VL

#: What Qwen3VLTextConfig takes where config.json is silent.
_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}

_PATCH = 16


def _tower(settings: Settings, tensors: Scoped, grid: int) -> QwenTower:
    fields = tower_fields(settings, tensors, grid, _PATCH, "hidden_size", "gelu_pytorch_tanh")
    table = settings.integer("num_position_embeddings", 1, MAX_TOKENS, default=2304)
    if math.isqrt(table) ** 2 != table:
        raise settings.wrong("num_position_embeddings", "must be a square")
    given = settings.values.get("deepstack_visual_indexes", [8, 16, 24])
    taps = Settings({"taps": given}, settings.path).integers("taps")
    if list(taps) != sorted(set(taps)) or not all(0 <= tap < fields["layers"] for tap in taps):
        raise settings.wrong("deepstack_visual_indexes", "must be layers of the tower, ascending")
    return QwenTower(
        **fields,
        intermediate=settings.integer("intermediate_size", 1, MAX_WIDTH, default=4304),
        stem_bias=True,
        table_grid=math.isqrt(table),
        taps=taps,
    )


_VARIANT = Variant(
    family="qwen3-vl",
    text=_TEXT,
    sections=(24, 20, 20),
    interleaved=True,
    qk_norm=True,
    conversation=PLAIN,
    tower=_tower,
    patch=_PATCH,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_qwen_vl(checkpoint, vision_tower, _VARIANT)


FAMILY = Family(
    "qwen3-vl", ("Qwen3VLForConditionalGeneration",), "Qwen3-VL", read, scoring=QWEN2_5_VL
)

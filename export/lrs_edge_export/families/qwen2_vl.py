"""Family `qwen2-vl`: Qwen2-VL, whose tower has no windows and whose decoder is Qwen2's."""

from __future__ import annotations

from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.qwen_vl import ASSISTANT, Variant, read_qwen_vl, tower_fields
from lrs_edge_export.families.scoring import QWEN2_5_VL

#: What Qwen2VLTextConfig takes where config.json is silent.
TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _tower(settings: Settings, tensors: Scoped, grid: int) -> QwenTower:
    fields = tower_fields(settings, tensors, grid, 14, "embed_dim", "quick_gelu")
    ratio = settings.number("mlp_ratio", 0.01, 64, default=4)
    return QwenTower(**fields, intermediate=int(fields["hidden"] * ratio))


_VARIANT = Variant(
    family="qwen2-vl",
    text=TEXT,
    sections=(16, 24, 24),
    interleaved=False,
    qk_norm=False,
    conversation=ASSISTANT,
    tower=_tower,
    patch=14,
)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_qwen_vl(checkpoint, vision_tower, _VARIANT)


FAMILY = Family(
    "qwen2-vl", ("Qwen2VLForConditionalGeneration",), "Qwen2-VL", read, scoring=QWEN2_5_VL
)

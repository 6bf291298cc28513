"""Family `llava-onevision`: LLaVA-OneVision as transformers writes it, SigLIP and Qwen2.

The model was trained on the image stretched to one tile of 27 x 27 tokens, followed by tiles in
rows across all of them with a newline after each row, whose grid is made smaller where it has more
tokens than nine tiles (`anyres_max_9`). A level of the search stands where its tiles stood. Tokens
are not pooled; `--local-pool 2` makes a tile of 14 x 14 tokens, as the model knows them from video.
"""

from __future__ import annotations

from dataclasses import replace

from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.hf_checkpoint import vision_settings
from lrs_edge_export.families.llava_transformers import Layout, read_transformers, tower_stage
from lrs_edge_export.families.templates import Conversation
from lrs_edge_export.families.towers import (
    SIGLIP,
    siglip_tower,
)

_LAYOUT = Layout(rows=True, base_tiles=3)

#: The tower of LlavaOnevisionConfig, where config.json describes none.
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 14,
    "image_size": 384,
    "patch_size": 14,
}


def _conversation(*_: object) -> Conversation:
    return Conversation("<|im_start|>user ", "\n{question}<|im_end|><|im_start|>assistant\n")


def _vision(
    checkpoint: Checkpoint, weights: Scoped, processor: Settings, hidden: int
) -> VisionStage:
    config = checkpoint.config
    if config.text("vision_feature_select_strategy", "full") != "full":
        raise config.wrong("vision_feature_select_strategy", "must be full: SigLIP has no class")
    if not config.text("vision_aspect_ratio", "anyres_max_9").startswith("anyres_max_"):
        raise config.wrong("vision_aspect_ratio", "must be anyres_max_N")
    settings = vision_settings(checkpoint, (SIGLIP,), _SO400M)
    tower = siglip_tower(settings, Scoped(weights, "vision."), config, "vision_feature_layer", -1)
    stage = tower_stage(tower, settings, config, weights, processor, hidden)
    return replace(stage, stretched=True)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_transformers(
        checkpoint,
        vision_tower,
        family="llava-onevision",
        kinds=("qwen2", "llama", "mistral"),
        layout=_LAYOUT,
        vision=_vision,
        default=_conversation,
    )


FAMILY = Family(
    "llava-onevision",
    ("LlavaOnevisionForConditionalGeneration",),
    "LLaVA-OneVision of transformers",
    read,
)

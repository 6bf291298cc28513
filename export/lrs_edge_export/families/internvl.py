r"""Family `internvl`: InternVL 2.5, 3 and 3.5: InternViT, and Qwen2, Qwen3 or LLaMA.

As transformers writes them, or in their own layout (`internvl_original`).

The model was trained on the image stretched to the nearest of the shapes of up to twelve tiles,
tile after tile from the top left, then the whole image stretched to one tile:

    <|im_start|>user\n<img>[256 tokens][256]...[256]</img>\nquestion<|im_end|>

A level of the search stands where its tiles stood, tile after tile without any mark; the global
view comes last. An image that one tile shows was its own only view, which is the prompt without
tiles. Nothing but their order tells where tiles lie: of a level of which some are left out, the
global view has to tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lrs_edge.bundle.layout import GlobalView, LocalTiles, Part, Question
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import InternVitTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.hf_checkpoint import Tokens
from lrs_edge_export.families.internvl_original import (
    ARCHITECTURE,
    as_transformers,
    is_original,
    language_kind,
)
from lrs_edge_export.families.llava_transformers import (
    Layout,
    opening,
    projector_activation,
    read_transformers,
)
from lrs_edge_export.families.parts import MAX_HEADS, MAX_LAYERS, MAX_TILE, MAX_WIDTH
from lrs_edge_export.families.templates import Conversation
from lrs_edge_export.families.towers import ACTIVATIONS, resize_filter

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_START, _END = "<img>", "</img>"

_TOWER = r"(?:model\.)?vision_tower\."
_LAYER = _TOWER + r"encoder\.layer\.(\d+)\."
_NEW = r"vision.encoder.layers.\1."
_RULES = (
    (_TOWER + r"embeddings\.cls_token$", "vision.embeddings.class_embedding"),
    (_TOWER + r"embeddings\.position_embeddings$", "vision.embeddings.position_embedding.weight"),
    (_TOWER + r"embeddings\.patch_embeddings\.projection\.", "vision.embeddings.patch_embedding."),
    (_LAYER + r"attention\.projection_layer\.", _NEW + "self_attn.out_proj."),
    (_LAYER + r"attention\.", _NEW + "self_attn."),
    (_LAYER + r"layernorm_before\.", _NEW + "layer_norm1."),
    (_LAYER + r"layernorm_after\.", _NEW + "layer_norm2."),
    (_LAYER + r"lambda_(\d)$", _NEW + r"layer_scale\2"),
    (_LAYER, _NEW),
    (_TOWER + r"layernorm\.", "vision.post_layernorm."),
    (_TOWER, "vision."),
    (r"(?:model\.)?multi_modal_projector\.layer_norm\.", "projector.norm."),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
)

#: Fields that must be absent, null, or one of these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("internvl_vision",),
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
    "num_channels": (3,),
}

_NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class _Plain(Layout):
    """Tiles one after the other, then the global view, between two tokens."""

    def parts(self, tokens: Tokens, text: Conversation) -> tuple[Part, ...]:
        """The prompt's layout."""
        before = Conversation(text.before + _START, "")
        return (
            *opening(tokens, before),
            LocalTiles(),
            GlobalView(),
            Question(_END + text.after),
        )


def _conversation(*_: object) -> Conversation:
    return Conversation("<|im_start|>user\n", "\n{question}<|im_end|>\n<|im_start|>assistant\n")


def _side(settings: Settings, key: str, default: int) -> int:
    """A square's side in pixels, given as one number or as two. Raises ExportError."""
    given = settings.integers(key) or (default,)
    if len(set(given)) != 1 or not 1 <= given[0] <= MAX_TILE:
        raise settings.wrong(key, f"must be one side of 1..{MAX_TILE} pixels")
    return given[0]


def _tower(config: Settings, tensors: Scoped) -> tuple[InternVitTower, int]:
    """The tower, and a tile's side in pixels. Raises ExportError."""
    settings = config.section("vision_config") or Settings({}, config.path, "vision_config.")
    require_values(settings, _ONLY)
    layers = settings.integer("num_hidden_layers", 1, MAX_LAYERS, default=24)
    hidden = settings.integer("hidden_size", 1, MAX_WIDTH, default=1024)
    heads = settings.integer("num_attention_heads", 1, MAX_HEADS, default=16)
    if hidden % heads:
        raise settings.wrong("num_attention_heads", f"must divide hidden_size {hidden}")
    activation = settings.text("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise settings.wrong("hidden_act", f"must be one of {', '.join(ACTIVATIONS)}")
    norm = settings.text("norm_type", _NORMS[0])
    if norm not in _NORMS:
        raise settings.wrong("norm_type", f"must be one of {', '.join(_NORMS)}")
    patch, tile = _side(settings, "patch_size", 14), _side(settings, "image_size", 448)
    chosen = config.integer("vision_feature_layer", -layers - 1, layers, default=-1)
    pooled = settings.values.get("use_mean_pooling")
    tower = InternVitTower(
        tensors=tensors,
        layers=chosen if chosen >= 0 else layers + 1 + chosen,
        hidden=hidden,
        heads=heads,
        intermediate=settings.integer("intermediate_size", 1, MAX_WIDTH, default=4096),
        patch=patch,
        grid=tile // patch,
        eps=settings.number("layer_norm_eps", 0.0, 1.0, default=1e-6),
        activation=ACTIVATIONS[activation],
        qkv_bias=settings.flag("attention_bias"),
        qk_norm=settings.flag("use_qk_norm"),
        rms=norm == "rms_norm",
        # The last output has passed it, hidden states have not.
        final_norm=pooled is False and chosen == -1,
    )
    return tower, tile


def _vision(
    checkpoint: Checkpoint, weights: Scoped, processor: Settings, hidden: int
) -> VisionStage:
    config = checkpoint.config
    if config.text("vision_feature_select_strategy", "default") != "default":
        raise config.wrong("vision_feature_select_strategy", "must be default")
    ratio = config.number("downsample_ratio", 1 / MAX_TILE, 1.0, default=0.5)
    factor = round(1 / ratio)
    if abs(factor * ratio - 1) > 1e-6:
        raise config.wrong("downsample_ratio", "must be one part of a whole number")
    tower, tile = _tower(config, Scoped(weights, "vision."))
    return VisionStage(
        tower=tower,
        projector=Projector(
            Scoped(weights, "projector."),
            activation=projector_activation(config),
            shuffle=factor,
            norm="norm",
        ),
        width=tower.hidden,
        hidden=hidden,
        tile=tile,
        local_pool=1,
        mean=processor.triple("image_mean", IMAGENET_MEAN),
        std=processor.triple("image_std", IMAGENET_STD),
        stretched=True,
        filter=resize_filter(processor, "bicubic"),
    )


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    original = is_original(checkpoint.config)
    return read_transformers(
        as_transformers(checkpoint) if original else checkpoint,
        vision_tower,
        family="internvl",
        kinds=("qwen2", "llama", "qwen3"),
        layout=_Plain(rows=False, base_tiles=3),
        vision=_vision,
        default=_conversation,
        rules=_RULES,
        tied=not original,
        # What the original folder has is for text alone.
        own_template=not original,
    )


def _claims(config: Settings) -> bool:
    """Every one whose language model is taken. Raises ExportError where it is another."""
    return not is_original(config) or bool(language_kind(config))


FAMILY = Family(
    "internvl",
    ("InternVLForConditionalGeneration", ARCHITECTURE),
    "InternVL",
    read,
    claims=_claims,
)

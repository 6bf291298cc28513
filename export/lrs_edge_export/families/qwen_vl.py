"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: names of tensors, RoPE over three axes, the layout.

The models were trained on images at their own size, each between two marks, whose tokens have rows
and columns as positions. Here the whole image in one tile is the first of two such images. The
level that was looked at is the second, at the size of the level: its tokens come from tiles, and
have the rows and columns that they would have had in one piece. What is left out is left out of
this image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lrs_edge.bundle.layout import GlobalView, LocalRows, Part, PromptSpec, Question, Text
from lrs_edge.bundle.manifest import Limits
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage, Model, check_vocabulary
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.rows import first_rows
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.hf_checkpoint import (
    canonical_names,
    conversation,
    image_processor,
    refuse_unread,
    tokens_of,
)
from lrs_edge_export.families.parts import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TILE,
    MAX_TOKENS,
    MAX_WIDTH,
    decoder_config,
    newline_vector,
    region_focus,
    repetition,
    stop_ids,
)
from lrs_edge_export.families.templates import Conversation

_LAYER = r"(?:model\.)?visual\.blocks\.(\d+)\."

#: Names of towers and mergers in all three families and both layouts of transformers.
_RULES = (
    (r"(?:model\.)?visual\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"(?:model\.)?visual\.pos_embed\.", "vision.embeddings.position_embedding."),
    (_LAYER + r"norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (_LAYER + r"attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv_proj."),
    (_LAYER + r"attn\.proj\.", r"vision.encoder.layers.\1.self_attn.out_proj."),
    (_LAYER + r"mlp\.(?:linear_)?(fc[12]|\w+_proj)\.", r"vision.encoder.layers.\1.mlp.\2."),
    (r"(?:model\.)?visual\.merger\.(?:ln_q|norm)\.", "vision.post_layernorm."),
    (r"(?:model\.)?visual\.merger\.(?:mlp\.0|linear_fc1)\.", "projector.0."),
    (r"(?:model\.)?visual\.merger\.(?:mlp\.2|linear_fc2)\.", "projector.2."),
    (r"(?:model\.)?visual\.deepstack_merger_list\.(\d+)\.norm\.", r"deepstack.\1.norm."),
    (r"(?:model\.)?visual\.deepstack_merger_list\.(\d+)\.linear_fc1\.", r"deepstack.\1.0."),
    (r"(?:model\.)?visual\.deepstack_merger_list\.(\d+)\.linear_fc2\.", r"deepstack.\1.2."),
)

#: Starts of the names that are read.
_READ = ("model.", "lm_head.", "vision.", "projector.", "deepstack.")

#: Tokens along a tile's side: 448 pixels at 28 a token, 512 at 32. The models were trained on
#: images of this size among others, a tile is four windows of Qwen2.5-VL wide, and 256 tokens are
#: few enough for a level to be searched in many tiles.
_SIDE = 16

#: Tiles along the base level's long side: 32 tokens, where the paper's method has 36.
_BASE_TILES = 2

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: Marks around every image.
_START, _END = "<|vision_start|>", "<|vision_end|>"

#: Turns of a conversation, without a system's.
PLAIN = Conversation(
    f"<|im_start|>user\n{_START}", f"{_END}{{question}}<|im_end|>\n<|im_start|>assistant\n"
)

#: With the system's turn that templates of Qwen2-VL and Qwen2.5-VL put before it.
ASSISTANT = Conversation(
    f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{PLAIN.before}", PLAIN.after
)


@dataclass(frozen=True)
class Variant:
    """What differs between the families.

    Attributes:
        family: Name.
        text: What the language model's config class takes where the file is silent, `rope_theta`
            among it.
        sections: Frequencies of RoPE that turn by time, row and column, where the file is silent.
        interleaved: They take turns; False for one section after the other.
        qk_norm: The decoder's queries and keys have norms; its projections then have no biases.
        conversation: Where the checkpoint has no template.
        mean: Of the image processor.
        std: Of the image processor.
        tower: Makes the tower from `vision_config`, the weights, and tokens along a tile's side.
        patch: Default of `patch_size`.
        tokens_in_window: Tokens along a window's side, of `vision_config`.
    """

    family: str
    text: Mapping[str, Any]
    sections: tuple[int, int, int]
    interleaved: bool
    qk_norm: bool
    conversation: Conversation
    tower: Callable[[Settings, Scoped, int], QwenTower]
    patch: int
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD
    tokens_in_window: Callable[[Settings], int] = lambda _: 1


def read_qwen_vl(checkpoint: Checkpoint, vision_tower: str | None, variant: Variant) -> Model:
    """Read a checkpoint of one of the families. Raises ExportError."""
    if vision_tower is not None:
        raise ExportError("--vision-tower does not apply: this checkpoint holds its own tower")
    notes: list[str] = []
    settings = _text_settings(checkpoint.config, variant)
    weights = canonical_names(checkpoint, _RULES)
    refuse_unread(weights, _READ)
    processor = image_processor(checkpoint)
    if not processor.values:
        notes.append("no preprocessor_config.json in the checkpoint: the family's values are used")
    stage = _vision(checkpoint, weights, processor, variant)
    decoder = replace(_decoder(settings, variant), deepstack=len(stage.deepstack))
    if stage.hidden != decoder.width:
        raise ExportError(
            f"{checkpoint.config.path}: the vision tower gives tokens of another width than the "
            f"language model's {decoder.hidden}; the configs do not belong together"
        )
    if decoder.deepstack > decoder.layers:
        raise ExportError(
            f"{checkpoint.config.path}: deepstack_visual_indexes names {decoder.deepstack} layers "
            f"of the tower, and the language model has {decoder.layers} to add them to"
        )
    inner = Scoped(weights, "model.")
    vocabulary = settings.integer("vocab_size", 1, MAX_TOKENS)
    check_vocabulary(inner, vocabulary)
    tokens = tokens_of(checkpoint)
    text = conversation(checkpoint, tokens, variant.conversation, notes)
    if not text.after.startswith(_END):
        notes.append(f"the chat template does not end images with {_END}: the family's is used")
        text = variant.conversation
    generation = checkpoint.side_file("generation_config.json")
    length = settings.integer("max_position_embeddings", 1, MAX_TOKENS)
    return Model(
        family=variant.family,
        vision=stage,
        rfm=region_focus(checkpoint.config, decoder, weights),
        llm=DecoderStage(decoder, inner),
        embed_tokens=first_rows(inner, "embed_tokens.weight", vocabulary, decoder.hidden),
        lm_head=first_rows(
            *_head(checkpoint.config, settings, weights), vocabulary, decoder.hidden
        ),
        image_newline=newline_vector(inner, decoder.hidden, needed=False),
        vocabulary=vocabulary,
        tokenizer_json=tokens.file.text,
        prompt=PromptSpec(
            _layout(text), stop_ids(settings, generation, vocabulary), position_axes=3
        ),
        base_side=_BASE_TILES * stage.tile,
        limits=Limits(max_length=length, max_positions=length),
        repetition=repetition(settings, generation, vocabulary, prompt=True),
        folders=(checkpoint.path,),
        notes=tuple(notes),
    )


def _layout(text: Conversation) -> tuple[Part, ...]:
    """Two images, of which the second is there where tiles were looked at."""
    local = LocalRows(newline=False, before=_START, after=_END)
    return (
        Text(text.before),
        GlobalView(),
        Text(_END),
        local,
        Question(text.after.removeprefix(_END)),
    )


def _text_settings(config: Settings, variant: Variant) -> Settings:
    """The language model's config: nested, or as older files have it among the rest."""
    found = config.section("text_config") or config
    given = {name: value for name, value in found.values.items() if value is not None}
    values = {**found.values, **variant.text, **given}
    ropes = [values.get(name) for name in ("rope_parameters", "rope_scaling")]
    nested = [rope for rope in ropes if isinstance(rope, dict) and rope.get("rope_theta")]
    if nested and "rope_theta" not in given:
        # The default is for files that name no base at all.
        del values["rope_theta"]
    return found.replaced(values)


def _decoder(settings: Settings, variant: Variant) -> DecoderConfig:
    """Sizes, with an axis for every frequency of RoPE. Raises ExportError."""
    values = dict(settings.values)
    sections: tuple[int, ...] = variant.sections
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if not isinstance(rope, dict):
            continue
        rest = Settings(dict(rope), settings.path, f"{name}.")
        sections = rest.integers("mrope_section") or sections
        if rest.values.get("mrope_interleaved", variant.interleaved) is not variant.interleaved:
            raise rest.wrong("mrope_interleaved", f"must be {str(variant.interleaved).lower()}")
        values[name] = {
            key: "default" if value == "mrope" and key in ("type", "rope_type") else value
            for key, value in rope.items()
            if key not in ("mrope_section", "mrope_interleaved")
        }
    plain = settings.replaced(values)
    require_values(plain, {"attention_bias": (False,) if variant.qk_norm else (True,)})
    config = decoder_config(plain, qkv_bias=not variant.qk_norm)
    half = config.head_dim // 2
    if len(sections) != 3 or min(sections) < 1 or sum(sections) != half:
        raise settings.wrong(
            "mrope_section", f"must be three numbers whose sum is {half}, half a head's width"
        )
    axes = _interleaved(sections) if variant.interleaved else np.repeat(np.arange(3), sections)
    return replace(config, rope_axes=tuple(int(x) for x in axes), qk_norm=variant.qk_norm)


def _interleaved(sections: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Axis of each frequency: rows and columns take every third place as long as they last."""
    places = np.arange(sum(sections), dtype=np.int64)
    axes = places % 3
    lasts = np.array([len(places), *(3 * count for count in sections[1:])])
    return np.where(places < lasts[axes], axes, 0)


def _head(config: Settings, settings: Settings, weights: Scoped) -> tuple[Scoped, str]:
    """The output projection, or the embedding table where they are one. Raises ExportError."""
    if weights.has("lm_head.weight"):
        return weights, "lm_head.weight"
    if not (config.flag("tie_word_embeddings") or settings.flag("tie_word_embeddings")):
        raise ExportError(
            f"{config.path}: the checkpoint has no lm_head.weight, and tie_word_embeddings does "
            "not say that the embedding table stands for it; download it again"
        )
    return weights, "model.embed_tokens.weight"


def _vision(
    checkpoint: Checkpoint, weights: Scoped, processor: Settings, variant: Variant
) -> VisionStage:
    settings = checkpoint.config.section("vision_config")
    if settings is None:
        raise checkpoint.config.wrong("vision_config", "must describe the vision tower")
    require_values(settings, {"in_channels": (3,), "in_chans": (3,)})
    merge = settings.integer("spatial_merge_size", 1, 16, default=2)
    window = variant.tokens_in_window(settings)
    # Windows that are cut by a tile's edge would be smaller than others.
    side = -(-_SIDE // window) * window
    tower = variant.tower(settings, Scoped(weights, "vision."), side * merge)
    for key, value in (
        ("patch_size", tower.patch),
        ("merge_size", merge),
        ("temporal_patch_size", tower.temporal),
    ):
        require_values(processor, {key: (value,)})
    given = settings.values.get("out_hidden_size", settings.values.get("hidden_size"))
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MAX_WIDTH:
        raise settings.wrong("hidden_size", f"must be an integer of 1..{MAX_WIDTH}")
    inner = tower.hidden * merge**2
    make = partial(Projector, shuffle=merge, inner=inner)
    return VisionStage(
        tower=tower,
        projector=make(Scoped(weights, "projector.")),
        width=tower.hidden,
        hidden=given * (1 + len(tower.taps)),
        tile=tower.grid * tower.patch,
        local_pool=1,
        mean=processor.triple("image_mean", variant.mean),
        std=processor.triple("image_std", variant.std),
        deepstack=tuple(
            make(
                Scoped(weights, f"deepstack.{number}."),
                norm="norm",
                eps=tower.eps,
                name=f"projector.deepstack_{number}",
            )
            for number in range(len(tower.taps))
        ),
    )


def tower_fields(
    settings: Settings, tensors: Scoped, grid: int, patch: int, width: str, activation: str
) -> dict[str, Any]:
    """What all three towers have, as arguments of `QwenTower`.

    Args:
        settings: `vision_config`.
        tensors: The tower's.
        grid: Patches along a tile's side.
        patch: Default of `patch_size`.
        width: Name of the field that holds the tower's width.
        activation: Default of `hidden_act`.

    Raises:
        ExportError: A value is absent, out of bounds, or not supported.
    """
    hidden = settings.integer(width, 1, MAX_WIDTH)
    heads = settings.integer("num_heads", 1, MAX_HEADS, default=16)
    if hidden % heads or hidden // heads % 4:
        raise settings.wrong("num_heads", f"must divide {width} {hidden} into multiples of 4")
    acts = settings.text("hidden_act", activation)
    if acts not in _ACTIVATIONS:
        raise settings.wrong("hidden_act", f"must be one of {', '.join(_ACTIVATIONS)}")
    rope = settings.section("rope_parameters") or Settings({}, settings.path)
    require_values(rope, {"rope_type": ("axial",)})
    return {
        "tensors": tensors,
        "layers": settings.integer("depth", 1, MAX_LAYERS),
        "hidden": hidden,
        "heads": heads,
        "patch": settings.integer("patch_size", 1, MAX_TILE // grid, default=patch),
        "grid": grid,
        "eps": 1e-6,
        "activation": _ACTIVATIONS[acts],
        "temporal": settings.integer("temporal_patch_size", 1, 16, default=2),
        "theta": rope.number("rope_theta", 1.0, 1e12, default=10000.0),
    }

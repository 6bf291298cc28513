"""Family `llava`: checkpoints of LLaVA's own code, without the authors' region focus module.

LLaVA 1.5, 1.6 and OneVision, and what was trained with that code: GeoChat and VHM on remote
sensing, LongVA on long contexts. Architectures are those of the authors' checkpoints; the
projector, and how tiles are merged (`mm_patch_merge_type`), tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lrs_edge.bundle.layout import (
    GlobalView,
    LocalRows,
    LocalTiles,
    Part,
    PromptSpec,
    Question,
    Text,
    TokenIds,
)
from lrs_edge.bundle.manifest import Limits
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import DecoderStage, Model, check_vocabulary
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.renamed import Renamed
from lrs_edge_export.checkpoints.rows import first_rows
from lrs_edge_export.checkpoints.tensors import Scoped, open_tensors
from lrs_edge_export.checkpoints.towers import ClipTower, SiglipTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.hf_checkpoint import (
    LANGUAGE,
    Tokens,
    longest,
    refuse_unread,
    tokens_of,
    with_defaults,
)
from lrs_edge_export.families.llava_llama import VICUNA_V1
from lrs_edge_export.families.llava_next import LLAMA_3, MISTRAL
from lrs_edge_export.families.llava_qwen import QWEN_1_5
from lrs_edge_export.families.parts import (
    MAX_TILE,
    MAX_TOKENS,
    PRUNER,
    decoder_config,
    newline_vector,
    region_focus,
    repetition,
    stop_ids,
)
from lrs_edge_export.families.templates import Conversation
from lrs_edge_export.families.tower_files import find_tower, tower_settings, tower_tensors
from lrs_edge_export.families.towers import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    clip_tower,
    normalising,
    resize_filter,
    siglip_tower,
)

#: Language model of each architecture, as `model_type`.
_KINDS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "GeoChatLlamaForCausalLM": "llama",
}

#: Image sizes that positions are resized to by the code of these architectures.
_SIDES = {"GeoChatLlamaForCausalLM": 504}

#: Names of the linear layers by `mm_projector_type`.
_PROJECTORS = {"linear": ("",), "mlp2x_gelu": ("0.", "2.")}

#: What this code base can do otherwise.
_ONLY: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": tuple(_PROJECTORS),
    "mm_use_im_start_end": (False,),
    "mm_vision_select_feature": ("patch",),
    "mm_resampler_type": (),
    "s2": (False,),
}

_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = "model.mm_projector."

#: Towers whose sizes are known by their names, so that a copy inside a checkpoint is enough.
_KNOWN: dict[str, dict[str, Any]] = {
    f"clip-vit-large-patch14{suffix}": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": side,
        "patch_size": 14,
    }
    for suffix, side in (("", 224), ("-336", 336))
} | {
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}


@dataclass(frozen=True)
class _Merge:
    """How tokens of tiles stand in the sequence.

    Attributes:
        rows: In rows across all tiles; else tile after tile.
        newline: Rows end with the newline vector.
        mark: Text before each tile, where they stand one after the other.
        pool: By which they are pooled.
        stretched: The global view is stretched.
    """

    rows: bool = False
    newline: bool = False
    mark: str = "\n"
    pool: int = 1
    stretched: bool = False


def _merge(config: Settings) -> _Merge:
    """By `mm_patch_merge_type` and `image_aspect_ratio`. Raises ExportError."""
    kind, shape = config.text("mm_patch_merge_type", "flat"), config.text("image_aspect_ratio", "")
    if kind == "unires":
        # LongVA: a tile is 144 tokens, and nothing stands between two of them.
        return _Merge(mark="", pool=2, stretched=True)
    if kind == "flat" or not shape.startswith("anyres"):
        return _Merge()
    if kind not in ("spatial", "spatial_unpad"):
        raise config.wrong("mm_patch_merge_type", "must be flat, spatial, spatial_unpad or unires")
    return _Merge(rows=True, newline=kind == "spatial_unpad", stretched=True)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    config, generation = checkpoint.config, checkpoint.side_file("generation_config.json")
    require_values(config, _ONLY)
    kind = _KINDS[config.values["architectures"][0]]
    settings, length = longest(with_defaults(config, kind))
    length = min(length, config.integer("tokenizer_model_max_length", 1, MAX_TOKENS, length))
    merge = _merge(config)
    weights = checkpoint.tensors()
    refuse_unread(weights, (*LANGUAGE, PRUNER, _TOWER, _PROJECTOR))
    decoder = decoder_config(settings, qkv_bias=kind == "qwen2" or settings.flag("attention_bias"))
    notes: list[str] = []
    stage, folders = _vision(checkpoint, weights, vision_tower, decoder.hidden, notes)
    stage = replace(stage, local_pool=merge.pool, stretched=merge.stretched)
    inner = Scoped(weights, "model.")
    vocabulary = settings.integer("vocab_size", 1, MAX_TOKENS)
    check_vocabulary(inner, vocabulary)
    tokens = tokens_of(checkpoint, whole=False)
    tied = not weights.has("lm_head.weight") and settings.flag("tie_word_embeddings")
    head = (inner, "embed_tokens.weight") if tied else (weights, "lm_head.weight")
    return Model(
        family="llava",
        vision=stage,
        rfm=region_focus(config, decoder, weights),
        llm=DecoderStage(decoder, inner),
        embed_tokens=first_rows(inner, "embed_tokens.weight", vocabulary, decoder.hidden),
        lm_head=first_rows(*head, vocabulary, decoder.hidden),
        image_newline=newline_vector(inner, decoder.hidden, needed=merge.newline),
        vocabulary=vocabulary,
        tokenizer_json=tokens.file.text,
        prompt=PromptSpec(
            _parts(merge, tokens, _conversation(kind, tokens)),
            stop_ids(settings, generation, vocabulary),
        ),
        base_side=(3 if merge.pool > 1 else 2) * stage.tile,
        limits=Limits(max_length=length, max_positions=length),
        repetition=repetition(settings, generation, vocabulary),
        folders=folders,
        notes=tuple(notes),
    )


def _conversation(kind: str, tokens: Tokens) -> Conversation:
    """As the scripts of LLaVA choose it; each part is tokenised by itself there."""
    if kind == "qwen2":
        return Conversation(QWEN_1_5.prefix, QWEN_1_5.suffix)
    if kind == "mistral":
        return MISTRAL
    if tokens.has("<|start_header_id|>"):
        return LLAMA_3
    return Conversation(VICUNA_V1.prefix, VICUNA_V1.suffix)


def _parts(merge: _Merge, tokens: Tokens, text: Conversation) -> tuple[Part, ...]:
    bos = () if tokens.bos is None else (TokenIds((tokens.bos,)),)
    local = LocalRows(merge.newline) if merge.rows else LocalTiles(merge.mark)
    return (*bos, Text(text.before), GlobalView(), local, Question(text.after))


def _vision(
    checkpoint: Checkpoint,
    weights: Scoped,
    given: str | None,
    hidden: int,
    notes: list[str],
) -> tuple[VisionStage, tuple[Any, ...]]:
    """The vision stage, and the folders that everything is read from.

    A tower inside the checkpoint comes first: it is the trained one, or the same as elsewhere.
    """
    config = checkpoint.config
    name = config.text("mm_vision_tower").rstrip("/").rsplit("/", 1)[-1]
    inside = any(found.startswith(_TOWER) for found in weights.names())
    folders: tuple[Any, ...] = (checkpoint.path,)
    processor = checkpoint.side_file("preprocessor_config.json")
    if inside and given is None and name in _KNOWN:
        settings = Settings(_KNOWN[name], config.path)
    else:
        folder = find_tower(checkpoint, given)
        settings, folders = tower_settings(folder), (checkpoint.path, folder)
        processor = Settings.load_optional(folder / "preprocessor_config.json")
    own = inside and (given is None or config.flag("unfreeze_mm_vision_tower"))
    tensors = (
        tower_tensors(weights, _TOWER) if own else tower_tensors(open_tensors(folders[-1]), "")
    )
    normalising(processor)
    if not processor.values:
        notes.append("no preprocessor_config.json of the tower: its kind's values are used")
    tower, mean, std = _tower(checkpoint, settings, tensors)
    linears = tuple(name.rstrip(".") for name in _PROJECTORS[config.text("mm_projector_type")])
    names = Scoped(weights, _PROJECTOR)
    if linears == ("",):
        # One layer has no name of its own.
        both = {f"0.{part}": f"{_PROJECTOR}{part}" for part in ("weight", "bias")}
        linears, names = ("0",), Scoped(Renamed(weights, both), "")
    stage = VisionStage(
        tower=tower,
        projector=Projector(names, linears),
        width=tower.hidden,
        hidden=hidden,
        tile=max(tower.grid * tower.patch, settings.integer("image_size", 1, MAX_TILE, 224)),
        local_pool=1,
        mean=processor.triple("image_mean", mean),
        std=processor.triple("image_std", std),
        pooling="bilinear" if isinstance(tower, SiglipTower) else "mean",
        filter=resize_filter(processor),
    )
    return stage, folders


_Triple = tuple[float, float, float]


def _tower(
    checkpoint: Checkpoint, settings: Settings, tensors: Scoped
) -> tuple[ClipTower | SiglipTower, _Triple, _Triple]:
    """The tower, with mean and standard deviation of pixels. Raises ExportError."""
    config = checkpoint.config
    if settings.values.get("model_type") == "siglip_vision_model":
        # LLaVA's code drops the last layer and takes what the one before gives.
        last = Settings({"mm_vision_select_layer": -2}, config.path)
        tower = siglip_tower(settings, tensors, last, "mm_vision_select_layer")
        return tower, SIGLIP_MEAN, SIGLIP_STD
    side = _SIDES.get(config.values["architectures"][0])
    select = "mm_vision_select_layer"
    return clip_tower(settings, tensors, config, select, -2, side=side), CLIP_MEAN, CLIP_STD


FAMILY = Family("llava", tuple(_KINDS), "LLaVA's own checkpoints", read)

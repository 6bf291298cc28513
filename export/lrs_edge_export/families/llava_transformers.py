"""What transformers' LLaVA layouts share: tower, projector, names of tensors, and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import DecoderStage, Model, check_vocabulary
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.rows import first_rows
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import ClipTower, SiglipTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.hf_checkpoint import (
    LANGUAGE,
    Tokens,
    canonical_names,
    conversation,
    image_processor,
    longest,
    refuse_unread,
    require_tile,
    text_settings,
    tokens_of,
    vision_settings,
)
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
from lrs_edge_export.families.towers import (
    CLIP,
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP,
    SIGLIP_MEAN,
    SIGLIP_STD,
    clip_tower,
    resize_filter,
    siglip_tower,
)

#: Towers and projectors of versions 4 and 5.
VISION_RULES = (
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision."),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
)

#: Starts of the names that are read.
_READ = (*LANGUAGE, PRUNER, "vision.", "projector.")

#: The tower of LlavaConfig and LlavaNextConfig, where config.json describes none.
_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

#: Activations of a projector by the names that configs have.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}


#: The vision stage of a checkpoint, its weights, the image processor's settings, and the width D.
MakeVision = Callable[[Checkpoint, Scoped, Settings, int], VisionStage]

#: The family's conversation with a language model of some `model_type`, and its tokenizer.
MakeConversation = Callable[[str, Tokens], Conversation]


@dataclass(frozen=True)
class Layout:
    """How a family of transformers' LLaVA models shows an image.

    Attributes:
        rows: Local tokens stand in rows across all tiles, each with the newline at its end; False
            for tiles one after the other, each as one more image.
        base_tiles: Tiles along the base level's long side.
    """

    rows: bool
    base_tiles: int

    def parts(self, tokens: Tokens, text: Conversation) -> tuple[Part, ...]:
        """The prompt's layout."""
        local = LocalRows() if self.rows else LocalTiles(before="\n")
        return (*opening(tokens, text), GlobalView(), local, Question(text.after))


def opening(tokens: Tokens, text: Conversation) -> tuple[Part, ...]:
    """What stands before the image: the token before every text, and text."""
    first: tuple[Part, ...] = ()
    starts = text.before.startswith(tokens.special.get("bos_token") or "\0")
    if tokens.bos is not None and not starts:
        first = (TokenIds((tokens.bos,)),)
    return (*first, Text(text.before)) if text.before else first


def read_transformers(
    checkpoint: Checkpoint,
    vision_tower: str | None,
    *,
    family: str,
    kinds: tuple[str, ...],
    layout: Layout,
    vision: MakeVision,
    default: MakeConversation,
    rules: tuple[tuple[str, str], ...] = VISION_RULES,
    check: Callable[[Settings, int], None] = require_tile,
    tied: bool = False,
    own_template: bool = True,
) -> Model:
    """Read a checkpoint in the layout of transformers, one that has LLaVA's parts.

    Args:
        checkpoint: The folder.
        vision_tower: Must be None: the tower is inside.
        family: Name of the family.
        kinds: Language models that it has, by `model_type`, the default first.
        layout: How it shows an image.
        vision: Makes the vision stage.
        default: Makes the family's conversation.
        rules: For names of tensors of the tower and the projector, and of the language model where
            they are not LLaVA's.
        check: Refuses settings of an image processor that do not fit the tile's side.
        tied: Embeddings are tied where config.json says nothing.
        own_template: The checkpoint's chat template is used where it has one.

    Raises:
        ExportError: The checkpoint is not usable.
    """
    if vision_tower is not None:
        raise ExportError("--vision-tower does not apply: this checkpoint holds its own tower")
    notes: list[str] = []
    settings, length = longest(text_settings(checkpoint, kinds))
    kind = settings.text("model_type")
    generation = checkpoint.side_file("generation_config.json")
    weights = canonical_names(checkpoint, rules)
    refuse_unread(weights, _READ)
    decoder = decoder_config(settings, qkv_bias=kind == "qwen2" or settings.flag("attention_bias"))
    decoder = replace(decoder, qk_norm=kind == "qwen3")
    processor = image_processor(checkpoint)
    if not processor.values:
        notes.append("no preprocessor_config.json in the checkpoint: the family's values are used")
    stage = vision(checkpoint, weights, processor, decoder.hidden)
    check(processor, stage.tile)
    inner = Scoped(weights, "model.")
    vocabulary = settings.integer("vocab_size", 1, MAX_TOKENS)
    check_vocabulary(inner, vocabulary)
    tokens = tokens_of(checkpoint)
    text = default(kind, tokens)
    if own_template:
        text = conversation(checkpoint, tokens, text, notes)
    head = (weights, "lm_head.weight") if weights.has("lm_head.weight") else None
    if "tie_word_embeddings" in checkpoint.config.values:
        tied = checkpoint.config.flag("tie_word_embeddings")
    tied = tied or settings.flag("tie_word_embeddings")
    if head is None and not tied:
        weights.require({"lm_head.weight": (vocabulary, decoder.hidden)}, "vocabulary")
    newline = newline_vector(inner, decoder.hidden, needed=layout.rows)
    return Model(
        family=family,
        vision=stage,
        rfm=region_focus(checkpoint.config, decoder, weights),
        llm=DecoderStage(decoder, inner),
        embed_tokens=first_rows(inner, "embed_tokens.weight", vocabulary, decoder.hidden),
        # Where both are there, transformers ties nothing, whatever config.json says.
        lm_head=first_rows(*(head or (inner, "embed_tokens.weight")), vocabulary, decoder.hidden),
        image_newline=newline,
        vocabulary=vocabulary,
        tokenizer_json=tokens.file.text,
        prompt=PromptSpec(
            layout.parts(tokens, text),
            _stops(settings, generation, tokens, vocabulary),
            image_token=tokens.image,
        ),
        base_side=layout.base_tiles * stage.tile,
        limits=Limits(max_length=length, max_positions=length),
        repetition=repetition(settings, generation, vocabulary, prompt=True),
        folders=(checkpoint.path,),
        notes=tuple(notes),
    )


def clip_stage(
    checkpoint: Checkpoint, weights: Scoped, processor: Settings, hidden: int
) -> VisionStage:
    """A CLIP tower without its class token, or a SigLIP tower, and the projector.

    Raises:
        ExportError: The tower is of another kind, or config.json asks for its class token.
    """
    config = checkpoint.config
    settings = vision_settings(checkpoint, (CLIP, SIGLIP), _CLIP_L)
    siglip = settings.text("model_type") == SIGLIP
    strategy = "full" if siglip else "default"
    if config.text("vision_feature_select_strategy", "default") != strategy:
        why = (
            "has no class token" if siglip else "has a class token, which lies nowhere in the image"
        )
        raise config.wrong(
            "vision_feature_select_strategy", f"must be {strategy}: this tower {why}"
        )
    make = siglip_tower if siglip else clip_tower
    tower = make(settings, Scoped(weights, "vision."), config, "vision_feature_layer", -2)
    return tower_stage(tower, settings, config, weights, processor, hidden)


def tower_stage(
    tower: ClipTower | SiglipTower,
    settings: Settings,
    config: Settings,
    weights: Scoped,
    processor: Settings,
    hidden: int,
) -> VisionStage:
    """A tower, whose own config `settings` is, with the projector and the processor's colours.

    Raises:
        ExportError: Values of one of the three configs are not usable.
    """
    siglip = isinstance(tower, SiglipTower)
    return VisionStage(
        tower=tower,
        projector=projector(config, weights),
        width=tower.width,
        hidden=hidden,
        tile=settings.integer("image_size", 1, MAX_TILE, default=224),
        local_pool=1,
        mean=processor.triple("image_mean", SIGLIP_MEAN if siglip else CLIP_MEAN),
        std=processor.triple("image_std", SIGLIP_STD if siglip else CLIP_STD),
        pooling="bilinear" if siglip else "mean",
        filter=resize_filter(processor),
    )


def projector(config: Settings, weights: Scoped) -> Projector:
    """Two linear layers with an activation between them. Raises ExportError."""
    bias = config.values.get("multimodal_projector_bias")
    return Projector(
        Scoped(weights, "projector."),
        activation=projector_activation(config),
        bias=bias is not False,
    )


def projector_activation(config: Settings) -> str:
    """What stands between a projector's linear layers. Raises ExportError."""
    named = config.text("projector_hidden_act", "gelu")
    if named not in _ACTIVATIONS:
        raise config.wrong("projector_hidden_act", f"must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[named]


def _stops(
    settings: Settings, generation: Settings, tokens: Tokens, vocabulary: int
) -> tuple[int, ...]:
    """What ends an answer; the tokenizer's end of text where no config says."""
    if generation.integers("eos_token_id") or settings.integers("eos_token_id"):
        return stop_ids(settings, generation, vocabulary)
    if "eos_token" not in tokens.special:
        return stop_ids(settings, generation, vocabulary)
    return (tokens.file.id_of(tokens.special["eos_token"]),)

r"""Family `idefics3`: SmolVLM, SmolVLM2 and Idefics3: SigLIP, a pixel shuffle, and a LLaMA.

The model was trained on the image made four tiles long, cut into tiles that each stand behind a
mark with their row and column, row after row; then the whole image stretched to one tile:

    <|im_start|>User:<fake_token_around_image><row_1_col_1>[64 tokens]<fake_token_around_image>
    <row_1_col_2>[64]...\n<fake_token_around_image><row_2_col_1>[64]...\n
    \n<fake_token_around_image><global-img>[64]<fake_token_around_image>question<end_of_utterance>

A level of the search stands where its tiles stood, each kept tile behind its own mark; the global
view comes last. Tokenizers have marks for six rows and columns: of a level with more, a mark says
in which sixth of it the tile begins. Images are never enlarged: one smaller than four tiles has
fewer of them than in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lrs_edge.bundle.layout import GlobalView, LocalTiles, Part, Question, Text
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.hf_checkpoint import Tokens, image_processor
from lrs_edge_export.families.llava_transformers import Layout, opening, read_transformers
from lrs_edge_export.families.parts import MAX_TILE
from lrs_edge_export.families.templates import Conversation
from lrs_edge_export.families.towers import SIGLIP_MEAN, SIGLIP_STD, resize_filter, siglip_tower

_AROUND = "<fake_token_around_image>"
_VIEW = f"{_AROUND}<global-img>"
_TILE = _AROUND + "<row_{row}_col_{col}>"
#: Rows and columns that the processor has marks for.
_MOST = 6
#: Tiles along the long side of an image as the model was trained.
_TILES = 4

_RULES = (
    (r"model\.vision_model\.", "vision."),
    (r"model\.connector\.modality_projection\.", "projector."),
    (r"model\.text_model\.", "model."),
)

#: Kinds of tower, all the same: the first is SmolVLM's of transformers 4, which names the model.
_TOWERS = ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision", "siglip_vision_model")

#: Of Idefics3VisionConfig and SmolVLMVisionConfig.
_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}

#: Of earlier models of this code base.
_ONLY = {"qk_layer_norms": (False,), "use_resampler": (False,)}


@dataclass(frozen=True)
class _Marked(Layout):
    """Tiles behind marks, then the global view."""

    def parts(self, tokens: Tokens, text: Conversation) -> tuple[Part, ...]:
        """The prompt's layout."""
        return (
            *opening(tokens, text),
            # Between the last row's newline and the one before the global view is no other token:
            # tokenizers join them.
            LocalTiles(before=_TILE, row="\n", end="\n\n", most=_MOST),
            Text(_VIEW),
            GlobalView(),
            Question(_AROUND + text.after),
        )


def _conversation(_: str, tokens: Tokens) -> Conversation:
    start = "<|im_start|>" if tokens.has("<|im_start|>") else tokens.special.get("bos_token", "")
    return Conversation(f"{start}User:", "{question}<end_of_utterance>\nAssistant:")


def _tower_settings(checkpoint: Checkpoint) -> Settings:
    """The tower's config, and what its class takes where the file is silent."""
    config = checkpoint.config
    nested = config.section("vision_config") or Settings({}, config.path, "vision_config.")
    if nested.text("model_type", _TOWERS[0]) not in _TOWERS:
        raise nested.wrong("model_type", f"must be one of {', '.join(_TOWERS)}")
    given = {name: value for name, value in nested.values.items() if value is not None}
    return nested.replaced({**_VISION, **given, "model_type": "siglip_vision_model"})


def _vision(
    checkpoint: Checkpoint, weights: Scoped, processor: Settings, hidden: int
) -> VisionStage:
    config, settings = checkpoint.config, _tower_settings(checkpoint)
    require_values(config, {"vision_feature_layer": (-1,)})
    tower = siglip_tower(settings, Scoped(weights, "vision."), config, "vision_feature_layer", -1)
    return VisionStage(
        tower=replace(tower, final_norm=True, rounded=True),
        projector=Projector(
            Scoped(weights, "projector."),
            ("proj",),
            bias=False,
            shuffle=config.integer("scale_factor", 1, MAX_TILE, default=2),
        ),
        width=tower.hidden,
        hidden=hidden,
        tile=settings.integer("image_size", 1, MAX_TILE),
        local_pool=1,
        mean=processor.triple("image_mean", SIGLIP_MEAN),
        std=processor.triple("image_std", SIGLIP_STD),
        stretched=True,
        filter=resize_filter(processor, "lanczos"),
    )


def _check_processor(processor: Settings, tile: int) -> None:
    """Refuse an image processor that makes tiles of another size. Raises ExportError."""
    found = _longest(processor, "max_image_size", tile)
    if found != tile:
        raise processor.wrong("max_image_size", f"must be the vision tower's image size {tile}")


def _longest(processor: Settings, key: str, default: int) -> int:
    """A size's longest edge in pixels."""
    section = processor.section(key)
    if section is None:
        return default
    return section.integer("longest_edge", 1, 16 * MAX_TILE, default=default)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    text = checkpoint.config.section("text_config")
    if text is not None:
        require_values(text, _ONLY)
    processor = image_processor(checkpoint)
    tile = _tower_settings(checkpoint).integer("image_size", 1, MAX_TILE)
    tiles = _longest(processor, "size", _TILES * tile) // tile
    if not 1 <= tiles <= _MOST:
        raise processor.wrong("size", f"must be 1 to {_MOST} times max_image_size")
    return read_transformers(
        checkpoint,
        vision_tower,
        family="idefics3",
        kinds=("llama",),
        layout=_Marked(rows=False, base_tiles=tiles),
        vision=_vision,
        default=_conversation,
        rules=_RULES,
        check=_check_processor,
    )


FAMILY = Family(
    "idefics3",
    ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
    "SmolVLM and Idefics3",
    read,
)

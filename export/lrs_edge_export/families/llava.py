"""What both LLaVA families of the authors share: projector, vision tower, limits, prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrs_edge.bundle.layout import PromptSpec, rows_layout
from lrs_edge.bundle.manifest import Limits
from lrs_edge_export.bundle.tokenizer_json import TokenizerFile
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import DecoderStage, Model, check_vocabulary
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.rows import first_rows
from lrs_edge_export.checkpoints.tensors import Scoped, open_tensors
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.parts import (
    MAX_TILE,
    MAX_TOKENS,
    decoder_config,
    region_focus,
    repetition,
    stop_ids,
)
from lrs_edge_export.families.tower_files import find_tower, tower_settings, tower_tensors
from lrs_edge_export.families.towers import CLIP_MEAN, CLIP_STD, clip_tower, normalising

#: The base level is about three tiles of 336 px long (docs/algorithm.md, "Pyramid" 2).
_BASE_TILES = 3

#: Local tiles of 24 x 24 tokens become 12 x 12.
_LOCAL_POOL = 2

#: Ways to build the prompt and to cut images that other checkpoints of this code base have.
_ONLY: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": ("slice",),
    "mm_use_im_start_end": (False,),
    "s2": (False,),
    "concat_global_img_feature": (True,),
    "llm_use_last_text": (True,),
}

_PROJECTOR = "mlp2x_gelu_after_distillpruner"

#: Where the checkpoint keeps its own copy of the tower.
_OWN_TOWER = "model.vision_tower.vision_tower."


def is_of_authors(config: Settings) -> bool:
    """Whether a LLaVA checkpoint is one of the authors': others cut no image into slices."""
    return "slice_block_size" in config.values or config.values.get("mm_projector_type") == (
        _PROJECTOR
    )


@dataclass(frozen=True)
class Template:
    """A conversation template of LLaVA with one image at the start of the question."""

    prefix: str
    suffix: str
    bos: bool


def read_llava(
    checkpoint: Checkpoint,
    vision_tower: str | None,
    *,
    family: str,
    qkv_bias: bool,
    template: Template,
    tokenizer: TokenizerFile,
) -> Model:
    """Read a checkpoint of the authors.

    Args:
        checkpoint: The folder.
        vision_tower: Folder or hub name of the vision tower; None to follow config.json.
        family: Name of the family.
        qkv_bias: Whether the decoder's query, key and value projections have a bias.
        template: Of the conversation.
        tokenizer: Of the checkpoint.

    Raises:
        ExportError: The checkpoint is not usable.
    """
    config, generation = checkpoint.config, checkpoint.side_file("generation_config.json")
    if config.text("mm_projector_type") != _PROJECTOR:
        raise config.wrong("mm_projector_type", f"must be {_PROJECTOR}")
    if config.text("mm_spatial_pool_mode", "bilinear") != "bilinear":
        raise config.wrong("mm_spatial_pool_mode", "must be bilinear")
    require_values(config, _ONLY)
    _check_bos(checkpoint.side_file("tokenizer_config.json"), template)
    weights, tower = checkpoint.tensors(), find_tower(checkpoint, vision_tower)
    decoder = decoder_config(config, qkv_bias=qkv_bias)
    inner = Scoped(weights, "model.")
    check_vocabulary(inner, config.integer("vocab_size", 1, MAX_TOKENS))
    vocabulary = tokenizer.length
    tied = config.flag("tie_word_embeddings")
    head = (inner, "embed_tokens.weight") if tied else (weights, "lm_head.weight")
    inner.require({"image_newline": (decoder.hidden,)}, "newline vector")
    return Model(
        family=family,
        vision=_vision(config, weights, tower, decoder.hidden),
        rfm=region_focus(config, decoder, weights),
        llm=DecoderStage(decoder, inner),
        embed_tokens=first_rows(inner, "embed_tokens.weight", vocabulary, decoder.hidden),
        lm_head=first_rows(*head, vocabulary, decoder.hidden),
        image_newline=lambda: inner.read("image_newline"),
        vocabulary=vocabulary,
        tokenizer_json=tokenizer.text,
        prompt=PromptSpec(
            rows_layout(
                template.prefix,
                template.suffix,
                separator_id=tokenizer.id_of(":"),
                bos_id=config.integer("bos_token_id", 0, vocabulary - 1) if template.bos else None,
                question_newline=True,
            ),
            stop_ids(config, generation, vocabulary),
        ),
        base_side=_BASE_TILES * config.integer("slice_block_size", 1, MAX_TILE),
        limits=Limits(
            max_length=config.integer("tokenizer_model_max_length", 1, MAX_TOKENS),
            max_positions=config.integer("max_position_embeddings", 1, MAX_TOKENS),
        ),
        repetition=repetition(config, generation, vocabulary),
        folders=(checkpoint.path, tower),
    )


def _check_bos(settings: Settings, template: Template) -> None:
    """Refuse a tokenizer that begins or ends texts otherwise than the template says."""
    for key, wanted in (("add_bos_token", template.bos), ("add_eos_token", False)):
        value = settings.values.get(key)
        if value is not None and value is not wanted:
            raise settings.wrong(key, f"must be {str(wanted).lower()} or absent in this family")


def _vision(config: Settings, weights: Scoped, folder: Path, hidden: int) -> VisionStage:
    # As in the authors' loader, the checkpoint's own copy counts only if it was trained.
    if config.flag("unfreeze_mm_vision_tower"):
        tensors = tower_tensors(weights, _OWN_TOWER)
    else:
        tensors = tower_tensors(open_tensors(folder), "")
    if config.text("mm_vision_select_feature", "patch") != "patch":
        raise config.wrong("mm_vision_select_feature", "must be patch")
    tower = clip_tower(tower_settings(folder), tensors, config, "mm_vision_select_layer")
    tile = config.integer("slice_block_size", 1, MAX_TILE)
    if tower.grid * tower.patch != tile:
        raise config.wrong(
            "slice_block_size", f"must be the vision tower's image size {tower.grid * tower.patch}"
        )
    processor = normalising(Settings.load_optional(folder / "preprocessor_config.json"))
    return VisionStage(
        tower=tower,
        projector=Projector(Scoped(weights, "model.mm_projector.mlp_projector.")),
        width=tower.hidden,
        hidden=hidden,
        tile=tile,
        local_pool=_LOCAL_POOL,
        mean=processor.triple("image_mean", CLIP_MEAN),
        std=processor.triple("image_std", CLIP_STD),
        pooling="bilinear" if tower.grid % _LOCAL_POOL else "mean",
    )

"""Vision towers from the configs that describe them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import ClipTower, SiglipTower
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.parts import MAX_HEADS, MAX_LAYERS, MAX_TILE, MAX_WIDTH

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

#: Kinds of towers by their `model_type`.
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

#: The field that may list several hidden states.
SEVERAL = "vision_feature_layer"

#: Filters of an image processor, and Pillow's numbers for them.
Filter = Literal["bilinear", "bicubic", "lanczos"]
_FILTERS: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}

#: Names of activations in configs, and in towers.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class _Sizes:
    """What CLIP's and SigLIP's configs have in common."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch: int
    side: int
    eps: float
    activation: str


def clip_tower(
    settings: Settings,
    tensors: Scoped,
    config: Settings,
    select: str,
    layer: int | None = None,
    *,
    side: int | None = None,
) -> ClipTower:
    """A CLIP tower, cut after the hidden state that the checkpoint's config selects.

    Args:
        settings: Of the tower.
        tensors: Source scoped to it.
        config: Of the checkpoint.
        select: Name of the field that selects a hidden state.
        layer: What it is where the field is absent; None where it may not be.
        side: Image size that positions are resized to where the table was made for another;
            None for the tower's own.

    Raises:
        ExportError: Values are absent, out of bounds or not CLIP's.
    """
    if settings.text("model_type", CLIP) != CLIP:
        raise settings.wrong("model_type", f"must be {CLIP}: no other tower is supported here")
    # Defaults are those of CLIPVisionConfig, which leaves out of config.json what equals them.
    sizes = _sizes(settings, eps=1e-5, patch=32, activation="quick_gelu")
    layers, states = _run(sizes.layers, config, select, layer)
    whole = sizes.side if side is None else side
    # Pixels beyond the last whole patch are not looked at.
    grid = whole // sizes.patch
    return ClipTower(
        tensors=tensors,
        layers=layers,
        states=states,
        hidden=sizes.hidden,
        heads=sizes.heads,
        intermediate=sizes.intermediate,
        patch=sizes.patch,
        grid=grid,
        eps=sizes.eps,
        activation=sizes.activation,
        table_grid=0 if side is None else _table_grid(tensors, grid),
        align_corners=side is not None,
    )


def _table_grid(tensors: Scoped, grid: int) -> int:
    """Patches along a side that a table of positions was made for; 0 for the grid's own."""
    name = "embeddings.position_embedding.weight"
    rows = tensors.shape(name)[0] - 1 if tensors.has(name) else grid**2
    found = math.isqrt(max(rows, 0))
    return 0 if rows == grid**2 or found**2 != rows else found


def siglip_tower(
    settings: Settings,
    tensors: Scoped,
    config: Settings,
    select: str,
    layer: int | None = None,
) -> SiglipTower:
    """A SigLIP tower without its pooling head, cut as `clip_tower`; see there.

    Raises:
        ExportError: Values are absent, out of bounds or not SigLIP's.
    """
    if settings.text("model_type", SIGLIP) != SIGLIP:
        raise settings.wrong("model_type", f"must be {SIGLIP}: no other tower is supported here")
    # Defaults are those of SiglipVisionConfig.
    sizes = _sizes(settings, eps=1e-6, patch=16, activation="gelu_pytorch_tanh")
    layers, states = _run(sizes.layers, config, select, layer)
    return SiglipTower(
        tensors=tensors,
        layers=layers,
        states=states,
        hidden=sizes.hidden,
        heads=sizes.heads,
        intermediate=sizes.intermediate,
        patch=sizes.patch,
        # Pixels beyond the last whole patch are not looked at.
        grid=sizes.side // sizes.patch,
        eps=sizes.eps,
        activation=sizes.activation,
    )


def _sizes(settings: Settings, *, eps: float, patch: int, activation: str) -> _Sizes:
    """Read what both configs have, with their class's defaults. Raises ExportError."""
    hidden = settings.integer("hidden_size", 1, MAX_WIDTH, default=768)
    heads = settings.integer("num_attention_heads", 1, MAX_HEADS, default=12)
    found = settings.integer("patch_size", 1, MAX_TILE, default=patch)
    if hidden % heads:
        raise ExportError(f"{settings.path}: heads do not divide the width of the vision tower")
    if settings.integer("num_channels", 1, 16, default=3) != 3:
        raise settings.wrong("num_channels", "must be 3")
    named = settings.text("hidden_act", activation)
    if named not in ACTIVATIONS:
        raise settings.wrong("hidden_act", f"must be one of {', '.join(ACTIVATIONS)}")
    return _Sizes(
        layers=settings.integer("num_hidden_layers", 1, MAX_LAYERS, default=12),
        hidden=hidden,
        heads=heads,
        intermediate=settings.integer("intermediate_size", 1, MAX_WIDTH, default=3072),
        patch=found,
        side=settings.integer("image_size", found, MAX_TILE, default=max(224, found)),
        eps=settings.number("layer_norm_eps", 0.0, 1.0, default=eps),
        activation=ACTIVATIONS[named],
    )


def _run(
    count: int, config: Settings, select: str, layer: int | None
) -> tuple[int, tuple[int, ...]]:
    """Layers that are run up to the selected hidden state, or up to the last of several.

    Args:
        count: Layers that there are.
        config: Of the checkpoint.
        select: Name of the field that selects.
        layer: What it is where the field is absent; None where it may not be.

    Returns:
        `layers` and `states` of a tower.

    Raises:
        ExportError: There is no such state.
    """
    given = config.values.get(select)
    # LLaVA's own code, whose field has another name, knows one.
    if not isinstance(given, list) or select != SEVERAL:
        chosen = config.integer(select, -count - 1, count, default=layer)
        return _state(chosen, count), ()
    listed = config.integers(select)
    if not listed or not all(-count - 1 <= chosen <= count for chosen in listed):
        raise config.wrong(select, f"must list hidden states of {-count - 1}..{count}")
    states = tuple(_state(chosen, count) for chosen in listed)
    return max(states), states


def _state(chosen: int, count: int) -> int:
    """A hidden state's number: there is one more than layers, for the embeddings come first."""
    return chosen if chosen >= 0 else count + 1 + chosen


def resize_filter(processor: Settings, default: Filter = "bicubic") -> Filter:
    """The filter by which an image processor resizes, by Pillow's number for it.

    Raises:
        ExportError: It is another than those that `--resampling processor` has.
    """
    found = processor.values.get("resample")
    if found is None:
        return default
    if isinstance(found, bool) or found not in _FILTERS:
        raise processor.wrong("resample", "must be 1 (lanczos), 2 (bilinear) or 3 (bicubic)")
    return _FILTERS[found]


def normalising(processor: Settings) -> Settings:
    """An image processor's settings, if it normalises pixels of 0..1. Raises ExportError."""
    require_values(processor, {"do_normalize": (True,), "do_rescale": (True,)})
    if abs(processor.number("rescale_factor", 0.0, 1.0, default=1 / 255) - 1 / 255) > 1e-6:
        raise processor.wrong("rescale_factor", "must be 1/255")
    return processor

"""Vision towers from the configs that describe them."""

from __future__ import annotations

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import ClipTower
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.parts import MAX_HEADS, MAX_LAYERS, MAX_TILE, MAX_WIDTH

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def clip_tower(
    settings: Settings,
    tensors: Scoped,
    config: Settings,
    select: str,
    layer: int | None = None,
) -> ClipTower:
    """A CLIP tower, cut after the hidden state that the checkpoint's config selects.

    Args:
        settings: Of the tower.
        tensors: Source scoped to it.
        config: Of the checkpoint.
        select: Name of the field that selects a hidden state.
        layer: What it is where the field is absent; None where it may not be.

    Raises:
        ExportError: Values are absent, out of bounds or not CLIP's.
    """
    if settings.text("model_type", "clip_vision_model") != "clip_vision_model":
        raise settings.wrong("model_type", "must be clip_vision_model: no other tower is supported")
    # Defaults are those of CLIPVisionConfig, which leaves out of config.json what equals them.
    layers = settings.integer("num_hidden_layers", 1, MAX_LAYERS, default=12)
    hidden = settings.integer("hidden_size", 1, MAX_WIDTH, default=768)
    heads = settings.integer("num_attention_heads", 1, MAX_HEADS, default=12)
    patch = settings.integer("patch_size", 1, MAX_TILE, default=32)
    side = settings.integer("image_size", 1, MAX_TILE, default=224)
    if hidden % heads or side % patch:
        raise ExportError(f"{settings.path}: heads or patches do not divide their sizes")
    if settings.integer("num_channels", 1, 16, default=3) != 3:
        raise settings.wrong("num_channels", "must be 3")
    chosen = config.integer(select, -layers - 1, layers, default=layer)
    activation = settings.text("hidden_act", "quick_gelu")
    if activation not in _ACTIVATIONS:
        raise settings.wrong("hidden_act", f"must be one of {', '.join(_ACTIVATIONS)}")
    return ClipTower(
        tensors=tensors,
        # hidden_states holds one entry more than there are layers: the embeddings come first.
        layers=chosen if chosen >= 0 else layers + 1 + chosen,
        hidden=hidden,
        heads=heads,
        intermediate=settings.integer("intermediate_size", 1, MAX_WIDTH, default=3072),
        patch=patch,
        grid=side // patch,
        eps=settings.number("layer_norm_eps", 0.0, 1.0, default=1e-5),
        activation=_ACTIVATIONS[activation],
    )


def normalising(processor: Settings) -> Settings:
    """An image processor's settings, if it normalises pixels of 0..1. Raises ExportError."""
    require_values(processor, {"do_normalize": (True,), "do_rescale": (True,)})
    if abs(processor.number("rescale_factor", 0.0, 1.0, default=1 / 255) - 1 / 255) > 1e-6:
        raise processor.wrong("rescale_factor", "must be 1/255")
    return processor

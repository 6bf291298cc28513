"""Sizes of a vision encoder by its part of config.json: weights of tower and projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lrs_edge.bundle.memory_sizes import VisionSize
from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.families.parts import MAX_HEADS, MAX_LAYERS, MAX_TILE, MAX_WIDTH

#: Side of a tile in pixels for towers that take images of any size.
ANY_SIZE_TILE = 448

#: Width, width of the MLP, layers, heads, image and patch where config.json leaves them out: the
#: defaults of transformers' classes.
DEFAULTS: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "clip_vision_model": (768, 3072, 12, 12, 224, 32),
    "siglip_vision_model": (768, 3072, 12, 12, 224, 16),
    "idefics3_vision": (1152, 3072, 12, 16, 224, 32),
    "internvl_vision": (1024, 4096, 24, 16, 448, 14),
    "qwen2_vl": (1280, 5120, 32, 16, ANY_SIZE_TILE, 14),
    "qwen2_5_vl": (3584, 3420, 32, 16, ANY_SIZE_TILE, 14),
    "qwen3_vl": (1152, 4304, 27, 16, ANY_SIZE_TILE, 16),
}

#: Other names of the same towers.
_ALIASES = {
    "idefics3": "idefics3_vision",
    "smolvlm_vision": "idefics3_vision",
    "intern_vit_6b": "internvl_vision",
    "qwen2_vl_vision": "qwen2_vl",
    "qwen2_5_vl_vision": "qwen2_5_vl",
    "qwen3_vl_vision": "qwen3_vl",
}

#: What LLaVA's own layout names, and config.json says nothing more of.
NAMED: Mapping[str, dict[str, Any]] = {
    name: {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": 16, "image_size": side,
        "patch_size": 14,
    }
    for name, kind, hidden, wide, layers, side in (
        ("clip-vit-large-patch14", "clip_vision_model", 1024, 4096, 24, 224),
        ("clip-vit-large-patch14-336", "clip_vision_model", 1024, 4096, 24, 336),
        ("siglip-so400m-patch14-384", "siglip_vision_model", 1152, 4304, 27, 384),
    )
}  # fmt: skip

#: Patches that become one token along each side, and frames of a patch, of Qwen's towers.
_MERGE, _FRAMES = 2, 2


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision transformer.

    Attributes:
        kind: One of `DEFAULTS`.
        hidden: Width.
        intermediate: Width of the MLP.
        layers: Of all.
        heads: Attention heads.
        side: Of a tile in pixels.
        patch: Of a patch in pixels.
        rows: Entries of a table of positions that config.json states, else 0.
        deepstack: Layers that give tokens of their own.
        biased: Whether query, key and value have biases.
    """

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    side: int
    patch: int
    rows: int = 0
    deepstack: int = 0
    biased: bool = True

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.side // self.patch) ** 2

    @property
    def qwen(self) -> bool:
        """Whether it is one of Qwen's, which take images of any size."""
        return self.kind.startswith("qwen")

    def matrices(self, layers: int) -> int:
        """Weights of the matrix products of so many layers."""
        products = 3 if self.kind == "qwen2_5_vl" else 2
        return layers * self.hidden * (4 * self.hidden + products * self.intermediate)

    def others(self, layers: int) -> int:
        """All other weights: patches, positions, norms, biases."""
        hidden, patch = self.hidden, 3 * self.patch**2 * self.hidden
        norms = 2 * hidden if self.kind == "qwen2_5_vl" else 4 * hidden
        wide = 2 if self.kind == "qwen2_5_vl" else 1
        layer = norms + (5 if self.biased else 2) * hidden + wide * self.intermediate
        if self.kind == "internvl_vision":
            layer += 2 * hidden  # Both branches are scaled.
        found = layers * layer + patch * (_FRAMES if self.qwen else 1)
        if self.kind not in ("clip_vision_model", "qwen2_vl", "qwen2_5_vl"):
            found += hidden  # Bias of the patches.
        classed = self.kind in ("clip_vision_model", "internvl_vision")
        rows = self.rows or (0 if self.qwen else self.patches + classed)
        found += (rows + classed) * hidden
        # CLIP has a norm before its layers, Idefics3 one after them.
        return found + 2 * hidden * (self.kind in ("clip_vision_model", "idefics3_vision"))


def read_tower(config: Settings) -> Tower:
    """A tower's part of config.json. Raises ExportError where a value is out of bounds."""
    kind = config.text("model_type", "")
    kind = _ALIASES.get(kind, kind)
    if kind not in DEFAULTS:
        raise config.wrong("model_type", f"must be one of {', '.join(DEFAULTS)}")
    hidden, wide, layers, heads, side, patch = DEFAULTS[kind]
    qwen = kind.startswith("qwen")
    hidden = config.integer(
        "embed_dim" if kind == "qwen2_vl" else "hidden_size", 1, MAX_WIDTH, default=hidden
    )
    if kind == "qwen2_vl":
        wide = int(hidden * config.number("mlp_ratio", 0.1, 64, default=4))
    else:
        wide = config.integer("intermediate_size", 1, MAX_WIDTH, default=wide)
    deepstack = config.values.get("deepstack_visual_indexes", [8, 16, 24])
    return Tower(
        kind=kind,
        hidden=hidden,
        intermediate=wide,
        layers=config.integer(
            "depth" if qwen else "num_hidden_layers", 1, MAX_LAYERS, default=layers
        ),
        heads=config.integer(
            "num_heads" if qwen else "num_attention_heads", 1, MAX_HEADS, default=heads
        ),
        side=side if qwen else _side(config, "image_size", side),
        patch=_side(config, "patch_size", patch),
        rows=config.integer("num_position_embeddings", 1, 1 << 20, default=2304)
        if kind == "qwen3_vl"
        else 0,
        biased=kind != "internvl_vision" or _biased(config),
        deepstack=len(deepstack) if kind == "qwen3_vl" and isinstance(deepstack, list) else 0,
    )


def _biased(config: Settings) -> bool:
    """Of InternVL's layers, under the names that its config had; as released, they have biases."""
    if "attention_bias" in config.values:
        return config.flag("attention_bias")
    released = config.text("model_type", "") == "intern_vit_6b"
    return config.flag("qkv_bias") if "qkv_bias" in config.values else released


def _side(config: Settings, key: str, default: int) -> int:
    """A side in pixels, which some configs give twice."""
    value = config.values.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        config = Settings({key: value[0]}, config.path)
    return config.integer(key, 1, MAX_TILE, default=default)


def mlp(tower: Tower, out: int, *, run: int, pool: int, states: int = 1) -> VisionSize:
    """LLaVA's projector: two layers with biases.

    Args:
        tower: The tower.
        out: Width of a token.
        run: Layers of the tower that are run.
        pool: Tokens along a side that become one in a local tile.
        states: Hidden states that lie side by side in what it takes.
    """
    wide = states * tower.hidden
    found = _encoder(tower, run, wide * out + out * out, 2 * out, tower.patches)
    return replace(found, local=(-(-tower.side // (tower.patch * pool))) ** 2)


def shuffled(tower: Tower, out: int, scale: int) -> VisionSize:
    """Idefics3's: patches of `scale` x `scale` side by side, and one matrix without bias."""
    product = tower.hidden * scale**2 * out
    return _encoder(tower, tower.layers, product, 0, tower.patches // scale**2)


def shuffled_mlp(tower: Tower, out: int, scale: int) -> VisionSize:
    """InternVL's: patches of `scale` x `scale` side by side, a norm and two layers."""
    wide = tower.hidden * scale**2
    others = 2 * wide + 2 * out
    return _encoder(tower, tower.layers, wide * out + out * out, others, tower.patches // scale**2)


def merged(tower: Tower, out: int) -> VisionSize:
    """Qwen's mergers: a norm and two layers over 2 x 2 patches; one more for each deepstack."""
    wide = tower.hidden * _MERGE**2
    product, biases = wide * wide + wide * out, wide + out
    norm = tower.hidden * (1 if tower.kind == "qwen2_5_vl" else 2)
    others = norm + biases + tower.deepstack * (2 * wide + biases)
    given = tower.patches // _MERGE**2
    return _encoder(tower, tower.layers, product * (1 + tower.deepstack), others, given)


def _encoder(tower: Tower, run: int, matrices: int, others: int, given: int) -> VisionSize:
    return VisionSize(
        patches=tower.patches,
        hidden=tower.hidden,
        heads=tower.heads,
        intermediate=tower.intermediate,
        matrices=tower.matrices(run) + matrices,
        others=tower.others(run) + others,
        tokens=given,
    )

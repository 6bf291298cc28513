"""Sizes of a model by its config.json alone: what decides how much memory it takes.

Reads all layouts that recipes are for, whether `registry` takes them yet or not, and no weights. A
field that config.json leaves out has the default of transformers' class for the same `model_type`
(`tests/test_sizes.py` compares them, and the numbers of weights that come out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lrs_edge.bundle.memory_sizes import DecoderSize, ModelSize, VisionSize
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.families.parts import MAX_HEADS, MAX_LAYERS, MAX_TOKENS, MAX_WIDTH
from lrs_edge_export.families.tower_sizes import (
    NAMED,
    Tower,
    merged,
    mlp,
    read_tower,
    shuffled,
    shuffled_mlp,
)

#: Where config.json allows more, a question is still hardly ever longer.
_LONGEST = 8192

#: Width, width of the MLP, layers, heads, key/value heads and vocabulary of a decoder where
#: config.json leaves them out: the defaults of transformers' classes.
DECODERS: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "llama": (4096, 11008, 32, 32, 32, 32000),
    "mistral": (4096, 14336, 32, 32, 8, 32000),
    "qwen2": (4096, 22016, 32, 32, 32, 151936),
    "qwen2_vl": (8192, 29568, 80, 64, 8, 152064),
    "qwen2_5_vl": (8192, 29568, 80, 64, 8, 152064),
    "qwen3": (4096, 22016, 32, 32, 32, 151936),
    "qwen3_vl": (4096, 22016, 32, 32, 32, 151936),
}

#: Other names of the same decoders.
_ALIASES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "qwen2_vl_text": "qwen2_vl",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_vl_text": "qwen3_vl",
}

#: Width of a head where it does not follow from the others.
_HEAD_DIM = {"qwen3": 128, "qwen3_vl": 128}

#: The projector of checkpoints that have a region focus module of their own.
_WITH_RFM = "mlp2x_gelu_after_distillpruner"


def read_sizes(config: Settings, name: str) -> ModelSize:
    """Sizes of a checkpoint.

    Args:
        config: Its config.json.
        name: What it is called.

    Raises:
        ExportError: The architecture is not known here, or a value is out of bounds.
    """
    architectures = config.values.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(found, str) or found not in _READERS:
        raise ExportError(
            f"{config.path}: the sizes of architecture {str(found)[:80]!r} are not known from its "
            f"config alone; known are {', '.join(_READERS)}"
        )
    return _READERS[found](config, name)


def _model(
    config: Settings,
    text: Settings,
    vision: Callable[[int], VisionSize],
    name: str,
) -> ModelSize:
    decoder, vocabulary = _decoder(text)
    longest = config.integer("tokenizer_model_max_length", 1, MAX_TOKENS, default=_LONGEST)
    positions = text.integer("max_position_embeddings", 1, MAX_TOKENS, default=_LONGEST)
    return ModelSize(
        name=name,
        vision=vision(decoder.hidden),
        llm=decoder,
        vocabulary=vocabulary,
        context=min(longest, positions),
        # Whatever the layout, `distill` says so; the authors' code names no layers without one.
        own_rfm=len(config.integers("llm_layer_list")),
        tied=text.flag("tie_word_embeddings") or config.flag("tie_word_embeddings"),
    )


def _decoder(config: Settings) -> tuple[DecoderSize, int]:
    """The language model, and its vocabulary."""
    kind = config.text("model_type", "llama")
    kind = _ALIASES.get(kind, kind)
    if kind not in DECODERS:
        raise config.wrong("model_type", f"must be one of {', '.join(DECODERS)}")
    hidden, wide, layers, heads, kv_heads, vocabulary = DECODERS[kind]
    hidden = config.integer("hidden_size", 1, MAX_WIDTH, default=hidden)
    heads = config.integer("num_attention_heads", 1, MAX_HEADS, default=heads)
    # LLaMA's class takes as many as there are heads.
    kv_heads = min(kv_heads, heads) if kind != "llama" else heads
    head_dim = _HEAD_DIM.get(kind, max(hidden // heads, 1))
    decoder = DecoderSize(
        layers=config.integer("num_hidden_layers", 1, MAX_LAYERS, default=layers),
        hidden=hidden,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", 1, heads, default=kv_heads),
        head_dim=config.integer("head_dim", 1, MAX_WIDTH, default=head_dim),
        intermediate=config.integer("intermediate_size", 1, MAX_WIDTH, default=wide),
    )
    return decoder, config.integer("vocab_size", 1, MAX_TOKENS, default=vocabulary)


def _llava(config: Settings, name: str) -> ModelSize:
    """Transformers' LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""
    onevision = "Onevision" in config.values["architectures"][0]
    tower = read_tower(_part(config, "vision_config"))
    selected = config.integers("vision_feature_layer") or (-1 if onevision else -2,)
    text = _part(config, "text_config", "qwen2" if onevision else "llama")
    vision = _projected(tower, selected, pool=2 if onevision else 1)
    return _model(config, text, vision, name)


def _original_llava(config: Settings, name: str) -> ModelSize:
    """LLaVA's own layout, which names its tower, and that of the authors, with an RFM."""
    named = config.text("mm_vision_tower").rstrip("/").rsplit("/", 1)[-1].lower()
    if named not in NAMED:
        raise config.wrong("mm_vision_tower", f"must be one of {', '.join(NAMED)} to be reckoned")
    tower = read_tower(Settings(NAMED[named], config.path))
    selected = (config.integer("mm_vision_select_layer", -99, 99, default=-2),)
    authors = config.text("mm_projector_type", "") == _WITH_RFM
    # OneVision's tower: its odd grid is pooled.
    pool = 2 if authors or tower.kind == "siglip_vision_model" else 1
    vision = _projected(tower, selected, pool=pool)
    return _model(config, config, vision, name)


def _projected(
    tower: Tower, selected: tuple[int, ...], *, pool: int
) -> Callable[[int], VisionSize]:
    """The part of a tower up to the last of some hidden states, and LLaVA's projector of them."""
    run = max(state if state >= 0 else tower.layers + 1 + state for state in selected)
    run = max(1, min(run, tower.layers))
    return lambda out: mlp(tower, out, run=run, pool=pool, states=len(selected))


def _idefics3(config: Settings, name: str) -> ModelSize:
    """Idefics3 and SmolVLM."""
    kind = "smolvlm_vision" if "SmolVLM" in config.values["architectures"][0] else "idefics3"
    tower = read_tower(_part(config, "vision_config", kind))
    scale = config.integer("scale_factor", 1, 64, default=2)
    text = _part(config, "text_config", "llama")
    return _model(config, text, lambda out: shuffled(tower, out, scale), name)


def _internvl(config: Settings, name: str) -> ModelSize:
    """InternVL3, of transformers and as it was released."""
    tower = read_tower(_part(config, "vision_config", "internvl_vision"))
    scale = round(1 / config.number("downsample_ratio", 0.01, 1, default=0.5))
    key = "llm_config" if "llm_config" in config.values else "text_config"
    text = _part(config, key, "qwen2")
    return _model(config, text, lambda out: shuffled_mlp(tower, out, scale), name)


def _qwen(config: Settings, name: str) -> ModelSize:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as transformers 4 and 5 write them."""
    kind = config.text("model_type")
    tower = read_tower(_part(config, "vision_config", kind))
    text = _part(config, "text_config", kind) if "text_config" in config.values else config
    return _model(config, text, lambda out: merged(tower, out), name)


def _part(config: Settings, key: str, kind: str | None = None) -> Settings:
    """One part of config.json, with the `model_type` that it has where it states none."""
    found = config.section(key)
    values: dict[str, Any] = {} if found is None else dict(found.values)
    if kind is not None:
        values["model_type"] = values.get("model_type") or kind
    return Settings(values, config.path, f"{key}.")


_READERS: Mapping[str, Callable[[Settings, str], ModelSize]] = {
    **dict.fromkeys(
        (
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
        ),
        _llava,
    ),
    **dict.fromkeys(
        (
            "LlavaLlamaForCausalLM",
            "LlavaMistralForCausalLM",
            "LlavaQwenForCausalLM",
            "GeoChatLlamaForCausalLM",
        ),
        _original_llava,
    ),
    **dict.fromkeys(
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), _idefics3
    ),
    **dict.fromkeys(("InternVLForConditionalGeneration", "InternVLChatModel"), _internvl),
    **dict.fromkeys(
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
        ),
        _qwen,
    ),
}

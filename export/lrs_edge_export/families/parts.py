"""What all readers share: bounds of a config's values, the decoder's sizes, what ends an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage, Repetition
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.families.decoder_fields import (
    require_plain_decoder,
    require_plain_generation,
    rope_scaling,
    rope_theta,
)

#: Bounds that no model of this kind exceeds; what lies outside is a damaged or hostile config.
MAX_LAYERS = 256
MAX_WIDTH = 1 << 17
MAX_HEADS = 1024
MAX_TOKENS = 1 << 20
MAX_TILE = 4096

#: Starts of the names of a trained region focus module, in every layout.
PRUNER = "model.mm_projector.token_pruner."


def decoder_config(config: Settings, *, qkv_bias: bool) -> DecoderConfig:
    """Sizes of the language model from config.json.

    Raises:
        ExportError: Values are absent, out of bounds or do not fit together.
    """
    hidden = config.integer("hidden_size", 1, MAX_WIDTH)
    heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = config.integer("num_key_value_heads", 1, heads, default=heads)
    head_dim = config.integer("head_dim", 1, MAX_WIDTH, default=max(hidden // heads, 1))
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"must divide the {heads} attention heads")
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.wrong("num_attention_heads", f"must divide hidden_size {hidden}")
    if head_dim % 2:
        raise config.wrong("head_dim", f"must be even for RoPE, heads here have {head_dim}")
    for name in ("hidden_act", "hidden_activation"):
        if config.text(name, "silu") not in ("silu", "swish"):
            raise config.wrong(name, "must be silu")
    require_plain_decoder(config)
    return DecoderConfig(
        layers=config.integer("num_hidden_layers", 1, MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.integer("intermediate_size", 1, MAX_WIDTH),
        eps=config.number("rms_norm_eps", 0.0, 1.0),
        theta=rope_theta(config),
        scaling=rope_scaling(config),
        qkv_bias=qkv_bias,
        # One field for all four projections of these two classes; others have none for the last.
        out_bias=config.text("model_type", "") in ("llama", "qwen3")
        and config.flag("attention_bias"),
    )


def region_focus(config: Settings, llm: DecoderConfig, weights: Scoped) -> DecoderStage | None:
    """The trained RFM of a checkpoint: as many full layers as `llm_layer_list` is long.

    Returns:
        None where the checkpoint has none (no tensors of a `token_pruner`).

    Raises:
        ExportError: Its layers are not the listed ones.
    """
    if not any(name.startswith(PRUNER) for name in weights.names()):
        return None
    listed = len(config.integers("llm_layer_list"))
    if not 1 <= listed <= MAX_LAYERS:
        raise config.wrong("llm_layer_list", f"must list 1..{MAX_LAYERS} layers")
    return DecoderStage(replace(llm, layers=listed), Scoped(weights, PRUNER), scoring=True)


def newline_vector(weights: Scoped, hidden: int, *, needed: bool) -> Callable[[], Array]:
    """What reads the newline vector, float32 [D]; zeros where a layout has no newlines.

    Args:
        weights: Scoped to the language model.
        hidden: Width D.
        needed: Whether rows end with newlines.

    Raises:
        ExportError: It is missing, or of another width.
    """
    if not needed:
        return lambda: np.zeros(hidden, np.float32)
    weights.require({"image_newline": (hidden,)}, "newline vector")
    return lambda: weights.read("image_newline")


def stop_ids(config: Settings, generation: Settings, vocabulary: int) -> tuple[int, ...]:
    """Tokens that end an answer: of generation_config.json, else of config.json, each once.

    Raises:
        ExportError: There are none, or they are not tokens.
    """
    found = generation.integers("eos_token_id") or config.integers("eos_token_id")
    unique = tuple(dict.fromkeys(found))
    if not unique or not all(0 <= token < vocabulary for token in unique):
        raise config.wrong("eos_token_id", f"must name tokens of 0..{vocabulary - 1}")
    return unique


def repetition(
    config: Settings, generation: Settings, vocabulary: int, *, prompt: bool = False
) -> Repetition:
    """Of generation_config.json; no penalty where it names none. Raises ExportError.

    Args:
        config: Of the language model.
        generation: The file.
        vocabulary: Tokens that there are.
        prompt: The prompt is given to transformers as ids, so that the penalty counts its tokens.
            Prompts given as embeddings make transformers 4.37 start its list of ids with BOS, which
            is then penalised from the first token on.
    """
    require_plain_generation(generation)
    penalty = generation.number("repetition_penalty", 0.01, 100.0, default=1.0)
    if prompt:
        return Repetition(penalty, (), prompt=penalty != 1.0)
    source = generation if generation.integers("bos_token_id") else config
    starts = [token for token in source.integers("bos_token_id")[:1] if 0 <= token < vocabulary]
    return Repetition(penalty, tuple(starts) if penalty != 1.0 else ())

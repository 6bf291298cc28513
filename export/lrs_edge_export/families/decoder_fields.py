"""Fields of a checkpoint's config that change what a decoder computes: RoPE's, and the others.

A field is read, or has the one value that is implemented, or the checkpoint is refused with the
field and the file: a default in place of a field that was renamed gives a model that is silently
another. Names are those of transformers 4 and 5.
"""

from __future__ import annotations

import math
from typing import Any

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.checkpoints.rope import RopeScaling

#: RoPE bases seen in practice lie between 1e4 and 1e8.
_THETA_BOUNDS = (2.0, 1e12)

#: What LlamaConfig and Qwen2Config of every transformers take where nothing is given.
_DEFAULT_THETA = 10000.0

#: Names of the field that says which kind of RoPE there is, old and new.
_KINDS = ("rope_type", "type")
_FULL = "full_attention"

#: Kinds of RoPE, and what each has besides its base.
_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}

#: Fields that must be absent, null, or one of these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rotary_dim": (),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "mrope_section": (),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "mlp_bias": (False,),
    "attention_out_bias": (False,),
    "num_local_experts": (),
    "num_experts": (),
    "quantization_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "alibi": (False,),
}


def rope_theta(config: Settings) -> float:
    """Base of RoPE's frequencies.

    transformers 5 writes `rope_parameters`, an object with `rope_type` and `rope_theta`, or one
    such object for each type of layer; before, there were `rope_theta` and `rope_scaling`.

    Raises:
        ExportError: The fields contradict each other.
    """
    found: dict[str, float] = {}
    if config.values.get("rope_theta") is not None:
        found["rope_theta"] = config.number("rope_theta", *_THETA_BOUNDS)
    for name, rope in _ropes(config):
        if rope.values.get("rope_theta") is not None:
            found[name] = rope.number("rope_theta", *_THETA_BOUNDS)
    if len(set(found.values())) > 1:
        fields = ", ".join(f"{name} {theta:g}" for name, theta in found.items())
        raise ExportError(f"{config.path}: {fields} give RoPE several bases; correct the file")
    return next(iter(found.values()), _DEFAULT_THETA)


def rope_scaling(config: Settings) -> RopeScaling | None:
    """What changes RoPE's frequencies; None for nothing.

    Kind `dynamic` changes nothing up to `max_position_embeddings`, which no sequence here is longer
    than.

    Raises:
        ExportError: RoPE is of a kind that is not implemented, or the fields contradict each other.
    """
    found = [_one_scaling(rope, name, config) for name, rope in _ropes(config)]
    if len(found) == 2 and found[0] != found[1]:
        raise ExportError(
            f"{config.path}: rope_parameters and rope_scaling differ; correct the file"
        )
    return found[0] if found else None


def _ropes(config: Settings) -> list[tuple[str, Settings]]:
    """The objects of parameters that there are, new and old, by their names."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        value = config.values.get(name)
        # An empty object says as little as null.
        if value is None or value == {}:
            continue
        if not isinstance(value, dict):
            raise config.wrong(name, "must be an object, or null")
        found.append((name, Settings(_only_layers(config, name, value), config.path, f"{name}.")))
    return found


def _only_layers(config: Settings, name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The one object of parameters, where there is one for each type of layer."""
    nested = {key: part for key, part in value.items() if isinstance(part, dict)}
    if not nested:
        return value
    if set(nested) != {_FULL} or len(value) != 1:
        raise config.wrong(name, f"must hold parameters of {_FULL} layers only")
    inner: dict[str, Any] = nested[_FULL]
    return inner


def _one_scaling(rope: Settings, name: str, config: Settings) -> RopeScaling | None:
    """What one object of parameters asks for. Raises ExportError."""
    named = [rope.values[key] for key in _KINDS if rope.values.get(key) is not None]
    kind = named[0] if named else "default"
    if kind not in _FIELDS or any(other != kind for other in named):
        key = next(key for key in _KINDS if rope.values.get(key) is not None)
        raise _refused(config, f"{name}.{key}", kind, " or ".join(map(repr, _FIELDS)))
    known = {*_KINDS, "rope_theta", *_FIELDS[kind]}
    for key, value in rope.values.items():
        factor_of_one = key in ("partial_rotary_factor", "factor") and value in (None, 1)
        if key == "partial_rotary_factor" and not factor_of_one:
            raise _refused(config, f"{name}.{key}", value, "1 or absent")
        if key not in known and value is not None and not factor_of_one:
            raise _refused(config, f"{name}.{key}", value, "absent")
    if kind in ("default", "dynamic"):
        return None
    factor = rope.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeScaling("linear", factor)
    # transformers takes a field beside the object first, and without any the present length.
    own, present = "original_max_position_embeddings", "max_position_embeddings"
    source = next((part for part in (config, rope) if part.values.get(own) is not None), None)
    original = (source or config).integer(own if source else present, 1, 1 << 30)
    if kind == "llama3":
        low, high = (rope.number(f"{end}_freq_factor", 1e-3, 1e3) for end in ("low", "high"))
        if low >= high:
            raise rope.wrong("high_freq_factor", "must be above low_freq_factor")
        return RopeScaling("llama3", factor, original, low, high)
    return RopeScaling(
        "yarn",
        factor,
        original,
        low=rope.number("beta_slow", 1e-3, 1e6, default=1.0),
        high=rope.number("beta_fast", 1e-3, 1e6, default=32.0),
        gain=_yarn_gain(rope, factor),
        whole=rope.values.get("truncate") is not False,
    )


def _yarn_gain(rope: Settings, factor: float) -> float:
    """What cosine and sine are multiplied by under yarn. Raises ExportError."""
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor", 1e-3, 1e3)

    def gain(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    both = [rope.number(key, 0.0, 1e3, default=0.0) for key in ("mscale", "mscale_all_dim")]
    return gain(both[0]) / gain(both[1]) if all(both) else gain(1.0)


def require_plain_decoder(config: Settings) -> None:
    """Refuse every field that asks for a computation that graphs here do not have.

    Raises:
        ExportError: It names the field, its value and the file.
    """
    require_values(config, _ONLY)
    layers = config.values.get("layer_types")
    plain = isinstance(layers, list) and all(layer == _FULL for layer in layers)
    if layers is not None and not plain:
        raise _refused(config, "layer_types", layers, f"{_FULL} for every layer")
    # Values of these two families' sliding windows count only where they are used.
    window = config.values.get("sliding_window")
    if window is not None and config.values.get("use_sliding_window") is None:
        raise _refused(config, "sliding_window", window, "absent, or use_sliding_window false")
    tensor_parallel = config.values.get("pretraining_tp")
    if tensor_parallel not in (None, 1):
        raise _refused(config, "pretraining_tp", tensor_parallel, "1 or absent")


#: Fields of generation_config.json that change greedy answers, and what they may be.
_PLAIN_GENERATION: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "guidance_scale": (1.0,),
}


def require_plain_generation(generation: Settings) -> None:
    """Refuse what would change greedy decoding and is not implemented.

    Raises:
        ExportError: It names the field, its value and the file.
    """
    require_values(generation, _PLAIN_GENERATION)


def require_values(config: Settings, fields: dict[str, tuple[Any, ...]]) -> None:
    """Refuse fields that are neither absent, null, nor one of the values. Raises ExportError."""
    for name, allowed in fields.items():
        value = config.values.get(name)
        if value is not None and value not in allowed:
            wanted = " or ".join([*map(repr, allowed), "absent"])
            raise _refused(config, name, value, wanted)


def _refused(config: Settings, name: str, value: Any, wanted: str) -> ExportError:
    return ExportError(
        f"{config.path}: {name} is {repr(value)[:80]}, which is not supported; it must be {wanted}"
    )

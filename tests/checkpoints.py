"""Tiny generated checkpoints in the layouts that `lrs-edge export` reads, for tests.

Weights are random and fixed by a seed; sizes are the smallest that still have every part: grouped
heads, two RFM layers, several tiles' worth of positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
LAYERS, RFM_LAYERS = 3, 2
TOWER_HIDDEN, TOWER_WIDE, TOWER_LAYERS, PATCH, GRID = 32, 48, 3, 4, 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

Weights = dict[str, np.ndarray]


class _Random:
    """Random weights of a scale at which attention is far from uniform."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, *shape: int, scale: float = 1.5) -> np.ndarray:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = self._rng.standard_normal(shape) * scale / np.sqrt(fan_in)
        return values.astype(np.float16).astype(np.float32)

    def bias(self, size: int) -> np.ndarray:
        return self.matrix(size, scale=0.1)

    def gain(self, size: int) -> np.ndarray:
        return 1.0 + self.bias(size)


def write_qwen(folder: Path, **config: Any) -> Path:
    """A `llava_qwen` checkpoint in `folder`, its tower in `folder/tower`.

    Args:
        folder: Made if it is not there.
        **config: Entries of config.json to change; None removes one.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _changed(_qwen_config(), config))
    write_json(folder / "generation_config.json", {"eos_token_id": [258, 256]})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    save_file(qwen_weights(), folder / "model.safetensors")
    write_tower(folder / "tower")
    return folder


def write_nano(folder: Path, **config: Any) -> Path:
    """A `nano` checkpoint with 64-pixel tiles; see `write_qwen`.

    Where an entry is `vision_neck`, and `vision_objects` beside it, the weights that it asks for
    are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = _decoder_config() | {
        "architectures": ["LrsEdgeNanoForCausalLM"],
        "tie_word_embeddings": True,
        "eos_token_id": 258,
        "slice_block_size": 64,
        "base_side": 192,
        "local_pool": 1,
        "token_grid": 2,
        "mm_vision_tower": "efficientnet-lite0",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "prompt_prefix": "<|im_start|>user\n",
        "prompt_suffix": "\n{question}<|im_end|>\n",
        "separator": ":",
        "tokenizer_model_max_length": 512,
    }
    write_json(folder / "config.json", _changed(described, config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    weights = _language_weights(_Random(3), qkv_bias=False, width=1280)
    tower = efficientnet_weights(_Random(4))
    weights |= {f"model.vision_tower.{name}": value for name, value in tower.items()}
    if neck := config.get("vision_neck"):
        weights |= neck_weights(_Random(5), **neck)
        if objects := config.get("vision_objects"):
            weights |= object_weights(_Random(6), 2 * neck["width"], objects)
    save_file(weights, folder / "model.safetensors")
    return folder


def write_tower(folder: Path) -> Path:
    """A CLIP tower of 16-pixel tiles."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": TOWER_HIDDEN,
        "intermediate_size": TOWER_WIDE,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "image_size": PATCH * GRID,
    }
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": vision})
    save_file(tower_weights(), folder / "model.safetensors")
    return folder


def qwen_weights() -> Weights:
    """Weights of `write_qwen`, without the tower."""
    draw = _Random(1)
    weights = _language_weights(draw, qkv_bias=True, width=TOWER_HIDDEN)
    # More rows than the tokenizer has tokens, as in the released checkpoints.
    weights["lm_head.weight"] = draw.matrix(272, HIDDEN)
    return weights


def byte_tokenizer() -> Tokenizer:
    """256 bytes and three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_json(path: Path, **values: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    write_json(path, _changed(json.loads(path.read_text(encoding="utf-8")), values))


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = values | changes
    return {key: value for key, value in merged.items() if value is not None}


def _decoder_config() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 272,
        "llm_layer_list": list(range(RFM_LAYERS)),
    }


def _qwen_config() -> dict[str, Any]:
    return _decoder_config() | {
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_projector_type": "mlp2x_gelu_after_distillpruner",
        "mm_vision_tower": "tower",
        "mm_vision_select_layer": -2,
        "slice_block_size": PATCH * GRID,
        "tokenizer_model_max_length": 512,
        "max_position_embeddings": 1024,
        "eos_token_id": 258,
    }


def _language_weights(draw: _Random, *, qkv_bias: bool, width: int) -> Weights:
    pruner = "model.mm_projector.token_pruner"
    weights: Weights = {
        "model.embed_tokens.weight": draw.matrix(272, HIDDEN, scale=4.0),
        "model.image_newline": draw.matrix(HIDDEN, scale=0.5),
        "model.norm.weight": draw.gain(HIDDEN),
        "model.mm_projector.mlp_projector.0.weight": draw.matrix(HIDDEN, width),
        "model.mm_projector.mlp_projector.0.bias": draw.bias(HIDDEN),
        "model.mm_projector.mlp_projector.2.weight": draw.matrix(HIDDEN, HIDDEN),
        "model.mm_projector.mlp_projector.2.bias": draw.bias(HIDDEN),
    }
    for layer in range(LAYERS):
        weights |= _layer(draw, f"model.layers.{layer}", qkv_bias=qkv_bias)
    for layer in range(RFM_LAYERS + 1):
        weights |= _layer(draw, f"{pruner}.layers.{layer}", qkv_bias=qkv_bias)
    return weights


def _layer(draw: _Random, name: str, *, qkv_bias: bool) -> Weights:
    weights: Weights = {
        f"{name}.input_layernorm.weight": draw.gain(HIDDEN),
        f"{name}.post_attention_layernorm.weight": draw.gain(HIDDEN),
        f"{name}.self_attn.o_proj.weight": draw.matrix(HIDDEN, HEADS * HEAD_DIM),
        f"{name}.mlp.gate_proj.weight": draw.matrix(WIDE, HIDDEN),
        f"{name}.mlp.up_proj.weight": draw.matrix(WIDE, HIDDEN),
        f"{name}.mlp.down_proj.weight": draw.matrix(HIDDEN, WIDE),
    }
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        weights[f"{name}.self_attn.{part}_proj.weight"] = draw.matrix(heads * HEAD_DIM, HIDDEN)
        if qkv_bias:
            weights[f"{name}.self_attn.{part}_proj.bias"] = draw.bias(heads * HEAD_DIM)
    return weights


def tower_weights() -> Weights:
    """Weights of `write_tower`."""
    draw, hidden, wide, name = _Random(2), TOWER_HIDDEN, TOWER_WIDE, "vision_model"
    weights: Weights = {
        f"{name}.embeddings.class_embedding": draw.matrix(hidden),
        f"{name}.embeddings.patch_embedding.weight": draw.matrix(hidden, 3, PATCH, PATCH),
        f"{name}.embeddings.position_embedding.weight": draw.matrix(GRID**2 + 1, hidden),
    }
    norms = [f"{name}.pre_layrnorm"]
    linears: list[tuple[str, int, int]] = []
    for layer in range(TOWER_LAYERS):
        prefix = f"{name}.encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        linears += [(f"{prefix}.self_attn.{part}", hidden, hidden) for part in parts]
        linears += [(f"{prefix}.mlp.fc1", wide, hidden), (f"{prefix}.mlp.fc2", hidden, wide)]
    for norm in norms:
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = draw.gain(hidden), draw.bias(hidden)
    for linear, outputs, inputs in linears:
        weights[f"{linear}.weight"] = draw.matrix(outputs, inputs)
        weights[f"{linear}.bias"] = draw.bias(outputs)
    return weights


def neck_weights(draw: _Random, *, width: int, words: int, low: int = 160) -> Weights:
    """Random weights of a vision neck, and of the linear layer behind it."""
    shapes = {
        "high": (width, 1280, 1, 1),
        "low": (low, 112, 2, 2),
        "context.0": (width, width + low, 3, 3),
        "context.1": (width, width, 3, 3),
        "words": (words, 2 * width, 1, 1),
    }
    weights: Weights = {}
    for name, shape in shapes.items():
        weights[f"model.vision_neck.{name}.weight"] = draw.matrix(*shape)
        weights[f"model.vision_neck.{name}.bias"] = draw.bias(shape[0])
    weights["model.mm_projector.neck.weight"] = draw.matrix(HIDDEN, width + words)
    return weights


def object_weights(draw: _Random, neck: int, config: Any) -> Weights:
    """Random weights of an object head on `neck` channels."""
    width, both = config["width"], 2 * config["width"]
    shapes = {
        "coarse": (4 * width, neck, 1, 1),
        "fine": (width, 112, 1, 1),
        "mix.0": (both, both, 3, 3),
        "mix.1": (both, both, 3, 3),
        "out": (len(config["labels"]) + 2, both, 1, 1),
    }
    weights: Weights = {}
    for name, shape in shapes.items():
        weights[f"model.vision_objects.{name}.weight"] = draw.matrix(*shape)
        weights[f"model.vision_objects.{name}.bias"] = draw.bias(shape[0])
    return weights


def efficientnet_weights(draw: _Random) -> Weights:
    """Random weights of efficientnet-lite0 under the names of its PyTorch package."""
    blocks = [(1, 3, 1, 32, 16), (2, 3, 6, 16, 24), (2, 5, 6, 24, 40), (3, 3, 6, 40, 80)]
    blocks += [(3, 5, 6, 80, 112), (4, 5, 6, 112, 192), (1, 3, 6, 192, 320)]
    weights: Weights = {}

    def conv(name: str, norm: str, *shape: int) -> None:
        weights[f"{name}.weight"] = draw.matrix(*shape)
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = (
            draw.gain(shape[0]),
            draw.bias(shape[0]),
        )
        weights[f"{norm}.running_mean"] = draw.bias(shape[0])
        weights[f"{norm}.running_var"] = draw.gain(shape[0]) ** 2

    conv("_conv_stem", "_bn0", 32, 3, 3, 3)
    place = 0
    for repeats, kernel, expand, first, outputs in blocks:
        for repeat in range(repeats):
            inputs, name = (first if repeat == 0 else outputs), f"_blocks.{place}"
            middle = inputs * expand
            if expand != 1:
                conv(f"{name}._expand_conv", f"{name}._bn0", middle, inputs, 1, 1)
            conv(f"{name}._depthwise_conv", f"{name}._bn1", middle, 1, kernel, kernel)
            conv(f"{name}._project_conv", f"{name}._bn2", outputs, middle, 1, 1)
            place += 1
    conv("_conv_head", "_bn1", 1280, 320, 1, 1)
    return weights

r"""A random checkpoint in the released layout, of any size, written one tensor at a time.

    python scripts/make_checkpoint.py /tmp/random-1.5b
    lrs-edge export /tmp/random-1.5b -o /tmp/random-1.5b-bundle

For measuring what an export takes: sizes are those of Qwen2-1.5B by default, with a region focus
module and a CLIP tower of ViT-L/14-336's size. Weights are normal with a standard deviation of
1 / sqrt(inputs), those that write to the residual stream smaller by sqrt(2 * layers), so that
activations stay of the order of 1. Answers are noise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lrs_edge_export.checkpoints.safetensors_file import NewTensor, write_file

#: Largest shard, as transformers writes them by default in many releases.
SHARD_BYTES = 2_000_000_000

#: Values drawn at once.
_CHUNK = 4 << 20

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PRUNER = "model.mm_projector.token_pruner"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the language model; those of Qwen2-1.5B by default.

    Attributes:
        layers: Full layers.
        hidden: Width.
        heads: Query heads.
        kv_heads: Key and value heads.
        intermediate: Width of the MLP.
        rows: Of the embedding table and the output projection.
        vocabulary: Tokens of the tokenizer, at most rows.
        rfm_layers: Full layers of the region focus module.
        tied: The output projection is the embedding table.
    """

    layers: int = 28
    hidden: int = 1536
    heads: int = 12
    kv_heads: int = 2
    intermediate: int = 8960
    rows: int = 151_936
    vocabulary: int = 151_646
    rfm_layers: int = 3
    tied: bool = False


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of the CLIP tower; those of ViT-L/14-336 by default."""

    layers: int = 24
    hidden: int = 1024
    heads: int = 16
    intermediate: int = 4096
    patch: int = 14
    grid: int = 24

    @property
    def side(self) -> int:
        """Of an image in pixels."""
        return self.patch * self.grid


SMALL_TOWER = TowerSizes(layers=3, hidden=64, heads=2, intermediate=128)


@dataclass(frozen=True)
class Tensor:
    """A tensor to be drawn: normal around `mean`."""

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def write_checkpoint(
    folder: Path, sizes: Sizes, tower: TowerSizes, *, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the checkpoint to `folder`, and its vision tower to `folder/tower`."""
    (folder / "tower").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    write_shards(folder, language_tensors(sizes, tower.hidden), rng, shard_bytes)
    write_shards(folder / "tower", tower_tensors(tower), rng, shard_bytes)
    _write_json(folder / "config.json", _config(sizes, tower))
    _write_json(folder / "generation_config.json", {"eos_token_id": sizes.vocabulary - 1})
    _write_json(folder / "tower" / "config.json", {"vision_config": _tower_config(tower)})
    byte_tokenizer(sizes.vocabulary).save(str(folder / "tokenizer.json"))


def language_tensors(sizes: Sizes, vision_width: int) -> Iterator[Tensor]:
    """All tensors but the vision tower's, in the order of the released checkpoints."""
    yield Tensor("model.embed_tokens.weight", (sizes.rows, sizes.hidden), 1.0)
    yield Tensor("model.image_newline", (sizes.hidden,), 1.0)
    for layer in range(sizes.layers):
        yield from _layer(sizes, f"model.layers.{layer}", sizes.layers)
    yield from _linear("model.mm_projector.mlp_projector.0", vision_width, sizes.hidden, bias=True)
    yield from _linear("model.mm_projector.mlp_projector.2", sizes.hidden, sizes.hidden, bias=True)
    for layer in range(sizes.rfm_layers + 1):
        yield from _layer(sizes, f"{_PRUNER}.layers.{layer}", sizes.rfm_layers)
    yield Tensor(f"{_PRUNER}.norm.weight", (sizes.hidden,), 0.1, 1.0)
    yield Tensor("model.norm.weight", (sizes.hidden,), 0.1, 1.0)
    if not sizes.tied:
        yield from _linear("lm_head", sizes.hidden, sizes.rows)


def tower_tensors(sizes: TowerSizes) -> Iterator[Tensor]:
    """The vision part of a CLIP model."""
    name, hidden = "vision_model", sizes.hidden
    patch = (hidden, 3, sizes.patch, sizes.patch)
    places = (sizes.grid**2 + 1, hidden)
    yield Tensor(f"{name}.embeddings.class_embedding", (hidden,), 1.0)
    yield Tensor(f"{name}.embeddings.patch_embedding.weight", patch, 1 / math.sqrt(3) / sizes.patch)
    yield Tensor(f"{name}.embeddings.position_embedding.weight", places, 0.5)
    yield from _layer_norm(f"{name}.pre_layrnorm", hidden)
    gain = 1 / math.sqrt(2 * sizes.layers)
    for layer in range(sizes.layers):
        prefix = f"{name}.encoder.layers.{layer}"
        yield from _layer_norm(f"{prefix}.layer_norm1", hidden)
        for part in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{prefix}.self_attn.{part}", hidden, hidden, bias=True)
        yield from _linear(f"{prefix}.self_attn.out_proj", hidden, hidden, gain, bias=True)
        yield from _layer_norm(f"{prefix}.layer_norm2", hidden)
        yield from _linear(f"{prefix}.mlp.fc1", hidden, sizes.intermediate, bias=True)
        yield from _linear(f"{prefix}.mlp.fc2", sizes.intermediate, hidden, gain, bias=True)


def _layer(sizes: Sizes, name: str, layers: int) -> Iterator[Tensor]:
    hidden, wide = sizes.hidden, sizes.intermediate
    narrow, gain = hidden // sizes.heads * sizes.kv_heads, 1 / math.sqrt(2 * layers)
    yield Tensor(f"{name}.input_layernorm.weight", (hidden,), 0.1, 1.0)
    yield from _linear(f"{name}.mlp.down_proj", wide, hidden, gain)
    yield from _linear(f"{name}.mlp.gate_proj", hidden, wide)
    yield from _linear(f"{name}.mlp.up_proj", hidden, wide)
    yield Tensor(f"{name}.post_attention_layernorm.weight", (hidden,), 0.1, 1.0)
    yield from _linear(f"{name}.self_attn.k_proj", hidden, narrow, bias=True)
    yield from _linear(f"{name}.self_attn.o_proj", hidden, hidden, gain)
    yield from _linear(f"{name}.self_attn.q_proj", hidden, hidden, bias=True)
    yield from _linear(f"{name}.self_attn.v_proj", hidden, narrow, bias=True)


def _linear(
    name: str, inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = False
) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (outputs, inputs), gain / math.sqrt(inputs))
    if bias:
        yield Tensor(f"{name}.bias", (outputs,), 0.1 * gain)


def _layer_norm(name: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), 0.1, 1.0)
    yield Tensor(f"{name}.bias", (width,), 0.1)


def write_shards(
    folder: Path, tensors: Iterable[Tensor], rng: np.random.Generator, shard_bytes: int
) -> None:
    """Write tensors as bfloat16 shards with an index."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        used = sum(2 * other.count for other in shards[-1])
        if shards[-1] and used + 2 * tensor.count > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, rng)
        places |= {tensor.name: name for tensor in shard}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _write_shard(path: Path, tensors: list[Tensor], rng: np.random.Generator) -> None:
    # Drawn when they are written, one after the other.
    drawn = [
        NewTensor.of(tensor.name, "BF16", tensor.shape, partial(_drawn, tensor, rng))
        for tensor in tensors
    ]
    write_file(path, drawn, {"format": "pt"})


def _drawn(tensor: Tensor, rng: np.random.Generator) -> Iterator[bytes]:
    for start in range(0, tensor.count, _CHUNK):
        count = min(_CHUNK, tensor.count - start)
        values = rng.standard_normal(count, np.float32) * np.float32(tensor.deviation)
        bits = (values + np.float32(tensor.mean)).view(np.uint32)
        # Rounded to nearest: bfloat16 is the upper half of a float32.
        yield ((bits + 0x8000) >> 16).astype("<u2").tobytes()


def byte_tokenizer(vocabulary: int) -> Tokenizer:
    """256 bytes, words that are in no text, and three control tokens: `vocabulary` in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"<{place}>" for place in range(vocabulary - len(alphabet) - len(_SPECIAL))]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIAL])
    return tokenizer


def _config(sizes: Sizes, tower: TowerSizes) -> dict[str, Any]:
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.rows,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": sizes.tied,
        "max_position_embeddings": 32768,
        "tokenizer_model_max_length": 8192,
        "eos_token_id": sizes.vocabulary - 1,
        "llm_layer_list": list(range(sizes.rfm_layers)),
        "mm_hidden_size": tower.hidden,
        "mm_projector_type": "mlp2x_gelu_after_distillpruner",
        "mm_spatial_pool_mode": "bilinear",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "slice_block_size": tower.side,
    }


def _tower_config(sizes: TowerSizes) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "patch_size": sizes.patch,
        "image_size": sizes.side,
        "hidden_act": "quick_gelu",
    }


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Options for all sizes of the language model, and for the tower."""
    plain = Sizes()
    for name in ("layers", "hidden", "heads", "kv_heads", "intermediate", "rows", "vocabulary"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(plain, name), metavar="N")
    parser.add_argument("--rfm-layers", type=int, default=plain.rfm_layers, metavar="N")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding table")
    parser.add_argument("--small-tower", action="store_true", help="3 layers of width 64")


def chosen_sizes(options: argparse.Namespace) -> tuple[Sizes, TowerSizes]:
    """What the options of `add_size_options` ask for."""
    names = Sizes.__dataclass_fields__
    sizes = Sizes(**{name: getattr(options, name) for name in names})
    return sizes, SMALL_TOWER if options.small_tower else TowerSizes()


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    add_size_options(parser)
    options = parser.parse_args()
    write_checkpoint(options.folder, *chosen_sizes(options), seed=options.seed)


if __name__ == "__main__":
    main()

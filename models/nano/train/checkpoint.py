"""Write and read the released checkpoint layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from common import (
    BASE_SIDE,
    END,
    FEATURES,
    GRID,
    IMAGE_MEAN,
    IMAGE_STD,
    POSITIONS,
    PROMPT_PREFIX,
    PROMPT_SUFFIX,
    SEPARATOR,
    TILE,
    Paths,
    write_atomically,
)  # fmt: skip
from model import ModelConfig, Nano
from objects import ALIASES, THIN
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tower import POOLED, WIDTH
from words import WORDS


def tower_weights(paths: Paths) -> dict[str, Tensor]:
    """The fine-tuned vision encoder's state dict, without its classifier."""
    state = torch.load(paths.tower, map_location="cpu", weights_only=True)
    return {
        k: v.float().contiguous()
        for k, v in state.items()
        if not k.startswith("_fc") and not k.endswith("num_batches_tracked")
    }


def neck_weights(paths: Paths) -> dict[str, Tensor]:
    """The vision encoder's neck."""
    state = torch.load(paths.neck, map_location="cpu", weights_only=True)
    return {f"model.vision_neck.{k}": v for k, v in state.items()}


def object_weights(paths: Paths) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The head that detects objects, and what config.json says of it."""
    kept = torch.load(paths.objects, map_location="cpu", weights_only=True)
    described = {"width": THIN, "labels": kept["labels"], "thresholds": kept["thresholds"],
                 "aliases": [list(words) for words in ALIASES]}  # fmt: skip
    return {f"model.vision_objects.{k}": v for k, v in kept["weights"].items()}, described


def save_checkpoint(
    model: Nano,
    paths: Paths,
    rfm_layers: int,
    notes: dict[str, Any],
    name: str,
) -> None:
    """Write the checkpoint folder; every file is replaced in one step, the weights last.

    It has no RFM of its own: the language model's first layers are exported as one.

    Args:
        model: The model.
        paths: Where the vision encoder and the tokenizer lie.
        rfm_layers: Layers of the language model before the one that scores.
        notes: For config.json.
        name: Of the folder in the work folder.
    """
    folder = paths.work / name
    folder.mkdir(parents=True, exist_ok=True)
    config = model.llm.config
    tokenizer = Tokenizer.from_file(str(paths.base / "tokenizer.json"))
    eos, bos = tokenizer.token_to_id(END), tokenizer.token_to_id("<|im_start|>")
    objects, objects_described = object_weights(paths)
    described = {
        "architectures": ["LrsEdgeNanoForCausalLM"],
        "model_type": "lrs_edge_nano",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "slice_block_size": TILE,
        "base_side": BASE_SIDE,
        "local_pool": 1,
        "token_grid": GRID,
        "position_entries": POSITIONS,
        "mm_hidden_size": FEATURES,
        "mm_vision_tower": "efficientnet-lite0",
        "mm_projector_type": "mlp2x_gelu_after_distillpruner",
        "vision_neck": {"width": WIDTH, "low": POOLED, "words": len(WORDS)},
        "vision_objects": objects_described,
        "rfm_from_llm": rfm_layers,
        "words": list(WORDS),
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "prompt_prefix": PROMPT_PREFIX,
        "prompt_suffix": PROMPT_SUFFIX,
        "separator": SEPARATOR,
        "tokenizer_model_max_length": 8192,
        "torch_dtype": "float32",
        "training": notes,
    }
    weights: dict[str, Tensor] = {}
    for key, value in model.llm.state_dict().items():
        weights[f"model.{key}"] = value
    weights["model.image_newline"] = model.image_newline.detach()
    for key, value in model.projector.state_dict().items():
        weights[f"model.mm_projector.{key}"] = value
    for key, value in model.position.state_dict().items():
        weights[f"model.vision_position.{key}"] = value
    weights |= neck_weights(paths)
    weights |= objects
    weights |= {f"model.vision_tower.{k}": v for k, v in tower_weights(paths).items()}
    # A copy each: safetensors refuses tensors that share memory.
    copies = {k: v.detach().float().clone().contiguous() for k, v in weights.items()}
    write_atomically(folder / "config.json", json.dumps(described, indent=1) + "\n")
    generation = {"bos_token_id": bos, "eos_token_id": [eos, 0], "do_sample": False}
    write_atomically(folder / "generation_config.json", json.dumps(generation, indent=1) + "\n")
    write_atomically(folder / "tokenizer.json", (paths.base / "tokenizer.json").read_bytes())
    part = folder / "model.safetensors.part"
    save_file(copies, part, metadata={"format": "pt"})
    os.chmod(part, 0o644)
    os.replace(part, folder / "model.safetensors")


OTHER = ("mm_projector.token_pruner", "vision_tower", "vision_neck", "vision_objects")
"""Weights that are not trained with the language model."""


def load_checkpoint(folder: Path) -> tuple[Nano, dict[str, Any]]:
    """The trained model and its config.json; an RFM of its own is left aside."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = ModelConfig.__dataclass_fields__
    model = Nano(ModelConfig(**{k: v for k, v in described.items() if k in known}))
    weights = load_file(folder / "model.safetensors")
    state = {}
    for key, value in weights.items():
        name = key.removeprefix("model.")
        if name == "lm_head.weight":
            continue
        if name.startswith(OTHER):
            continue
        if name.startswith("mm_projector."):
            state["projector." + name.removeprefix("mm_projector.")] = value
        elif name.startswith("vision_position."):
            state["position." + name.removeprefix("vision_position.")] = value
        elif name == "image_newline":
            state[name] = value
        else:
            state["llm." + name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Earlier checkpoints have no neck; it starts from the words' embeddings then.
    if unexpected or any(key != "projector.neck.weight" for key in missing):
        raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}")
    return model.eval(), described


def start_model(paths: Paths) -> Nano:
    """Projector at random, language model from `<work>/base`."""
    described = json.loads((paths.base / "config.json").read_text(encoding="utf-8"))
    model = Nano(ModelConfig(**described))
    weights = load_file(paths.base / "model.safetensors")
    model.llm.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    return model

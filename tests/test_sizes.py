"""Sizes by config.json alone: against transformers' own classes, and what `info --memory` tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrs_edge.bundle.memory_sizes import PRECISIONS, of_sizes
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings
from lrs_edge_export.families.recipes import Recipe, all_recipes, find_recipe
from lrs_edge_export.families.sizes import DECODERS, read_sizes
from lrs_edge_export.families.tower_sizes import ANY_SIZE_TILE, DEFAULTS

#: One of each architecture, and both towers of Qwen3-VL.
CHECKED = (
    "smolvlm-256m",
    "smolvlm-2.2b",
    "llava-onevision-0.5b",
    "llava-1.5-7b",
    "llava-next-mistral-7b",
    "internvl3-1b",
    "qwen2-vl-2b",
    "qwen2.5-vl-3b",
    "qwen3-vl-2b",
    "qwen3-vl-8b",
)

#: Weights that transformers makes and no tower or projector has.
UNREAD = ("post_layernorm", "head.", "image_newline")


def settings(config: dict[str, Any]) -> Settings:
    return Settings(config, Path("config.json"))


def recipe(name: str) -> Recipe:
    found = find_recipe(name)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", DECODERS)
def test_defaults_of_decoders(kind: str) -> None:
    mapping = pytest.importorskip("transformers").models.auto.configuration_auto.CONFIG_MAPPING
    config = mapping[f"{kind}_text" if "_vl" in kind else kind]()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found = tuple(getattr(config, name) for name in (*names, "num_key_value_heads", "vocab_size"))
    assert found == DECODERS[kind]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_of_towers(kind: str) -> None:
    mapping = pytest.importorskip("transformers").models.auto.configuration_auto.CONFIG_MAPPING
    if kind.startswith("qwen"):
        config = mapping[kind]().vision_config
        wide = getattr(config, "intermediate_size", None) or config.embed_dim * config.mlp_ratio
        width = config.embed_dim if kind == "qwen2_vl" else config.hidden_size
        found = (width, wide, config.depth, config.num_heads, ANY_SIZE_TILE, config.patch_size)
    else:
        config = mapping[kind]()
        sides = [v if isinstance(v, int) else v[0] for v in (config.image_size, config.patch_size)]
        found = (
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            *sides,
        )
    assert found == DEFAULTS[kind]


@pytest.mark.parametrize("name", CHECKED)
def test_weights_are_those_of_transformers(name: str) -> None:
    """Every weight of tower and projector, every matrix of the language model."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = json.loads(json.dumps(recipe(name).config))
    if "vision_feature_layer" in config:
        config["vision_feature_layer"] = -1  # All layers, as transformers makes them.
    size = read_sizes(settings(config), name)
    cls = getattr(transformers, config["architectures"][0])
    text = config.get("text_config", config)
    # One layer of each kind is enough, and the table is not what is compared.
    text["num_hidden_layers"] = 1
    text.setdefault("pad_token_id", 0)
    with torch.device("meta"):
        made = cls(cls.config_class(**{k: v for k, v in config.items() if k != "architectures"}))
    vision = language = 0
    for weight, tensor in made.named_parameters():
        if ".layers." in weight and ("language_model" in weight or "text_model" in weight):
            language += tensor.numel() if tensor.dim() == 2 else 0
        elif not any(part in weight for part in ("language_model", "text_model.", "lm_head")) or (
            "vision" in weight
        ):
            unread = (
                any(part in weight for part in UNREAD) and "idefics3" not in config["model_type"]
            )
            vision += 0 if unread else tensor.numel()
    assert vision == size.vision.matrices + size.vision.others
    assert language == size.llm.layer


@pytest.mark.parametrize(
    ("name", "billions"),
    # As published on the checkpoints' pages.
    [
        ("smolvlm-256m", 0.26),
        ("smolvlm-500m", 0.51),
        ("smolvlm-2.2b", 2.25),
        ("internvl3-1b", 0.94),
        ("internvl3-2b", 2.09),
        ("internvl3-8b", 7.94),
        ("llava-onevision-0.5b", 0.89),
        ("llava-onevision-7b", 8.03),
        ("qwen2-vl-2b", 2.21),
        ("qwen2.5-vl-3b", 3.75),
        ("qwen2.5-vl-7b", 8.29),
        ("qwen3-vl-2b", 2.13),
        ("qwen3-vl-4b", 4.44),
        ("qwen3-vl-8b", 8.77),
    ],
)
def test_weights_of_recipes(name: str, billions: float) -> None:
    assert recipe(name).size.weights / 1e9 == pytest.approx(billions, abs=0.006)


def test_layouts_of_transformers_4_and_5_and_the_released_ones() -> None:
    """The same model under the names that its config.json has had."""
    flat = recipe("qwen2.5-vl-3b").config
    kept = ("architectures", "model_type", "vision_config", "tie_word_embeddings")
    nested = {key: flat[key] for key in kept}
    nested["text_config"] = {k: v for k, v in flat.items() if k not in kept}
    nested["text_config"]["model_type"] = "qwen2_5_vl_text"
    assert read_sizes(settings(nested), "x") == read_sizes(settings(flat), "x")

    new = recipe("internvl3-1b").config
    vision = {**new["vision_config"], "model_type": "intern_vit_6b", "image_size": 448}
    released = {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "llm_config": new["text_config"],
        "vision_config": {**vision, "patch_size": 14},
    }
    assert read_sizes(settings(released), "x") == read_sizes(settings(new), "x")

    authors = recipe("llava-largeimg-qwen2-7b").config
    plain = {k: v for k, v in authors.items() if k not in ("mm_projector_type", "llm_layer_list")}
    assert read_sizes(settings(authors), "x").own_rfm == 4
    assert read_sizes(settings(plain), "x").own_rfm == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "config alone"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"mm_vision_tower": "someone/tower"}, "mm_vision_tower"),
        ({"model_type": "mamba"}, "model_type"),
    ],
)
def test_configs_that_say_too_little(change: dict[str, Any], words: str) -> None:
    config = recipe("llava-largeimg-qwen2-7b").config | change
    with pytest.raises(ExportError, match=words):
        read_sizes(settings(config), "x")


def test_what_grows_with_the_context_and_what_does_not() -> None:
    size = recipe("qwen2.5-vl-3b").size
    short, long = (of_sizes(size, "fp16", context) for context in (1024, 8192))
    assert [s.weights for s in short.stages] == [s.weights for s in long.stages]
    # 36 layers, 2 heads of 128, keys and values, 2 bytes.
    assert long.stages[-1].kv == 36 * 2 * 128 * 2 * 2 * 8192
    assert short.stages[-1].kv * 8 == long.stages[-1].kv
    assert short.total < long.total


def test_precisions_in_order_of_their_files() -> None:
    for one in all_recipes():
        files = {name: sum(s.file for s in one.need(name).stages) for name in PRECISIONS}
        assert files["int4-weight"] < files["int8"] < files["fp16"] < files["fp32"]
        # An RFM that is the language model's layers is on disk once.
        assert bool(one.need("int8").stages[1].file) == bool(one.size.own_rfm)

"""Checkpoints that cannot be exported: one line that says what is wrong and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lrs_edge.errors import ExportError
from tests.checkpoints import edit_json, qwen_weights, write_json, write_nano, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import torch
from safetensors.torch import save_file as save_torch

from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model, Repetition
from lrs_edge_export.checkpoints.tensors import open_tensors
from lrs_edge_export.families.registry import read_model


def read(folder: Path, vision_tower: str | None = None) -> Model:
    return read_model(find_checkpoint(str(folder)), vision_tower)


def refused(folder: Path, *words: str, vision_tower: str | None = None) -> None:
    """Reading fails with one line that holds all the words."""
    with pytest.raises(ExportError) as caught:
        read(folder, vision_tower)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_qwen(tmp_path / "checkpoint")


def save_without(folder: Path, *unwanted: str, **replaced: np.ndarray) -> None:
    kept = {k: v for k, v in qwen_weights().items() if not any(part in k for part in unwanted)}
    save_file(kept | replaced, folder / "model.safetensors")


def test_a_sound_checkpoint(folder: Path) -> None:
    model = read(folder)
    assert (model.family, model.vocabulary, model.region_focus.config.layers) == (
        "llava_qwen",
        259,
        2,
    )
    assert model.lm_head().shape == (259, 64)
    assert model.prompt.stop_ids == (258, 256)


def test_missing_tensors_are_named(folder: Path) -> None:
    save_without(folder, "model.layers.1.mlp.up_proj")
    refused(folder, "model.layers.1.mlp.up_proj.weight", "missing")


def test_a_shape_that_does_not_fit(folder: Path) -> None:
    save_without(folder, **{"model.norm.weight": np.ones(32, np.float32)})
    refused(folder, "model.norm.weight", "[32]", "[64]")


def test_no_region_focus_module(folder: Path) -> None:
    save_without(folder, "token_pruner")
    model = read(folder)
    assert model.rfm is None
    with pytest.raises(ExportError, match=r"from-llm.*lrs-edge distill"):
        _ = model.region_focus
    assert model.with_rfm_of_llm(2).region_focus.config.layers == 2


def test_more_tokens_than_embeddings(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=200)
    save_without(folder, **{"model.embed_tokens.weight": np.ones((200, 64), np.float32)})
    refused(folder, "embed_tokens", "[200, 64]", "[259, 64]")


def test_values_that_are_not_finite(folder: Path) -> None:
    weights = qwen_weights()
    weights["model.image_newline"][3] = np.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"image_newline.*not finite"):
        read(folder).image_newline()


def test_quantized_weights(folder: Path) -> None:
    save_without(folder, **{"model.image_newline": np.ones(64, np.int8)})
    with pytest.raises(ExportError, match="I8"):
        read(folder).image_newline()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "LlavaQwenForCausalLM")),
        ({"architectures": None}, ("names none", "LlavaQwenForCausalLM", "families.md")),
        ({"architectures": ["NewForCausalLM"]}, ("NewForCausalLM", "not known", "the embedded")),
        (
            {"architectures": ["PaliGemmaForConditionalGeneration"]},
            ("not taken", "both directions", "LlavaLlamaForCausalLM"),
        ),
        ({"hidden_size": 10**9}, ("hidden_size", "1..131072")),
        ({"hidden_size": -64}, ("hidden_size",)),
        ({"hidden_size": "64"}, ("hidden_size", "integer")),
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers",)),
        ({"num_hidden_layers": True}, ("num_hidden_layers",)),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, ("num_attention_heads",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads",)),
        ({"head_dim": 13}, ("head_dim", "even")),
        ({"rms_norm_eps": 7.0}, ("rms_norm_eps",)),
        ({"rope_theta": 0.0}, ("rope_theta",)),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, ("rope_scaling",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "silu")),
        ({"llm_layer_list": []}, ("llm_layer_list",)),
        ({"llm_layer_list": [0, 1, 2]}, ("layers.3", "missing")),
        ({"mm_projector_type": "linear"}, ("mm_projector_type",)),
        ({"mm_vision_select_layer": -9}, ("mm_vision_select_layer",)),
        ({"mm_vision_select_feature": "cls_patch"}, ("mm_vision_select_feature",)),
        ({"slice_block_size": 336}, ("slice_block_size", "16")),
        ({"tokenizer_model_max_length": None}, ("tokenizer_model_max_length", "absent")),
        ({"mm_vision_tower": "nowhere"}, ("nowhere", "--vision-tower")),
        ({"mm_vision_tower": "owner/nowhere"}, ("owner/nowhere", "--vision-tower")),
    ],
)
def test_config_fields(folder: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    edit_json(folder / "config.json", **change)
    refused(folder, *words)


def test_a_config_with_fewer_layers_than_there_are(folder: Path) -> None:
    layers = read(folder).llm.config.layers
    edit_json(folder / "config.json", num_hidden_layers=layers - 1)
    refused(folder, f"layers.{layers - 1}", "do not belong together")


def test_a_config_with_another_vocabulary(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=5000)
    refused(folder, "vocab_size 5000", "do not belong together")


def test_generation_config_decides_what_ends_an_answer(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=257)
    assert read(folder).prompt.stop_ids == (258, 256)
    (folder / "generation_config.json").unlink()
    assert read(folder).prompt.stop_ids == (257,)
    edit_json(folder / "config.json", eos_token_id=5000)
    refused(folder, "eos_token_id")


def test_a_repetition_penalty_counts_the_beginning_of_sequence(folder: Path) -> None:
    assert read(folder).repetition == Repetition(1.0, ())
    edit_json(folder / "generation_config.json", repetition_penalty=1.05, bos_token_id=256)
    assert read(folder).repetition == Repetition(1.05, (256,))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN', "[" * 100_000])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "model.safetensors", "download it again")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json")


def test_broken_sentencepiece(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlavaLlamaForCausalLM"])
    refused(folder, "tokenizer.model")
    (folder / "tokenizer.model").write_bytes(b"\xff" * 64)
    refused(folder, "tokenizer.model")


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/b", "..", "C:\\x", "..\\x", ""])
def test_an_index_that_leads_elsewhere(folder: Path, file: str) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": file}})
    refused(folder, "index.json", "do not use")


@pytest.mark.parametrize("content", [[], {"weight_map": 3}, {}])
def test_an_index_of_another_form(folder: Path, content: object) -> None:
    write_json(folder / "model.safetensors.index.json", content)
    refused(folder, "not a weight index")


def test_an_index_with_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-2.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    refused(folder, "model-2.safetensors", "missing")


def test_shards_and_half_precision(folder: Path) -> None:
    weights = {k: torch.from_numpy(v).bfloat16() for k, v in qwen_weights().items()}
    names, places = sorted(weights), {}
    for part in range(2):
        file = f"model-{part}.safetensors"
        save_torch({name: weights[name] for name in names[part::2]}, folder / file)
        places |= dict.fromkeys(names[part::2], file)
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    found = read(folder).lm_head()
    assert found.dtype == np.float32
    assert np.array_equal(found, weights["lm_head.weight"][:259].float().numpy())


def test_pickled_weights_are_read_without_running_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    state = {k: torch.from_numpy(v) for k, v in qwen_weights().items()}
    torch.save(state, folder / "pytorch_model.bin")
    assert np.array_equal(read(folder).image_newline(), state["model.image_newline"].numpy())

    torch.save({"model.norm.weight": Path("/")}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "cannot be read")


def test_towers_own_weights_count_only_when_it_was_trained(folder: Path) -> None:
    own = {
        f"model.vision_tower.vision_tower.{name}": np.zeros(open_tower(folder).shape(name), "f4")
        for name in open_tower(folder).names()
    }
    save_without(folder, **own)
    name = "embeddings.class_embedding"
    assert read(folder).vision.tower.tensors.read(name).any()
    edit_json(folder / "config.json", unfreeze_mm_vision_tower=True)
    assert not read(folder).vision.tower.tensors.read(name).any()


def open_tower(folder: Path) -> Any:
    return open_tensors(folder / "tower")


@pytest.mark.parametrize("place", ["beside", "inside", "absolute", "given"])
def test_where_the_vision_tower_is_found(folder: Path, place: str) -> None:
    given = None
    if place == "beside":
        (folder / "tower").rename(folder.parent / "tower")
        edit_json(folder / "config.json", mm_vision_tower="owner/tower")
    elif place == "absolute":
        edit_json(folder / "config.json", mm_vision_tower=str(folder / "tower"))
    elif place == "given":
        (folder / "tower").rename(folder.parent / "elsewhere")
        given = str(folder.parent / "elsewhere")
    assert read(folder, given).vision.tile == 16


def test_a_given_tower_that_is_not_there(folder: Path) -> None:
    refused(folder, "--vision-tower", vision_tower=str(folder / "missing"))


def test_another_kind_of_tower(folder: Path) -> None:
    config = folder / "tower" / "config.json"
    vision = json.loads(config.read_text())["vision_config"] | {"model_type": "siglip_vision_model"}
    edit_json(config, vision_config=vision)
    refused(folder, "clip_vision_model")


def test_names_that_are_nothing() -> None:
    for name in ("nowhere", "a/b/c", "../x", "/nowhere/x"):
        with pytest.raises(ExportError, match="neither"):
            find_checkpoint(name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt_suffix": "no place for it"}, "prompt_suffix"),
        ({"separator": "::"}, "'::'"),
        ({"token_grid": 3}, "token_grid"),
        ({"image_std": [1, 2]}, "image_std"),
        ({"mm_vision_tower": "resnet"}, "mm_vision_tower"),
        ({"local_pool": 2, "token_grid": 2, "base_side": 0}, "base_side"),
    ],
)
def test_nano_config_fields(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    refused(write_nano(tmp_path, **change), word)

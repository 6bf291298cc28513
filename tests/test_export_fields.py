"""Fields of configs that change what a model computes: read, or refused by name; never a default.

Configs are written by transformers' own classes, and its modules say what RoPE's angles are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lrs_edge.errors import ExportError
from tests.checkpoints import edit_json, qwen_weights, write_json, write_qwen

torch = pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")
transformers = pytest.importorskip("transformers", reason="writes the configs")

from lrs_edge_export.checkpoints.checkpoint import find_checkpoint  # noqa: E402
from lrs_edge_export.families.registry import read_model  # noqa: E402
from lrs_edge_export.graphs.heads import inverse_frequencies  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_qwen(tmp_path / "checkpoint")


def theta_of(folder: Path) -> float:
    return read_model(find_checkpoint(str(folder))).llm.config.theta


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ExportError) as caught:
        read_model(find_checkpoint(str(folder)))
    for word in words:
        assert word in str(caught.value)


def written(folder: Path, **values: Any) -> Any:
    """Put into the checkpoint what transformers' Qwen2Config writes of RoPE; returns the config."""
    config = transformers.Qwen2Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, **values
    )
    config.save_pretrained(folder / "written")
    saved = json.loads((folder / "written" / "config.json").read_text())
    own = {key: saved[key] for key in saved if "rope" in key or key in ("layer_types", "head_dim")}
    own |= {key: saved[key] for key in ("sliding_window", "use_sliding_window") if key in saved}
    edit_json(folder / "config.json", **{"rope_theta": None, **own})
    return config


@pytest.mark.parametrize("theta", [10000.0, 1e6, 5e5])
def test_theta_as_transformers_writes_it(folder: Path, theta: float) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        config = written(folder, rope_theta=theta)
    else:
        config = written(folder, rope_parameters={"rope_type": "default", "rope_theta": theta})
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    assert theta_of(folder) == theta
    stage = read_model(find_checkpoint(str(folder))).llm
    wanted = Qwen2RotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(stage.config), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 1e6}, 1e6),
        ({}, 1e4),
        ({"rope_parameters": {"rope_theta": 1e6}}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6}, 1e6),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, 1e6),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_scaling": {}, "rope_theta": 1e6}, 1e6),
    ],
)
def test_where_theta_is_found(folder: Path, fields: dict[str, Any], theta: float) -> None:
    edit_json(folder / "config.json", **{"rope_theta": None, **fields})
    assert theta_of(folder) == theta


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn, all fields": {
        "factor": 4.0,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, its own gain": {"factor": 4.0, "attention_factor": 0.9},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("version", [4, 5])
def test_kinds_of_rope_as_transformers_computes_them(folder: Path, name: str, version: int) -> None:
    """Both layouts, and what PyTorch's decoder makes of it, at positions near and far."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from lrs_edge_export.torch_model.decoder import rope

    kind = name.partition(",")[0]
    asked = {"rope_type": kind, "rope_theta": 1e6} | SCALINGS[name]
    config = written(folder, rope_parameters=dict(asked))
    if version == 4:
        theta = asked.pop("rope_theta")
        values = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": asked}
        edit_json(folder / "config.json", **values)
    length = config.max_position_embeddings
    edit_json(folder / "config.json", max_position_embeddings=length)
    stage = read_model(find_checkpoint(str(folder))).llm
    model = Qwen2RotaryEmbedding(config)
    np.testing.assert_array_equal(inverse_frequencies(stage.config), model.inv_freq.numpy())
    positions = torch.tensor([[0, 1, 700, length - 1]])
    for found, wanted in zip(
        rope(stage.config, positions), model(torch.zeros(1), positions), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    # Whatever device tensors are made on that name none.
    with torch.device("meta"):
        elsewhere = rope(stage.config, positions)
    torch.testing.assert_close(elsewhere, rope(stage.config, positions), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["longrope", "proportional", "mrope", "su"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_other_kinds_of_rope(folder: Path, kind: str, field: str, key: str) -> None:
    edit_json(folder / "config.json", **{field: {key: kind, "rope_theta": 1e4}})
    refused(folder, field, kind, "config.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, ("several bases",)),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ("partial",)),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 6, 6]}}, ("mrope_section",)),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, ("factor",)),
        ({"rope_parameters": {"rope_theta": "1e4"}}, ("rope_theta",)),
        ({"rope_parameters": {"rope_type": "linear"}}, ("rope_parameters.factor",)),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "gain": 2}}, ("gain", "absent")),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 1}},
            ("rope_scaling.high_freq_factor",),
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}},
            ("rope_scaling.rope_type",),
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "default"},
            },
            ("rope_parameters and rope_scaling differ",),
        ),
        ({"rope_parameters": [1e4]}, ("rope_parameters",)),
        (
            {"rope_parameters": {n: {"rope_theta": 1e4} for n in ("full_attention", "sliding")}},
            ("rope_parameters", "full_attention"),
        ),
        ({"partial_rotary_factor": 0.25}, ("partial_rotary_factor",)),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"use_sliding_window": True}, ("use_sliding_window",)),
        ({"sliding_window": 512}, ("sliding_window",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"hidden_activation": "gelu_pytorch_tanh"}, ("hidden_activation",)),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ({"mm_vision_select_layer": None}, ("mm_vision_select_layer", "absent")),
        ({"mm_use_im_start_end": True}, ("mm_use_im_start_end",)),
        ({"image_aspect_ratio": "anyres"}, ("image_aspect_ratio",)),
    ],
)
def test_fields_that_are_not_implemented(
    folder: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit_json(folder / "config.json", **fields)
    refused(folder, *words, "config.json")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.2.mlp.up_proj.bias",
        "model.mm_projector.token_pruner.layers.0.self_attn.k_norm.weight",
        "model.mm_projector.mlp_projector.4.weight",
    ],
)
def test_tensors_that_would_be_left_out(folder: Path, name: str) -> None:
    save_file(qwen_weights() | {name: np.ones(64, np.float32)}, folder / "model.safetensors")
    refused(folder, name, "leave out")


def test_tables_of_older_checkpoints_are_computed_anew(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(qwen_weights() | {name: np.ones(8, np.float32)}, folder / "model.safetensors")
    assert theta_of(folder) == 1e4


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("generation_config.json", "no_repeat_ngram_size", 3),
        ("generation_config.json", "suppress_tokens", [5]),
        ("generation_config.json", "num_beams", 4),
        ("tokenizer_config.json", "add_bos_token", True),
        ("tokenizer_config.json", "add_eos_token", True),
        ("tower/preprocessor_config.json", "rescale_factor", 1.0),
        ("tower/preprocessor_config.json", "do_normalize", False),
    ],
)
def test_fields_of_other_files(folder: Path, file: str, field: str, value: object) -> None:
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, values | {field: value})
    refused(folder, field, Path(file).name)


def test_a_tokenizer_that_no_bundle_may_hold(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    refused(folder, "tokenizer.json", "Lowercase")

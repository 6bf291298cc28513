"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in the layouts of transformers, judged by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.errors import ExportError
from lrs_edge.language.kv_cache import TokenKind
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.torch_model.vision import vision_tokens
from tests import transformers_parity as parity
from tests.checkpoints import byte_tokenizer, edit_json, write_json
from tests.transformers_parity import QUESTION

START, END, PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
#: Rows of the vocabulary, more than the tokenizer has tokens.
ROWS = 288
SIDE = 16

#: Names of tensors as transformers 4 wrote them.
V4 = ((r"model\.visual\.", "visual."), (r"model\.language_model\.", "model."))

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "max_position_embeddings": 4096,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
    "Qwen3VL": {
        "text_config": TEXT
        | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 2],
        },
    },
}
KINDS = list(CONFIGS)


def tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer with Qwen's marks; their ids as config.json has them."""
    made = byte_tokenizer()
    made.add_special_tokens([AddedToken(t, special=True) for t in (START, END, PAD)])
    made.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
    )
    names = {"image": PAD, "vision_start": START, "vision_end": END}
    return {f"{name}_token_id": made.token_to_id(text) for name, text in names.items()}


def written(folder: Path, kind: str, **saving: Any) -> tuple[Any, Path]:
    """A model and its checkpoint."""
    folder.mkdir()
    ids = tokenizer(folder)
    config = CONFIGS[kind]
    text = config["text_config"] | {"eos_token_id": 258, "bos_token_id": None}
    described = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=config["vision_config"], video_token_id=ROWS - 1, **ids
    )
    described._attn_implementation = "eager"
    model = parity.seeded(getattr(transformers, f"{kind}ForConditionalGeneration"), described)
    model.generation_config.eos_token_id = 258
    parity.saved(model, folder, **saving)
    processor_of(kind).save_pretrained(folder)
    return model, folder


def processor_of(kind: str) -> Any:
    if kind != "Qwen3VL":
        return Qwen2VLImageProcessorPil()
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half)


def patch_of(kind: str) -> int:
    return 16 if kind == "Qwen3VL" else 14


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind, model, checkpoint, and a bundle with the first layer as RFM."""
    folder = tmp_path_factory.mktemp(request.param)
    model, path = written(folder / "hf", request.param)
    bundle = parity.exported(path, folder / "bundle", rfm_layers=1)
    return request.param, model, path, bundle


def shown(kind: str, images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of images."""
    found = processor_of(kind)([Image.fromarray(x) for x in images], return_tensors="pt")
    return {key: torch.as_tensor(found[key]) for key in ("pixel_values", "image_grid_thw")}


def prompt(folder: Path, images: list[int], *, system: bool = True) -> list[int]:
    """Ids of the whole prompt with so many tokens for each image."""
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if system else ""
    marks = "".join(f"{START}{PAD * count}{END}" for count in images)
    text += f"<|im_start|>user\n{marks}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    found = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return list(found)


def generated(model: Any, ids: list[int], **inputs: Any) -> parity.Run:
    kinds = (torch.tensor([ids]) == model.config.image_token_id).int()
    return parity.generated(model, ids, mm_token_type_ids=kinds, **inputs)


def positions(model: Any, ids: list[int], grids: list[tuple[int, int]]) -> np.ndarray:
    """Positions [3, L] that transformers gives a prompt with images of so many patches."""
    prompt = torch.tensor([ids])
    kinds = (prompt == model.config.image_token_id).int()
    sizes = torch.tensor([[1, *grid] for grid in grids])
    found, _ = model.model.get_rope_index(prompt, mm_token_type_ids=kinds, image_grid_thw=sizes)
    return found[:, 0].numpy()


def tokens_of(seen: Any) -> torch.Tensor:
    """Tokens [T, W] of one image of what the tower gives, those of inner layers behind them."""
    return torch.cat([seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])], 1)


def random_image(folder: Path, rows: int, cols: int) -> tuple[Path, np.ndarray]:
    path = parity.image_file(folder / f"{rows}x{cols}.png", cols, rows, seed=rows + cols)
    return path, np.asarray(Image.open(path))


def test_its_section_in_the_documentation(made: Any) -> None:
    parity.assert_documented(made[2])


def test_one_image_of_a_tiles_size(made: Any, tmp_path: Path) -> None:
    kind, model, folder, bundle = made
    tile = SIDE * 2 * patch_of(kind)
    path, pixels = random_image(tmp_path, tile, tile)
    found = parity.asked(bundle, path, max_tiles=0)
    ids = prompt(folder, [SIDE**2], system=kind != "Qwen3VL")
    # A trace does not hold the mark between the global view and the tiles.
    wanted = parity.collapsed(ids, model.config.image_token_id)
    wanted.remove(model.config.vision_end_token_id)
    assert found.input_ids == wanted
    grids = [(2 * SIDE, 2 * SIDE)]
    assert np.array_equal(found.sequence.positions, positions(model, ids, grids))
    parity.assert_same(found, generated(model, ids, **shown(kind, [pixels])))


def test_a_level_of_one_tile_is_a_second_image(made: Any, tmp_path: Path) -> None:
    kind, model, folder, bundle = made
    tile = SIDE * 2 * patch_of(kind)
    path, pixels = random_image(tmp_path, tile, tile)
    found = parity.asked(bundle, path, prune="none")
    ids = prompt(folder, [SIDE**2] * 2, system=kind != "Qwen3VL")
    assert len(found.sequence) == len(ids)
    parity.assert_same(found, generated(model, ids, **shown(kind, [pixels, pixels])))


def test_tiles_are_parts_of_one_image_and_keep_their_places(made: Any, tmp_path: Path) -> None:
    kind, model, folder, bundle = made
    tile = SIDE * 2 * patch_of(kind)
    path, pixels = random_image(tmp_path, tile, 2 * tile)
    found = parity.asked(bundle, path, prune="none")
    ids = prompt(folder, [SIDE**2, 2 * SIDE**2], system=kind != "Qwen3VL")
    # The global view is one tile, the level two side by side: as transformers numbers an image
    # of that size.
    grids = [(2 * SIDE, 2 * SIDE), (2 * SIDE, 4 * SIDE)]
    assert np.array_equal(found.sequence.positions, positions(model, ids, grids))
    local = found.sequence.values[found.sequence.tokens["kind"] == TokenKind.TILE]
    rows = local.reshape(SIDE, 2, SIDE, -1).transpose(1, 0, 2, 3).reshape(2, SIDE**2, -1)
    for number in range(2):
        part = pixels[:, number * tile : (number + 1) * tile]
        with torch.inference_mode():
            inputs = shown(kind, [part])
            seen = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        wanted = torch.cat(
            [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])], 1
        )
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(rows[number], wanted.numpy(), atol=1e-4 * scale)
    parity.assert_continued(model, found, stops=(258,))
    pruned = parity.asked(bundle, path)
    assert len(pruned.sequence) < len(found.sequence) - SIDE
    kept = found.sequence.positions[:, found.sequence.tokens["kind"] == TokenKind.TILE]
    left = pruned.sequence.positions[:, pruned.sequence.tokens["kind"] == TokenKind.TILE]
    assert {tuple(x) for x in left.T} < {tuple(x) for x in kept.T}
    assert pruned.sequence.positions[0, -1] == found.sequence.positions[0, -1]
    parity.assert_continued(model, pruned, stops=(258,))


def test_exports_own_check_passes(made: Any, tmp_path: Path) -> None:
    _, _, folder, _ = made
    report = export_bundle(str(folder), tmp_path / "b", ExportOptions(rfm_layers=2)).report
    assert report is not None
    assert {stage.stage for stage in report.stages} >= {"vision", "rfm", "llm"}


def read(folder: Path) -> Model:
    return read_model(find_checkpoint(str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_transformers_4(kind: str, tmp_path: Path) -> None:
    """Sharded, bfloat16, tied, older names; config.json of the first two is flat."""
    saving = {"names": V4, "dtype": torch.bfloat16, "shards": "40KB"}
    model, folder = written(tmp_path / "hf", kind, **saving)
    config = json.loads((folder / "config.json").read_text())
    if kind != "Qwen3VL":
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        config = text | config | {"rope_theta": rope.pop("rope_theta")}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config["model_type"] = kind.lower()
        write_json(folder / "config.json", config)
    found = read(folder)
    tile = torch.randn(1, 3, found.vision.tile, found.vision.tile)
    patch = patch_of(kind)
    side = 2 * SIDE
    squares = tile.view(3, SIDE, 2, patch, SIDE, 2, patch).permute(1, 4, 2, 5, 0, 3, 6)
    frames = squares[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
    with torch.inference_mode():
        seen = model.model.visual(
            frames.reshape(side * side, -1), grid_thw=torch.tensor([[1, side, side]])
        )
    wanted = tokens_of(seen)
    close = vision_tokens(found.vision, tile)[0] - wanted
    assert float(close.abs().max()) <= 1e-4 * float(wanted.abs().max())
    assert found.llm.config.rope_axes[0] == 0
    assert found.prompt.stop_ids == (258,)


def test_its_own_chat_template(made: Any, tmp_path: Path) -> None:
    _, _, folder, _ = made
    other = tmp_path / "hf"
    shutil.copytree(folder, other)
    parity.chat_template(
        other,
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}",
    )
    parts = read(other).prompt.parts
    assert parts[0].text == f"<|im_start|>user:{START}"
    assert parts[-1].text == "{question}<|im_end|>"


CHANGES = [
    ({"text_config": {"rope_parameters": ROPE | {"mrope_section": [2, 3, 4]}}}, "mrope_section"),
    ({"text_config": {"rope_parameters": ROPE | {"mrope_section": [8]}}}, "mrope_section"),
    ({"text_config": {"rope_parameters": ROPE | {"rope_type": "longrope"}}}, "rope_type"),
    ({"text_config": {"rope_parameters": ROPE | {"rope_type": "yarn"}}}, "factor"),
    ({"text_config": {"num_experts": 8}}, "num_experts"),
    ({"vision_config": {"in_channels": 4}}, "in_channels"),
    ({"vision_config": {"num_heads": 5}}, "num_heads"),
    ({"vision_config": {"hidden_act": "tanh"}}, "hidden_act"),
    ({"vision_config": {"patch_size": 4096}}, "patch_size|window_size"),
    ({"vision_config": {"patch_size": -1}}, "patch_size"),
    ({"vision_config": {"depth": 1}}, "depth|layers|deepstack"),
    ({"vision_config": {"spatial_merge_size": 10**9}}, "spatial_merge_size"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_what_is_not_taken(made: Any, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    kind, _, folder, _ = made
    other = tmp_path / "hf"
    shutil.copytree(folder, other)
    config = json.loads((folder / "config.json").read_text())
    for part, values in change.items():
        merged = config[part] | values
        if kind == "Qwen3VL" and "rope_parameters" in values:
            merged["rope_parameters"] = values["rope_parameters"] | {"mrope_interleaved": True}
        edit_json(other / "config.json", **{part: merged})
    with pytest.raises(ExportError, match=words):
        read(other)


def test_windows_of_another_size_make_another_tile(tmp_path: Path) -> None:
    """A tile is a whole number of windows: of three tokens, six of them."""
    _, folder = written(tmp_path / "hf", "Qwen2_5_VL")
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {"window_size": 3 * 28}
    edit_json(folder / "config.json", vision_config=vision)
    assert read(folder).vision.tile == 18 * 28
    edit_json(folder / "config.json", vision_config=vision | {"window_size": 20})
    with pytest.raises(ExportError, match="window_size"):
        read(folder)


def test_more_deepstack_than_layers(tmp_path: Path) -> None:
    _, folder = written(tmp_path / "hf", "Qwen3VL")
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {"deepstack_visual_indexes": [0, 2]}
    text = config["text_config"] | {"num_hidden_layers": 1}
    edit_json(folder / "config.json", vision_config=vision, text_config=text)
    with pytest.raises(ExportError, match="deepstack_visual_indexes names 2 layers"):
        read(folder)


def test_the_processor_must_cut_as_the_tower_does(made: Any, tmp_path: Path) -> None:
    _, _, folder, _ = made
    other = tmp_path / "hf"
    shutil.copytree(folder, other)
    edit_json(other / "preprocessor_config.json", merge_size=4)
    with pytest.raises(ExportError, match="merge_size"):
        read(other)


def test_the_manifest_says_it(made: Any) -> None:
    kind, _, _, bundle = made
    manifest = open_bundle(bundle).manifest
    assert manifest.prompt.position_axes == 3
    assert manifest.vision.grid == SIDE
    assert manifest.llm.deepstack == (2 if kind == "Qwen3VL" else 0)
    assert manifest.rfm is not None
    assert manifest.rfm.deepstack == manifest.llm.deepstack

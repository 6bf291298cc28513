"""LLaVA's own layout, judged by transformers' models with the same weights under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.layout import LocalTiles
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.towers import ClipTower
from lrs_edge_export.families import llava_original
from lrs_edge_export.families.registry import find_family, read_model
from tests import test_family_llava_next as next_test
from tests import transformers_parity as parity
from tests.checkpoints import edit_json, write_json
from tests.test_family_llava_1_5 import TILE, TOKENS
from tests.test_family_llava_1_5 import written as write_1_5
from tests.transformers_parity import QUESTION

NAMES = (
    (r"(?:model\.)?language_model\.(?:model\.)?(?=lm_head)", ""),
    (r"(?:model\.)?language_model\.(?:model\.)?", "model."),
    (r"(?:model\.)?multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"(?:model\.)?multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (
        r"(?:model\.)?vision_tower\.(?:vision_model\.)?",
        "model.vision_tower.vision_tower.vision_model.",
    ),
    (r"(?:model\.)?image_newline", "model.image_newline"),
)


def rewritten(folder: Path, architecture: str, *, inside: bool, **config: Any) -> Path:
    """A checkpoint of transformers in LLaVA's own layout, the tower in `folder/tower` or inside."""
    described = json.loads((folder / "config.json").read_text())
    write_json(
        folder / "config.json",
        described["text_config"]
        | {
            "architectures": [architecture],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": "tower",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "unfreeze_mm_vision_tower": inside,
            "tokenizer_model_max_length": 480,
        }
        | config,
    )
    weights = load_file(folder / "model.safetensors")
    weights = {parity.renamed(name, NAMES): value for name, value in weights.items()}
    tower = {name: value for name, value in weights.items() if "vision_tower" in name}
    if not inside:
        weights = {name: value for name, value in weights.items() if name not in tower}
    save_file(weights, folder / "model.safetensors")
    (folder / "tower").mkdir()
    write_json(folder / "tower" / "config.json", {"vision_config": described["vision_config"]})
    start = len("model.vision_tower.vision_tower.")
    save_file({k[start:]: v for k, v in tower.items()}, folder / "tower" / "model.safetensors")
    (folder / "preprocessor_config.json").rename(folder / "tower" / "preprocessor_config.json")
    return folder


def ids_of(folder: Path, before: str, after: str, image: list[int], bos: bool) -> list[int]:
    """LLaVA's `tokenizer_image_token`: what is around the image is tokenised by itself."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, last = (tokenizer.encode(t, add_special_tokens=False).ids for t in (before, after))
    return [*([1] if bos else []), *first, *image, *last]


@pytest.mark.parametrize(
    "text",
    [
        {},
        {
            "head_dim": 20,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
        },
    ],
    ids=["llava-1.5", "other heads, biases, slower RoPE"],
)
def test_llava_1_5_with_a_tower_beside_it(tmp_path: Path, text: dict[str, Any]) -> None:
    model, folder = write_1_5(tmp_path / "hf", scheme="always", text=text)
    rewritten(folder, "LlavaLlamaForCausalLM", inside=False)
    parity.assert_documented(folder)
    bundle = parity.exported(folder, tmp_path / "bundle")
    image = parity.image_file(tmp_path / "image.png", TILE, TILE)
    found = parity.asked(bundle, image, max_tiles=0)
    before = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    shown = [model.config.image_token_id] * TOKENS
    ids = ids_of(folder, before, f"\n{QUESTION} ASSISTANT:", shown, bos=True)
    assert found.input_ids == parity.collapsed(ids, shown[0])
    size = {"height": TILE, "width": TILE}
    made = parity.image_processor("Clip", size={"shortest_edge": TILE}, crop_size=size)
    pixels = made(Image.open(image), return_tensors="pt")["pixel_values"]
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels))
    assert open_bundle(bundle).manifest.limits.max_length == 480


def test_llava_next_with_its_own_tower(tmp_path: Path) -> None:
    model, folder = next_test.written(tmp_path / "hf", next_test.MISTRAL)
    rewritten(
        folder,
        "LlavaMistralForCausalLM",
        inside=True,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
    )
    # What is beside it was not trained.
    for path in (folder / "tower").glob("*.safetensors"):
        path.unlink()
    parity.assert_documented(folder)
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    image = parity.image_file(tmp_path / "image.png", 2 * TILE, TILE)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    shown = [model.config.image_token_id] * (TOKENS + next_test.SIDE * (2 * next_test.SIDE + 1))
    ids = ids_of(folder, "[INST] ", f"\n{QUESTION} [/INST]", shown, bos=True)
    wanted = parity.generated(model, ids, **next_test.processed(image))
    parity.assert_same(found, wanted)
    parity.assert_continued(model, parity.asked(bundle, image), stops=(2,))


def test_tiles_of_longva_stand_side_by_side(tmp_path: Path) -> None:
    model, folder = next_test.written(tmp_path / "hf", next_test.QWEN)
    rewritten(
        folder,
        "LlavaQwenForCausalLM",
        inside=False,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="unires",
    )
    weights = load_file(folder / "model.safetensors")
    del weights["model.image_newline"]
    save_file(weights, folder / "model.safetensors")
    parity.assert_documented(folder)
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    assert open_bundle(bundle).manifest.prompt.local == LocalTiles()
    image = parity.image_file(tmp_path / "image.png", 2 * TILE, 2 * TILE)
    found = parity.asked(bundle, image, prune="none")
    text = len(found.input_ids) - 1
    assert len(found.sequence) == text + TOKENS + 4 * (next_test.SIDE // 2) ** 2
    parity.assert_continued(model, found, stops=(258,))


def test_one_linear_layer_and_resized_positions_of_geochat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = write_1_5(tmp_path / "hf")
    rewritten(folder, "GeoChatLlamaForCausalLM", inside=False, mm_projector_type="linear")
    weights = load_file(folder / "model.safetensors")
    for part in ("weight", "bias"):
        weights[f"model.mm_projector.{part}"] = weights.pop(f"model.mm_projector.0.{part}")
        del weights[f"model.mm_projector.2.{part}"]
    save_file(weights, folder / "model.safetensors")
    monkeypatch.setitem(llava_original._SIDES, "GeoChatLlamaForCausalLM", 84)
    model = read_model(find_checkpoint(str(folder)))
    tower = model.vision.tower
    assert isinstance(tower, ClipTower)
    assert (tower.grid, tower.table_grid, tower.align_corners) == (6, 4, True)
    assert model.vision.tile == 84
    table = torch.from_numpy(tower.tensors.read("embeddings.position_embedding.weight"))
    plane = table[1:].T.reshape(1, tower.hidden, 4, 4)
    wanted = torch.nn.functional.interpolate(plane, 6, mode="bicubic", align_corners=True)
    assert torch.allclose(torch.from_numpy(tower.positions()[1:]).T, wanted.reshape(-1, 36))
    parity.assert_documented(folder)
    bundle = parity.exported(folder, tmp_path / "bundle")
    image = parity.image_file(tmp_path / "image.png", 84, 84)
    assert len(parity.asked(bundle, image, max_tiles=0).sequence) > 36


def test_a_resampler_is_not_left_out(tmp_path: Path) -> None:
    _, folder = write_1_5(tmp_path / "hf")
    rewritten(folder, "LlavaLlamaForCausalLM", inside=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.vision_resampler.query"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"vision_resampler\.query"):
        read_model(find_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mm_projector_type": "identity"}, "mm_projector_type"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type"),
        ({"mm_patch_merge_type": "pooled", "image_aspect_ratio": "anyres"}, "merge_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_what_is_not_taken(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    _, folder = write_1_5(tmp_path / "hf")
    rewritten(folder, "LlavaLlamaForCausalLM", inside=False)
    checkpoint = find_checkpoint(str(folder))
    assert find_family(checkpoint).name == "llava"
    read_model(checkpoint)
    edit_json(folder / "config.json", **change)
    with pytest.raises(ExportError, match=word):
        read_model(find_checkpoint(str(folder)))

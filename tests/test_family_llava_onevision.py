"""LLaVA-OneVision in both layouts, judged by transformers: SigLIP, an odd grid of tokens, Qwen2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
import transformers

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.errors import ExportError
from lrs_edge.requests.options import AskOptions
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.distill.evidence import KEEP_RATIO
from lrs_edge_export.families.registry import read_model
from tests import transformers_parity as parity
from tests.checkpoints import edit_json
from tests.test_family_llava_1_5 import TEXT
from tests.test_family_llava_original import ids_of, rewritten
from tests.transformers_parity import QUESTION, V4_LLAVA

#: 3 patches of 14 pixels, and 6 pixels that are not looked at: as 384 is to 27 patches.
TILE, SIDE = 48, 3
TOKENS = SIDE * SIDE
PINPOINTS = [[TILE * rows, TILE * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)]
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN = TEXT | {"model_type": "qwen2", "eos_token_id": 258}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def written(folder: Path, *, tied: bool = False, **saving: Any) -> tuple[Any, Path]:
    """A model and its checkpoint."""
    folder.mkdir()
    config = transformers.LlavaOnevisionConfig(
        vision_config=VISION,
        text_config=QWEN | {"tie_word_embeddings": tied},
        image_token_index=parity.byte_level_tokenizer(folder).token_to_id("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    model = parity.seeded(transformers.LlavaOnevisionForConditionalGeneration, config)
    parity.saved(model, folder, **saving)
    processor(folder)
    return model, folder


def processor(folder: Path | None = None) -> Any:
    size = {"height": TILE, "width": TILE}
    return parity.image_processor(
        "LlavaOnevision", folder, size=size, image_grid_pinpoints=PINPOINTS, **HALVES
    )


def processed(image: Path) -> dict[str, Any]:
    """What transformers' processor makes of an image."""
    made = dict(processor()(Image.open(image), return_tensors="pt"))
    made.pop("batch_num_images")
    return made


def tokens_of(rows: int, cols: int) -> int:
    """Vision tokens of an image of so many tiles, newlines included."""
    return TOKENS + rows * SIDE * (cols * SIDE + 1)


@pytest.mark.parametrize(
    ("tiles", "saving"),
    [
        ((1, 1), {}),
        ((2, 3), {"names": V4_LLAVA, "tied": True}),
        ((3, 3), {"dtype": torch.bfloat16, "shards": "60KB"}),
    ],
    ids=["one tile", "tied, transformers 4", "nine tiles, sharded, bf16"],
)
def test_the_whole_image_and_what_is_kept_of_it(
    tmp_path: Path, tiles: tuple[int, int], saving: dict[str, Any]
) -> None:
    model, folder = written(tmp_path / "hf", **saving)
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    rows, cols = tiles
    image = parity.image_file(tmp_path / "image.png", cols * TILE, rows * TILE)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    prompt = f"<|im_start|>user <image>\n{QUESTION}<|im_end|><|im_start|>assistant\n"
    ids = parity.prompt_ids(folder, prompt, tokens_of(rows, cols))
    assert found.input_ids == parity.collapsed(ids, model.config.image_token_id)
    parity.assert_same(found, parity.generated(model, ids, **processed(image)))
    parity.assert_documented(folder)
    pruned = parity.asked(bundle, image, resampling="processor")
    parity.assert_continued(model, pruned, open_bundle(bundle).manifest.prompt.stop_ids)


def test_pooled_tiles(tmp_path: Path) -> None:
    model, folder = written(tmp_path / "hf")
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1, local_pool=2)
    spec = open_bundle(bundle).manifest.vision
    assert (spec.local_pool, spec.pooling, spec.per_tile) == (2, "bilinear", 2)
    image = parity.image_file(tmp_path / "image.png", 2 * TILE, 2 * TILE)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    text = len(found.input_ids) - 1
    assert len(found.sequence) == text + TOKENS + 4 * 5
    # The model itself pools frames of a video so.
    pixels = processed(image)["pixel_values"][0]
    with torch.inference_mode():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        features = model.model.multi_modal_projector(states)
        wanted = model.model.apply_pooling(features[1:]).numpy()
    local = found.sequence.values[found.input_ids.index(-200) + TOKENS :][: 4 * 5]
    shown = local.reshape(4, 5, -1)[:, :4].reshape(2, 2, 2, 2, -1).transpose(0, 2, 1, 3, 4)
    np.testing.assert_allclose(shown.reshape(4, 4, -1), wanted, atol=1e-4)
    parity.assert_continued(model, found, (258,))
    with pytest.raises(ExportError, match="3 tokens along"):
        parity.exported(folder, tmp_path / "other", local_pool=4)


@pytest.mark.parametrize("inside", [False, True])
def test_its_own_layout(tmp_path: Path, inside: bool) -> None:
    model, folder = written(tmp_path / "hf")
    rewritten(
        folder,
        "LlavaQwenForCausalLM",
        inside=inside,
        image_aspect_ratio="anyres_max_9",
        mm_patch_merge_type="spatial_unpad",
    )
    # LLaVA's code drops a layer, which transformers' layout does not have.
    vision = VISION | {"num_hidden_layers": VISION["num_hidden_layers"] + 1}
    edit_json(folder / "tower" / "config.json", vision_config=vision)
    bundle = parity.exported(folder, tmp_path / "bundle")
    image = parity.image_file(tmp_path / "image.png", 2 * TILE, TILE)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    shown = [model.config.image_token_id] * tokens_of(1, 2)
    ids = ids_of(folder, before, after, shown, bos=False)
    parity.assert_same(found, parity.generated(model, ids, **processed(image)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vision_feature_select_strategy": "default"}, "select_strategy"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "siglip_vision_model"),
    ],
)
def test_what_is_not_taken(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    _, folder = written(tmp_path / "hf")
    edit_json(folder / "config.json", **change)
    with pytest.raises(ExportError, match=word):
        read_model(find_checkpoint(str(folder)))


def test_what_stands_in_a_prompt_is_no_more_than_nine_tiles(tmp_path: Path) -> None:
    """So the step by which the model makes more tiles smaller (`anyres_max_9`) has no place."""
    model = read_model(find_checkpoint(str(written(tmp_path / "hf")[1])))
    assert (model.base_side / model.vision.tile) ** 2 <= 9
    assert AskOptions().tiles_per_level * KEEP_RATIO <= 9

"""LLaVA-NeXT in transformers' layouts, judged by transformers: stretched view, rows, newlines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import transformers
from safetensors.torch import load_file, save_file

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from tests import transformers_parity as parity
from tests.test_family_llava_1_5 import TEXT, TILE, TOKENS, VISION
from tests.transformers_parity import QUESTION, V4_LLAVA

SIDE = 4
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE]]
MISTRAL = {"model_type": "mistral", "sliding_window": 400, "num_key_value_heads": 1}
QWEN = {"model_type": "qwen2", "eos_token_id": 258, "rope_theta": 1e6}

LLAMA_3_1 = {
    "head_dim": 24,
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def written(folder: Path, text: dict[str, Any], **saving: Any) -> tuple[Any, Path]:
    """A model and its checkpoint."""
    folder.mkdir()
    write = parity.byte_level_tokenizer if text is QWEN else parity.llama_tokenizer
    config = transformers.LlavaNextConfig(
        vision_config=VISION,
        text_config=TEXT | text,
        image_token_index=write(folder).token_to_id("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    model = parity.seeded(transformers.LlavaNextForConditionalGeneration, config)
    parity.saved(model, folder, **saving)
    size = {"height": TILE, "width": TILE}
    parity.image_processor(
        "LlavaNext",
        folder,
        size={"shortest_edge": TILE},
        crop_size=size,
        image_grid_pinpoints=PINPOINTS,
    )
    return model, folder


def processed(image: Path) -> dict[str, Any]:
    """What transformers' processor makes of an image."""
    size = {"height": TILE, "width": TILE}
    made = parity.image_processor(
        "LlavaNext",
        size={"shortest_edge": TILE},
        crop_size=size,
        image_grid_pinpoints=PINPOINTS,
    )
    return dict(made(Image.open(image), return_tensors="pt"))


VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    f"helpful, detailed, and polite answers to the human's questions. USER: <image>\n{QUESTION} "
    "ASSISTANT:"
)
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
    f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("text", "saving", "prompt", "tiles"),
    [
        ({}, {}, VICUNA, (2, 2)),
        (MISTRAL, {"names": V4_LLAVA}, f"[INST] <image>\n{QUESTION} [/INST]", (1, 2)),
        (QWEN, {}, CHATML, (2, 1)),
        (LLAMA_3_1, {}, VICUNA, (1, 2)),
    ],
    ids=["vicuna", "mistral of transformers 4", "qwen2", "heads of 24, biases, rope of LLaMA 3.1"],
)
def test_the_whole_image_and_what_is_kept_of_it(
    tmp_path: Path,
    text: dict[str, Any],
    saving: dict[str, Any],
    prompt: str,
    tiles: tuple[int, int],
) -> None:
    model, folder = written(tmp_path / "hf", text, **saving)
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    rows, cols = tiles
    image = parity.image_file(tmp_path / "image.png", cols * TILE, rows * TILE)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    tokens = TOKENS + rows * SIDE * (cols * SIDE + 1)
    ids = parity.prompt_ids(folder, prompt, tokens)
    assert found.input_ids == parity.collapsed(ids, model.config.image_token_id)
    assert len(found.sequence) == len(ids)
    wanted = parity.generated(model, ids, **processed(image))
    parity.assert_same(found, wanted)
    parity.assert_documented(folder)
    pruned = parity.asked(bundle, image, resampling="processor")
    assert len(pruned.sequence) < len(found.sequence)
    stops = open_bundle(bundle).manifest.prompt.stop_ids
    parity.assert_continued(model, pruned, stops)


def test_a_window_of_attention_bounds_the_length(tmp_path: Path) -> None:
    _, folder = written(tmp_path / "hf", MISTRAL)
    limits = read_model(find_checkpoint(str(folder))).limits
    assert (limits.max_length, limits.max_positions) == (400, 400)


def test_without_newline(tmp_path: Path) -> None:
    _, folder = written(tmp_path / "hf", {})
    weights = load_file(folder / "model.safetensors")
    rest = {name: value for name, value in weights.items() if "image_newline" not in name}
    save_file(rest, folder / "model.safetensors")
    with pytest.raises(ExportError, match="image_newline"):
        read_model(find_checkpoint(str(folder)))


def test_the_global_view_is_stretched(tmp_path: Path) -> None:
    _, folder = written(tmp_path / "hf", {})
    bundle = parity.exported(folder, tmp_path / "bundle")
    assert open_bundle(bundle).manifest.vision.stretched
    image = parity.image_file(tmp_path / "image.png", 3 * TILE, TILE)
    bright = np.asarray(Image.open(image)).copy()
    bright[:, -TILE:] = 255
    Image.fromarray(bright).save(tmp_path / "bright.png")
    one, other = (
        parity.asked(bundle, path, max_tiles=0).sequence.values
        for path in (image, tmp_path / "bright.png")
    )
    assert not np.allclose(one, other)
